"""The mixture of experts: router, sorted dispatch, experts, shared expert (architecture 7)."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from v4jax import weights
from v4jax.config import LayerSpec, ModelConfig
from v4jax.kernels.grouped_matmul import api as grouped_matmul
from v4jax.model.context import Context
from v4jax.model.layers import Execution, Projection, weight
from v4jax.ops.top_k import largest
from v4jax.sharding import collectives, expert


class Router(nn.Module):
    """Scores every expert and picks K for each token, by score + bias or by token id."""

    config: ModelConfig
    spec: LayerSpec
    execution: Execution

    @nn.compact
    def __call__(self, x_BTD: Array, tokens_BT: Array, replayed_BTK: Array | None = None):
        """Experts [B,T,K], their weights [B,T,K] and all scores [B,T,E], float32."""
        config = self.config
        declared = weights.router(config, self.spec)
        gate_ED = weight(self, "weight", declared["weight"])
        logits = jnp.einsum(
            "btd,ed->bte",
            x_BTD.astype(jnp.float32),
            gate_ED.astype(jnp.float32),
            precision=jax.lax.Precision.HIGHEST,
        )
        scores = router_scores(logits, config.scoring_func)
        if self.spec.routing == "hash":
            chosen = weight(self, "tid2eid", declared["tid2eid"])[tokens_BT]
        else:
            bias = weight(self, "bias", declared["bias"])
            # The bias picks and does not weigh; ties go to the lower expert, as top_k has it.
            chosen = largest(scores + bias[None, None], config.num_experts_per_tok)
        if replayed_BTK is not None:
            chosen = replayed_BTK
        gates = jnp.take_along_axis(scores, chosen, axis=-1)
        if config.scoring_func != "softmax":
            gates = gates / gates.sum(-1, keepdims=True)
        return chosen, gates * config.routed_scaling_factor, scores


def router_scores(logits: Float[Array, "b t e"], function: str) -> Float[Array, "b t e"]:
    """sqrt(softplus(logits)), sigmoid or softmax over the experts."""
    if function == "sqrtsoftplus":
        return jnp.sqrt(jax.nn.softplus(logits))
    return jax.nn.sigmoid(logits) if function == "sigmoid" else jax.nn.softmax(logits, axis=-1)


class Experts(nn.Module):
    """The routed experts' stacked weights; tokens reach them without a drop."""

    config: ModelConfig
    execution: Execution

    @nn.compact
    def __call__(
        self, x_BTD: Array, chosen_BTK: Int[Array, "b t k"], weights_BTK: Array
    ) -> Float[Array, "b t d"]:
        """The sum over a token's experts, float32, not yet rounded."""
        config, execution = self.config, self.execution
        declared = weights.experts(config)
        stacks = tuple(weight(self, n, declared[n], execution.dtype) for n in ("w1", "w2", "w3"))
        options = {
            "limit": config.swiglu_limit,
            "rounding": grouped_matmul.Rounding(execution.dtype, execution.native),
            "implementation": execution.kernels,
        }

        def routed(x_XD, chosen_XK, gates_XK, stacks):
            def ffn(x_RD, gate_R, sizes_E):
                with jax.named_scope("experts"):
                    return grouped_matmul.expert_ffn(x_RD, gate_R, sizes_E, *stacks, **options)

            tokens = (x_XD, chosen_XK, gates_XK)
            count, kernels = config.n_routed_experts, execution.kernels
            return expert.route(execution.layout, *tokens, count, ffn, kernels)

        d, k = x_BTD.shape[-1], chosen_BTK.shape[-1]
        tokens = x_BTD.reshape(-1, d), chosen_BTK.reshape(-1, k), weights_BTK.reshape(-1, k)
        if execution.layout.axes("expert"):
            y = routed(*tokens, stacks)
        else:
            y = grouped_matmul.of_tokens(routed, *tokens, stacks, **options)
        return y.reshape(x_BTD.shape)


class SharedExpert(nn.Module):
    """The expert that every token takes, of n_shared_experts times the width."""

    config: ModelConfig
    execution: Execution

    def setup(self):
        declared = weights.shared_expert(self.config)
        self.w1 = Projection(declared["w1/weight"], self.execution)
        self.w2 = Projection(declared["w2/weight"], self.execution)
        self.w3 = Projection(declared["w3/weight"], self.execution)

    def __call__(self, x_BTD: Array) -> Array:
        y = grouped_matmul.gated_ffn(
            x_BTD.reshape(-1, x_BTD.shape[-1]),
            self.w1.weight,
            self.w2.weight,
            self.w3.weight,
            limit=self.config.swiglu_limit,
            rounding=grouped_matmul.Rounding(self.execution.dtype, self.execution.native),
            implementation=self.execution.kernels,
        )
        return y.reshape(x_BTD.shape)


def _load(chosen_BTK, scores_BTE, real_BT):
    """Sums over a row's tokens, [B,2,E]: how often each expert was chosen, its share of scores."""
    real = real_BT[..., None].astype(jnp.float32)
    expert = jnp.arange(scores_BTE.shape[-1], dtype=jnp.int32)[None, None]
    k = chosen_BTK.shape[-1]
    picked = sum((chosen_BTK[:, :, i, None] == expert).astype(jnp.float32) for i in range(k))
    share = scores_BTE / scores_BTE.sum(-1, keepdims=True)
    return jnp.stack([(real * picked).sum(1), (real * share).sum(1)], axis=1)


class MoE(nn.Module):
    """Routed experts plus the shared one, summed in float32 and rounded once."""

    config: ModelConfig
    spec: LayerSpec
    execution: Execution

    def setup(self):
        self.gate = Router(self.config, self.spec, self.execution)
        self.experts = Experts(self.config, self.execution)
        if self.config.n_shared_experts:
            self.shared_experts = SharedExpert(self.config, self.execution)

    def __call__(self, x_BTD: Array, context: Context, replayed_BTK: Array | None = None):
        """The layer's output [B,T,D] and auxiliary arrays by name."""
        with jax.named_scope("router"):
            chosen, gates, scores = self.gate(x_BTD, context.tokens, replayed_BTK)
        y = self.experts(x_BTD, chosen, gates)
        return add_shared(self, x_BTD, y), reported(context, chosen, gates, scores)


def add_shared(moe: MoE, x_BTD: Array, y_BTD: Array) -> Array:
    """The layer's output from the sum over the routed experts, y: the shared expert's is added."""
    if moe.config.n_shared_experts:
        y_BTD = y_BTD + moe.shared_experts(x_BTD).astype(jnp.float32)
    # Shards that hold parts of the experts' width have partial sums.
    y_BTD = collectives.total(y_BTD, moe.execution.layout.kept("mlp"))
    return moe.execution.round(y_BTD)


def reported(context: Context, chosen_BTK, gates_BTK, scores_BTE) -> dict[str, Array]:
    """What the router's choice adds to the auxiliary outputs that the caller asks for."""
    named = {
        "router_experts": chosen_BTK,
        "router_weights": gates_BTK,
        "router_scores": scores_BTE,
    }
    if "router_load" in context.aux:
        named["router_load"] = _load(chosen_BTK, scores_BTE, context.real)
    return {name: value for name, value in named.items() if name in context.aux}
