"""The compiled programs of a streamed forward pass, with one layer's weights as arguments.

A layer is three programs: its attention up to the router's choice (`attend`), its experts a group
at a time (`run_experts`), and what follows them (`finish`). Layers of one kind share them.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from v4jax.config import LayerSpec, ModelConfig
from v4jax.kernels.grouped_matmul import api as grouped_matmul
from v4jax.model import moe
from v4jax.model.block import Between, Block, after_experts, before_experts
from v4jax.model.context import Context, place_tokens
from v4jax.model.hyper_connections import HyperHead
from v4jax.model.keys import LayerState
from v4jax.model.layers import Execution, RMSNorm


class Kind(NamedTuple):
    """What a layer's programs are compiled for, besides shapes; config: of this layer alone."""

    config: ModelConfig
    spec: LayerSpec
    execution: Execution

    def block(self) -> Block:
        return Block(self.config, self.spec, self.execution)


class Attended(NamedTuple):
    """A layer up to its experts: `Between`, chosen experts, their weights, cache, aux by name."""

    between: Between
    chosen_BTK: Any
    gates_BTK: Any
    cache: Any
    aux: Any


@functools.partial(jax.jit, static_argnames=("aux", "dense"))
def place(tokens_BT, lengths_B, start_B, segment_ids_BT, aux, dense) -> Context:
    """Where the call's tokens stand."""
    return place_tokens(tokens_BT, lengths_B, start_B, segment_ids_BT, aux, dense)


@functools.lru_cache(maxsize=32)
def kinds(config: ModelConfig, execution: Execution) -> tuple[Kind, ...]:
    """What each layer's programs are compiled for: equal for equal layers of any model's cut."""
    alone = {spec: dataclasses.replace(config, layers=(spec,)) for spec in config.layers}
    return tuple(Kind(alone[spec], spec, execution) for spec in config.layers)


@functools.partial(jax.jit, static_argnames=("streams", "execution"))
def begin(streams: int, execution: Execution, x_BTD) -> Array:
    """The embedding repeated over the residual streams, [B,T,M,D]."""
    shape = (*x_BTD.shape[:2], streams, x_BTD.shape[2])
    return jnp.broadcast_to(x_BTD.astype(execution.dtype)[:, :, None], shape)


@functools.partial(jax.jit, static_argnames="kind")
def attend(kind: Kind, variables, h_BTMD, context: Context, cache, replay) -> Attended:
    """A layer's attention and its router."""

    def half(block, h_BTMD):
        state = LayerState(kind.execution.layout, cache, 0)
        between, here, state, aux = before_experts(block, h_BTMD, context, state, replay)
        with jax.named_scope("router"):
            replayed = replay.get("router_experts")
            chosen, gates, scores = block.ffn.gate(between.x_BTD, here.tokens, replayed)
        aux = aux | moe.reported(context, chosen, gates, scores)
        return Attended(between, chosen, gates, state.cache, aux)

    return kind.block().apply(variables, h_BTMD, method=half)


@functools.partial(jax.jit, static_argnames=("limit", "execution"), donate_argnames="y_YD")
def run_experts(
    limit: float,
    execution: Execution,
    experts: dict[str, Any],
    x_BTD,
    gates_BTK,
    source_R: Int[Array, " r"],
    sizes_E: Int[Array, " e"],
    y_YD,
) -> Float[Array, "y d"]:
    """y with the rows of one group of experts filled in, of the Y rows of the call.

    Args:
      experts: w1, w2 and w3 of the group. source_R, sizes_E: as of `groups.Group`.
    """
    k, d = gates_BTK.shape[-1], x_BTD.shape[-1]
    # A number behind the last row reads some row and writes none.
    inside_R = jnp.minimum(source_R, gates_BTK.size - 1)
    rows_RD = grouped_matmul.expert_ffn(
        x_BTD.reshape(-1, d)[inside_R // k],
        gates_BTK.reshape(-1)[inside_R],
        sizes_E,
        experts["w1"],
        experts["w2"],
        experts["w3"],
        limit=limit,
        rounding=grouped_matmul.Rounding(execution.dtype, execution.native),
        implementation=execution.kernels,
    )
    return y_YD.at[source_R].set(rows_RD, mode="drop")


@functools.partial(jax.jit, static_argnames="kind")
def finish(kind: Kind, variables, between: Between, y_YD, context: Context):
    """The streams after the layer, and auxiliary arrays by name; y: the rows of all choices."""

    def half(block, between):
        x_BTD = between.x_BTD
        y_XKD = y_YD.reshape(-1, y_YD.shape[0] // (x_BTD.shape[0] * x_BTD.shape[1]), x_BTD.shape[2])
        # In the order of a token's choices, as the model in memory sums them.
        total = y_XKD[:, 0].astype(jnp.float32)
        for choice in range(1, y_XKD.shape[1]):
            total = total + y_XKD[:, choice].astype(jnp.float32)
        y_BTD = moe.add_shared(block.ffn, x_BTD, total.reshape(x_BTD.shape))
        return after_experts(block, y_BTD, between, context)

    return kind.block().apply(variables, between, method=half)


class Collapse(nn.Module):
    """The streams collapsed and normed for the output head."""

    config: ModelConfig
    execution: Execution

    def setup(self):
        config = self.config
        self.hc_head = HyperHead(config, self.execution)
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, self.execution)

    def __call__(self, h_BTMD: Array) -> Array:
        return self.norm(self.hc_head(h_BTMD))


@functools.partial(jax.jit, static_argnames="kind")
def collapse(kind: Kind, variables, h_BTMD) -> Array:
    """What the output head multiplies, [B,T,D]; kind: of any layer."""
    return Collapse(kind.config, kind.execution).apply(variables, h_BTMD)


@jax.jit
def logits_of_rows(y_BTD, table_VD) -> Float[Array, "b t v"]:
    """The logits of some rows of the output head, float32."""
    return jnp.einsum("btd,vd->btv", y_BTD.astype(jnp.float32), table_VD.astype(jnp.float32))
