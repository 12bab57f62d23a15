"""Attention of every layer kind: window, CSA, HCA and the dense baseline (architecture 4-6)."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array

from v4jax import block_sizes, quant, weights
from v4jax.config import LayerSpec, ModelConfig
from v4jax.kernels.indexer_topk import forms
from v4jax.kernels.sparse_attention.entries import expanded
from v4jax.model import rope
from v4jax.model.compressor import Compressor
from v4jax.model.context import Context
from v4jax.model.indexer import Indexer
from v4jax.model.indexer_loss import Teacher, indexer_loss
from v4jax.model.keys import LayerState
from v4jax.model.layers import Execution, Projection, RMSNorm, weight
from v4jax.ops.head_norm import head_norm, native_norm, norm_and_rope
from v4jax.ops.rope import rotate


class Attention(nn.Module):
    """Multi-query attention whose one kv row is key and value, with a grouped output projection."""

    config: ModelConfig
    spec: LayerSpec
    execution: Execution

    def setup(self):
        config, execution, eps = self.config, self.execution, self.config.rms_norm_eps
        declared = weights.attention(config, self.spec)

        def matrix(name, **options):
            return Projection(declared[f"{name}/weight"], execution, **options)

        self.attn_sink = weight(self, "attn_sink", declared["attn_sink"])
        self.wq_a = matrix("wq_a")
        self.q_norm = RMSNorm(config.q_lora_rank, eps, execution)
        self.wq_b = matrix("wq_b")
        self.wkv = matrix("wkv")
        self.kv_norm = RMSNorm(config.head_dim, eps, execution)
        # Stored in FP8 and used in bf16: its input alone is not rounded to E4M3 (section 10).
        self.wo_a = matrix("wo_a", quantize_input=False)
        self.wo_b = matrix("wo_b")
        if self.spec.compresses:
            self.compressor = Compressor(config, self.spec, config.head_dim, execution)
        if self.spec.attention == "csa":
            self.indexer = Indexer(config, self.spec, execution)

    def __call__(
        self,
        x_BTD: Array,
        context: Context,
        state: Any = None,
        replayed_BTK: Array | None = None,
    ):
        """The layer's output [B,T,D], its new state, and auxiliary arrays by name.

        Args:
          x_BTD: normed input. context: its tokens' places.
          state: the layer's part of the cache and the mesh (`LayerState`), or a draft's ring in its
            place (`dspark.Ring`); None for one device without a cache.
          replayed_BTK: entries to attend to instead of the indexer's choice (-1: none).
        """
        state = state or LayerState(self.execution.layout)
        frequency = rope.inverse_frequencies(self.config, self.spec.compresses)
        cos_sin = rope.rotations(frequency, context.position)
        # The keys of all tokens: the window or every token, then the compressed entries.
        kv_BTH = self._kv_rows(x_BTD, cos_sin)
        if self.spec.attention == "full":
            keys, state = state.extend_tokens(kv_BTH, context)
        else:
            keys, state = state.extend_window(kv_BTH, context, self.config.sliding_window)
        if self.spec.compresses:
            keys, state = self._entries(keys, x_BTD, context, state)
        if self.spec.attention == "csa":
            # The indexer learns from a loss of its own, and the rest of the model not from that.
            index_keys_BCZ, state = self.indexer.extend_keys(fixed(x_BTD), context, state)
        # The queries: from here on of the tokens whose output is needed.
        x_BTD, cos_sin = jax.tree.map(context.only_wanted, (x_BTD, cos_sin))
        context = context.for_queries()
        q_latent_BTL = self.q_norm(self.wq_a("btd,ld->btl", x_BTD))
        q_BTNH = self._queries(q_latent_BTL, cos_sin)
        # Which entries each query may see, and which of those the indexer chooses.
        aux = {}
        if self.spec.compresses:
            low, high = context.visible_entries(self.spec.ratio)
            low, high = state.own_range(low, high, keys.entries_BCH)
            keys = keys._replace(low_BT=low, high_BT=high)
        if self.spec.attention == "csa":
            latents = fixed((x_BTD, q_latent_BTL))
            student = self.indexer.student(*latents, index_keys_BCZ, cos_sin)
            keys, aux = self.indexer.choose(keys, student, context, state, replayed_BTK)
        # One softmax over the window, the entries and the sink.
        scale, kernels = self.config.head_dim**-0.5, self.execution.kernels
        with jax.named_scope("attend"):
            o_BTNH, lse_BTN = state.attend(q_BTNH, self.attn_sink, keys, scale, kernels)
        if self.spec.attention == "csa" and "indexer_loss" in context.aux:
            aux |= {"indexer_loss": self._indexer_loss(q_BTNH, lse_BTN, keys, student, context)}
        if "attention" in context.aux:
            entries = expanded(keys.entries_BCH)
            aux |= {"q": q_BTNH, "kv": kv_BTH, "entries": entries, "o": o_BTNH}
        return self._output(o_BTNH, cos_sin), state, aux

    def rows(self, x_BTD: Array, position_BT: Array) -> Array:
        """The kv rows [B,T,H] of inputs that nobody attends from: a draft's context."""
        frequency = rope.inverse_frequencies(self.config, self.spec.compresses)
        return self._kv_rows(x_BTD, rope.rotations(frequency, position_BT))

    def _queries(self, q_lat, cos_sin):
        """Queries [B,T,N,H], normed a head at a time without a weight, rotated."""
        config, dtype = self.config, self.execution.dtype
        q = self.wq_b("btl,xl->btx", q_lat)
        q = rearrange(q, "b t (n h) -> b t n h", h=config.head_dim)
        cos, sin = (angle[:, :, None] for angle in cos_sin)
        if self.execution.native:
            q = native_norm(q, config.rms_norm_eps)
        elif self.execution.kernels == "reference":
            q = head_norm(config.rms_norm_eps, dtype, q)[0]
        else:
            return norm_and_rope(config.rms_norm_eps, dtype, q, cos, sin)
        return self._rotated(q, cos, sin)

    def _rotated(self, x, cos, sin, inverse=False):
        execution = self.execution
        return rotate(x, cos, sin, execution.dtype, inverse, execution.kernels)

    def _kv_rows(self, x_BTD, cos_sin):
        kv = self.kv_norm(self.wkv("btd,hd->bth", x_BTD))
        return self._quantize_kv(self._rotated(kv, *cos_sin))

    def _quantize_kv(self, kv):
        """Rounds all but the rotated channels to E4M3 in groups of 64 (native numerics)."""
        if not self.execution.native:
            return kv
        kept = kv.shape[-1] - self.config.qk_rope_head_dim
        return jnp.concatenate(
            [quant.fake_quant_e4m3(kv[..., :kept], block_sizes.KV), kv[..., kept:]], -1
        )

    def _entries(self, keys, x_BTD, context, state):
        """The keys with all compressed entries so far [B,C,H], and the state with the new ones."""
        with jax.named_scope("compress"):
            new, raw = self.compressor(x_BTD, context, state.older_raw("main"))
            new, ratio = self._quantize_kv(new), self.spec.ratio
            entries, state = state.extend_entries("main", new, raw, context, ratio)
        return keys._replace(entries_BCH=entries), state

    def _indexer_loss(self, q_BTNH, lse_BTN, keys, student, context):
        """The indexer's loss over the real queries, as sums (`indexer_loss.SUMS`)."""
        seen, chosen = jnp.where(context.real, keys.high_BT, keys.low_BT), keys.choice()
        if chosen is not None:
            chosen = jnp.where(context.real[..., None], chosen, -1)
        entries = expanded(keys.entries_BCH)
        student = student._replace(keys_BCZ=forms.expanded(student.keys_BCZ))
        teacher = Teacher(q_BTNH, lse_BTN, entries, keys.low_BT, seen, chosen)
        scale, heads = self.config.head_dim**-0.5, self.execution.layout.kept("heads")
        return indexer_loss(teacher, student, scale, heads)

    def _output(self, o, cos_sin):
        """Rotates the values back, projects each group of heads down, then all of them up."""
        config, execution = self.config, self.execution
        cos, sin = (angle[:, :, None] for angle in cos_sin)
        o = self._rotated(execution.round(o), cos, sin, inverse=True)
        groups = config.o_groups // execution.layout.size("heads")
        o = rearrange(o, "b t (g n) h -> b t g (n h)", g=groups)
        z = rearrange(self.wo_a.grouped(o, groups), "b t g o -> b t (g o)")
        return self.wo_b("btx,dx->btd", z)


def fixed(arrays):
    """Arrays through which no gradient flows."""
    return jax.lax.stop_gradient(arrays)
