"""The lightning indexer of CSA layers: which compressed entries a query attends to (section 6)."""

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array

from v4jax import quant
from v4jax.config import LayerSpec, ModelConfig
from v4jax.kernels import membership
from v4jax.kernels.indexer_topk import api
from v4jax.model.cache import CompressorState
from v4jax.model.compressor import Compressor
from v4jax.model.context import Context
from v4jax.model.layers import Execution, Projection
from v4jax.ops.rope import rotate


class Indexer(nn.Module):
    """Index queries, keys and head weights, and the choice made with them."""

    config: ModelConfig
    spec: LayerSpec
    execution: Execution

    def setup(self):
        config, execution = self.config, self.execution
        std, heads, width = config.initializer_range, config.index_n_heads, config.index_head_dim
        self.wq_b = Projection(
            heads * width, config.q_lora_rank, ("index_heads", "q_latent"), execution, std
        )
        self.weights_proj = Projection(
            heads, config.hidden_size, ("index_heads", "embed"), execution, std, False
        )
        self.compressor = Compressor(config, self.spec, width, execution)

    def keys(self, x_BTD: Array, context: Context, state: CompressorState | None, layer):
        """This call's new index keys [B,E,Z] and the compressor's raw rows."""
        entries, rows = self.compressor(x_BTD, context, state, layer)
        return self._rotate_and_quantize(entries), rows

    def queries(self, x_BTD: Array, q_lat_BTL: Array, cos_sin) -> tuple[Array, Array]:
        """Index queries [B,T,I,Z] and their heads' weights [B,T,I]."""
        config, round_ = self.config, self.execution.round
        q = self.wq_b("btl,xl->btx", q_lat_BTL)
        q = q.reshape(*q.shape[:2], config.index_n_heads, config.index_head_dim)
        cos, sin = (angle[:, :, None] for angle in cos_sin)
        execution = self.execution
        q = rotate(q, cos, sin, execution.dtype, implementation=execution.kernels)
        q = self._rotate_and_quantize(q)
        factor = config.index_head_dim**-0.5 * config.index_n_heads**-0.5
        weight = self.weights_proj("btd,id->bti", x_BTD).astype(jnp.float32) * factor
        return q, round_(weight)

    def choose(self, q_BTIZ, weight_BTI, keys_BCZ, low_BT, high_BT, topk: int) -> dict[str, Array]:
        """The choice as the core attention takes it: a packed mask, or indices where those are
        fewer bytes or the call is a decode step's.
        """
        arguments = (q_BTIZ, weight_BTI, keys_BCZ, low_BT, high_BT, topk)
        options = {"native": self.execution.native, "implementation": self.execution.kernels}
        if low_BT.shape[1] == 1 or keys_BCZ.shape[1] > membership.BITS * topk:
            return {"chosen_BTK": api.indexer_topk(*arguments, **options)}
        member_BTW = api.indexer_member(*arguments, **options)
        return {"member_BTW": member_BTW, "topk": min(topk, keys_BCZ.shape[1])}

    def best(self, q_BTIZ, weight_BTI, keys_BCZ, low_BT, high_BT, topk: int) -> tuple[Array, Array]:
        """The choice as indices and the chosen entries' scores, for a merge with other shards'."""
        options = {"native": self.execution.native, "implementation": self.execution.kernels}
        arguments = (q_BTIZ, weight_BTI, keys_BCZ, low_BT, high_BT, topk)
        chosen_BTK = api.indexer_topk(*arguments, **options)
        return chosen_BTK, api.index_scores_at(*arguments[:3], chosen_BTK, native=options["native"])

    def scores(self, q_BTIZ, weight_BTI, keys_BCZ) -> Array:
        """Every entry's score for every query, float32 [B,T,C]: for losses and pictures."""
        options = {"native": self.execution.native, "implementation": self.execution.kernels}
        return api.index_scores(q_BTIZ, weight_BTI, keys_BCZ, **options)

    def _rotate_and_quantize(self, x):
        """The Hadamard rotation and E2M1 rounding of native numerics.

        The rotation is orthonormal and turns queries and keys alike, so without the rounding it
        changes no score and is left out.
        """
        if not self.execution.native:
            return x
        return quant.fake_quant_e2m1(self.execution.round(quant.hadamard(x)), 32)
