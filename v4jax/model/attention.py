"""Attention of every layer kind: window, CSA, HCA and the dense baseline (architecture 4-6)."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array

from v4jax import quant
from v4jax.config import LayerSpec, ModelConfig
from v4jax.kernels import membership
from v4jax.kernels.sparse_attention import api as sparse_attention
from v4jax.model import rope
from v4jax.model.cache import LayerCache, read_layer, shift_in, write_layer, write_rows
from v4jax.model.compressor import Compressor
from v4jax.model.context import Context
from v4jax.model.indexer import Indexer
from v4jax.model.indexer_loss import Index, Paid, indexer_loss
from v4jax.model.layers import Numerics, Projection, RMSNorm, normalize, weight


class Attention(nn.Module):
    """Multi-query attention whose one kv row is key and value, with a grouped output projection."""

    config: ModelConfig
    spec: LayerSpec
    numerics: Numerics

    def setup(self):
        config, numerics, std = self.config, self.numerics, self.config.initializer_range
        d, latent, eps = config.hidden_size, config.q_lora_rank, config.rms_norm_eps
        heads, h = config.num_attention_heads, config.head_dim
        groups, o = config.o_groups, config.o_lora_rank

        def matrix(out, features, axes, **options):
            return Projection(out, features, axes, numerics, std, **options)

        zeros = nn.initializers.zeros
        self.attn_sink = weight(self, "attn_sink", (heads,), ("heads",), zeros)
        self.wq_a = matrix(latent, d, ("q_lora", "embed"))
        self.q_norm = RMSNorm(latent, eps, numerics)
        self.wq_b = matrix(heads * h, latent, ("heads", "q_latent"))
        self.wkv = matrix(h, d, ("kv", "embed"))
        self.kv_norm = RMSNorm(h, eps, numerics)
        # Stored in FP8 and used in bf16: its input alone is not rounded to E4M3 (section 10).
        self.wo_a = matrix(
            groups * o, heads // groups * h, ("heads", "head_group"), quantize_input=False
        )
        self.wo_b = matrix(d, groups * o, ("embed", "heads"))
        if self.spec.attention in ("csa", "hca"):
            self.compressor = Compressor(config, self.spec, h, numerics)
        if self.spec.attention == "csa":
            self.indexer = Indexer(config, self.spec, numerics)

    def __call__(
        self,
        x_BTD: Array,
        context: Context,
        cache: LayerCache | None = None,
        layer: int | Array = 0,
        replayed_BTK: Array | None = None,
    ):
        """The layer's output [B,T,D], its new cache, and auxiliary arrays by name.

        Args:
          x_BTD: normed input. context: its tokens' places.
          cache: the segment's buffers, or None. layer: which repeat of the segment this is.
          replayed_BTK: entries to attend to instead of the indexer's choice (-1: none).
        """
        compressing = self.spec.attention in ("csa", "hca")
        frequency = rope.inverse_frequencies(self.config, compressing)
        turn = rope.rotations(frequency, context.position)
        q_lat = self.q_norm(self.wq_a("btd,ld->btl", x_BTD))
        q = self._queries(q_lat, turn)
        kv = self._kv_rows(x_BTD, turn)
        aux = {}
        if self.spec.attention == "full":
            keys, cache = self._all_tokens(kv, context, cache, layer)
        else:
            keys, cache = self._window(kv, context, cache, layer)
        if compressing:
            entries, cache = self._entries(x_BTD, context, cache, layer)
            low, high = context.visible_entries(self.spec.ratio)
            keys |= {"entries_BCH": entries, "low_BT": low, "high_BT": high}
        if self.spec.attention == "csa":
            # The indexer learns from a loss of its own, and the rest of the model not from that.
            fixed_BTD, fixed_BTL = jax.lax.stop_gradient((x_BTD, q_lat))
            index_keys, cache = self._index_keys(fixed_BTD, context, cache, layer)
            q_index = self.indexer.queries(fixed_BTD, fixed_BTL, turn)
            choice = {"chosen_BTK": replayed_BTK}
            if replayed_BTK is None:
                choice, aux = self._choose(*q_index, index_keys, low, high, context)
            keys |= choice
        scale, kernels = self.config.head_dim**-0.5, self.numerics.kernels
        o, lse = sparse_attention.sparse_attention(
            q, self.attn_sink, scale=scale, with_lse=True, implementation=kernels, **keys
        )
        if self.spec.attention == "csa" and "indexer_loss" in context.aux:
            paid = Paid(q, lse, entries, low, high, _indices(choice))
            topk = self.config.index_topk or index_keys.shape[1]
            index = Index(*q_index, index_keys, topk, self.numerics.native)
            aux |= {"indexer_loss": indexer_loss(paid, index, scale)}
        if "attention" in context.aux:
            aux |= {"q": q, "kv": kv, "entries": keys.get("entries_BCH"), "o": o}
        return self._output(o, turn), cache, aux

    def _queries(self, q_lat, turn):
        """Queries [B,T,N,H], normed a head at a time without a weight, rotated."""
        config, round_ = self.config, self.numerics.round
        q = self.wq_b("btl,xl->btx", q_lat)
        q = q.reshape(*q.shape[:2], config.num_attention_heads, config.head_dim)
        if self.numerics.native:
            q = _norm_chain(q, config.rms_norm_eps)
        else:
            q = round_(normalize(q, config.rms_norm_eps))
        cos, sin = (angle[:, :, None] for angle in turn)
        return round_(rope.rotate(q, cos, sin))

    def _kv_rows(self, x_BTD, turn):
        kv = self.kv_norm(self.wkv("btd,hd->bth", x_BTD))
        return self._quantize_kv(self.numerics.round(rope.rotate(kv, *turn)))

    def _quantize_kv(self, kv):
        """Rounds all but the rotated channels to E4M3 in groups of 64 (native numerics)."""
        if not self.numerics.native:
            return kv
        kept = kv.shape[-1] - self.config.qk_rope_head_dim
        return jnp.concatenate([quant.fake_quant_e4m3(kv[..., :kept], 64), kv[..., kept:]], -1)

    def _window(self, kv, context, cache, layer):
        """This call's rows behind those of the cache, and the first that each query may see."""
        window = self.config.sliding_window
        row = jnp.broadcast_to(jnp.arange(kv.shape[1], dtype=jnp.int32)[None], kv.shape[:2])
        if cache is None:
            first = jnp.zeros_like(row) if context.document is None else context.document
            rows = kv
        else:
            older = read_layer(cache.window, layer)
            rows, last = shift_in(older, kv, context.count)
            cache = cache.replace(window=write_layer(cache.window, layer, last))
            held = jnp.maximum(older.shape[1] - context.start, 0)
            first = jnp.broadcast_to(held[:, None], row.shape)
        return {"window_BSH": rows, "first_BT": first, "window": window}, cache

    def _all_tokens(self, kv, context, cache, layer):
        """Full attention: every token's own row is an entry, visible from itself on."""
        position = context.position
        if cache is not None:
            tokens = write_rows(cache.tokens, layer, kv, context.start, context.count)
            cache = cache.replace(tokens=tokens)
            kv = read_layer(tokens, layer)
            low, high = jnp.zeros_like(position), position + 1
        else:
            row = jnp.broadcast_to(jnp.arange(kv.shape[1], dtype=jnp.int32)[None], position.shape)
            low, high = row - position, row + 1
        return {"entries_BCH": kv, "low_BT": low, "high_BT": high}, cache

    def _entries(self, x_BTD, context, cache, layer):
        """All compressed entries so far, [B,C,H]."""
        state = None if cache is None else cache.main
        new, rows = self.compressor(x_BTD, context, state, layer)
        new = self._quantize_kv(new)
        if cache is None:
            return new, None
        state = _append(state, new, rows, context, layer, self.spec.ratio)
        return read_layer(state.entries, layer), cache.replace(main=state)

    def _index_keys(self, x_BTD, context, cache, layer):
        """The index keys of all compressed entries so far, [B,C,Z]."""
        state = None if cache is None else cache.index
        new, rows = self.indexer.keys(x_BTD, context, state, layer)
        if cache is None:
            return new, None
        state = _append(state, new, rows, context, layer, self.spec.ratio)
        return read_layer(state.entries, layer), cache.replace(index=state)

    def _choose(self, q_BTIZ, weight_BTI, keys_BCZ, low, high, context):
        """The indexer's choice, or none where every visible entry would be in it."""
        topk, aux, wanted = self.config.index_topk or keys_BCZ.shape[1], {}, context.aux
        if "index_scores" in wanted:
            scores = self.indexer.scores(q_BTIZ, weight_BTI, keys_BCZ)
            aux = {"index_scores": scores, "index_keys": keys_BCZ}
        if context.dense or (keys_BCZ.shape[1] <= topk and "chosen" not in wanted):
            return {}, aux
        choice = self.indexer.choose(q_BTIZ, weight_BTI, keys_BCZ, low, high, topk)
        if "chosen" in wanted:
            aux |= {"chosen": _indices(choice)}
        return choice, aux

    def _output(self, o, turn):
        """Turns the values back, projects each group of heads down, then all of them up."""
        config, round_ = self.config, self.numerics.round
        cos, sin = (angle[:, :, None] for angle in turn)
        o = round_(rope.rotate(round_(o), cos, sin, inverse=True))
        o = o.reshape(*o.shape[:2], config.o_groups, -1)
        z = self.wo_a.grouped(o, config.o_groups)
        return self.wo_b("btx,dx->btd", z.reshape(*z.shape[:2], -1))


def _indices(choice):
    """A choice as indices [B,T,K]; None for all visible entries."""
    if "member_BTW" in choice:
        return membership.to_indices(choice["member_BTW"], choice["topk"])
    return choice.get("chosen_BTK")


def _append(state, new, rows, context, layer, ratio):
    """The compressor's state with this call's closed blocks and raw rows."""
    first = context.start // ratio
    count = (context.start + context.count) // ratio - first
    entries = write_rows(state.entries, layer, new, first, count)
    return state.replace(entries=entries, raw=rows)


def _norm_chain(q, eps):
    """The per-head norm as a chain of bf16 tensors (section 10, point 2)."""
    dtype, q = q.dtype, q.astype(jnp.float32)

    def rounded(x):
        return quant.round_to(x, dtype).astype(jnp.float32)

    mean = rounded(jnp.mean(rounded(q * q), axis=-1, keepdims=True))
    inverse = rounded(1 / jnp.sqrt(rounded(mean + eps)))
    return quant.round_to(q * inverse, dtype)
