"""Attention of every layer kind: window, CSA, HCA and the dense baseline (architecture 4-6)."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array

from v4jax import quant
from v4jax.config import LayerSpec, ModelConfig
from v4jax.kernels import membership, ranges
from v4jax.kernels.sparse_attention import api as sparse_attention
from v4jax.kernels.sparse_attention.entries import as_rows
from v4jax.model import rope
from v4jax.model.cache import LayerCache, read_layer, write_layer, write_rows
from v4jax.model.compressor import Compressor
from v4jax.model.context import Context
from v4jax.model.indexer import Indexer
from v4jax.model.indexer_loss import Student, Teacher, indexer_loss
from v4jax.model.layers import Execution, Projection, RMSNorm, weight
from v4jax.ops.head_norm import head_norm, native_norm, norm_and_rope
from v4jax.ops.rope import rotate
from v4jax.sharding import collectives, sequence


class Attention(nn.Module):
    """Multi-query attention whose one kv row is key and value, with a grouped output projection."""

    config: ModelConfig
    spec: LayerSpec
    execution: Execution

    def setup(self):
        config, execution, std = self.config, self.execution, self.config.initializer_range
        d, latent, eps = config.hidden_size, config.q_lora_rank, config.rms_norm_eps
        heads, h = config.num_attention_heads, config.head_dim
        groups, o = config.o_groups, config.o_lora_rank

        def matrix(out, features, axes, **options):
            return Projection(out, features, axes, execution, std, **options)

        zeros = nn.initializers.zeros
        self.attn_sink = weight(self, "attn_sink", (heads,), ("heads",), zeros)
        self.wq_a = matrix(latent, d, ("q_lora", "embed"))
        self.q_norm = RMSNorm(latent, eps, execution)
        self.wq_b = matrix(heads * h, latent, ("heads", "q_latent"))
        self.wkv = matrix(h, d, ("kv", "embed"))
        self.kv_norm = RMSNorm(h, eps, execution)
        # Stored in FP8 and used in bf16: its input alone is not rounded to E4M3 (section 10).
        self.wo_a = matrix(
            groups * o, heads // groups * h, ("heads", "head_group"), quantize_input=False
        )
        self.wo_b = matrix(d, groups * o, ("embed", "heads"))
        if self.spec.attention in ("csa", "hca"):
            self.compressor = Compressor(config, self.spec, h, execution)
        if self.spec.attention == "csa":
            self.indexer = Indexer(config, self.spec, execution)

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
        cos_sin = rope.rotations(frequency, context.position)
        kv = self._kv_rows(x_BTD, cos_sin)
        aux = {}
        if self.spec.attention == "full":
            keys, cache = self._all_tokens(kv, context, cache, layer)
        else:
            keys, cache = self._window(kv, context, cache, layer)
        if compressing:
            entries, cache = self._entries(x_BTD, context, cache, layer)
        if self.spec.attention == "csa":
            # The indexer learns from a loss of its own, and the rest of the model not from that.
            fixed_BTD = jax.lax.stop_gradient(x_BTD)
            index_keys, cache = self._index_keys(fixed_BTD, context, cache, layer)
        # Keys are of all tokens; queries, from here on, of those whose output is wanted.
        x_BTD, cos_sin = jax.tree.map(context.only_wanted, (x_BTD, cos_sin))
        context = context.for_queries()
        q_lat = self.q_norm(self.wq_a("btd,ld->btl", x_BTD))
        q = self._queries(q_lat, cos_sin)
        if compressing:
            low, high = self._own(*context.visible_entries(self.spec.ratio), entries, cache)
            keys |= {"entries_BCH": entries, "low_BT": low, "high_BT": high}
        if self.spec.attention == "csa":
            q_index = self.indexer.queries(*jax.lax.stop_gradient((x_BTD, q_lat)), cos_sin)
            if replayed_BTK is not None:
                chosen_BTK = self._own_choice(replayed_BTK, entries, cache)
                # Of another run's choice a query gets what it may see, in its loss too.
                choice = {"chosen_BTK": ranges.visible(chosen_BTK, low, high)}
            else:
                places = (index_keys, low, high, context)
                choice, aux = self._choose(*q_index, *places, self._in_parts(cache))
            keys |= choice
        o, lse = self._attend(q, keys, self._in_parts(cache))
        if self.spec.attention == "csa" and "indexer_loss" in context.aux:
            chosen = _indices(choice, index_keys.shape[1])
            seen = jnp.where(context.real, high, low)
            if chosen is not None:
                chosen = jnp.where(context.real[..., None], chosen, -1)
            teacher = Teacher(q, lse, as_rows(entries), low, seen, chosen)
            topk = self.config.index_topk or index_keys.shape[1]
            execution = self.execution
            student = Student(*q_index, index_keys, topk, execution.native, execution.kernels)
            scale, heads = self.config.head_dim**-0.5, self.execution.layout.kept("heads")
            aux |= {"indexer_loss": indexer_loss(teacher, student, scale, heads)}
        if "attention" in context.aux:
            aux |= {"q": q, "kv": kv, "entries": as_rows(keys.get("entries_BCH")), "o": o}
        return self._output(o, cos_sin), cache, aux

    def _queries(self, q_lat, cos_sin):
        """Queries [B,T,N,H], normed a head at a time without a weight, rotated."""
        config, dtype = self.config, self.execution.dtype
        q = self.wq_b("btl,xl->btx", q_lat)
        q = q.reshape(*q.shape[:2], -1, config.head_dim)
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
        return jnp.concatenate([quant.fake_quant_e4m3(kv[..., :kept], 64), kv[..., kept:]], -1)

    def _window(self, kv, context, cache, layer):
        """This call's rows behind those of the cache, and the first that each query may see."""
        window, layout = self.config.sliding_window, self.execution.layout
        older = None if cache is None else read_layer(cache.window, layer)
        rows = sequence.joined_rows(layout, kv, older, window - 1)
        if cache is not None:
            last = sequence.last_rows(layout, rows, context.call.total, older.shape[1])
            cache = cache.replace(window=write_layer(cache.window, layer, last))
        for_queries = context.for_queries()
        if context.last_only:
            # The window that ends with the last real token, behind `older` and the others.
            begin = older.shape[1] + jnp.maximum(context.call.total, 1) - window
            rows = jax.vmap(lambda x, n: jax.lax.dynamic_slice_in_dim(x, n, window))(rows, begin)
        # A document begins `position` rows before its token, and the rows of this call behind
        # those that joined them.
        first = rows.shape[1] - for_queries.tokens.shape[1] + for_queries.row - for_queries.position
        return {"window_BSH": rows, "first_BT": jnp.maximum(first, 0), "window": window}, cache

    def _all_tokens(self, kv, context, cache, layer):
        """Full attention: every token's own row is an entry, visible from itself on."""
        position, layout = context.position, self.execution.layout
        kv = collectives.gather(kv, layout.axes("sequence"), 1)
        if cache is None:
            row = context.row + layout.index("sequence") * position.shape[1]
            row = jnp.broadcast_to(row, position.shape)
            return {"entries_BCH": kv, "low_BT": row - position, "high_BT": row + 1}, None
        call = context.call
        tokens = _write(layout, cache.tokens, layer, kv, call.begin, call.total)
        kv = _read(layout, tokens, layer)
        high = context.for_queries().position + 1
        low, high = self._own(jnp.zeros_like(high), high, kv, cache)
        return {"entries_BCH": kv, "low_BT": low, "high_BT": high}, cache.replace(tokens=tokens)

    def _entries(self, x_BTD, context, cache, layer):
        """All compressed entries so far, [B,C,H]."""
        state = None if cache is None else cache.main
        new, rows = self.compressor(x_BTD, context, state, layer)
        entries, state = self._collect(self._quantize_kv(new), rows, context, state, layer)
        return entries, None if cache is None else cache.replace(main=state)

    def _index_keys(self, x_BTD, context, cache, layer):
        """The index keys of all compressed entries so far, [B,C,Z]."""
        state = None if cache is None else cache.index
        new, rows = self.indexer.keys(x_BTD, context, state, layer)
        keys, state = self._collect(new, rows, context, state, layer)
        return keys, None if cache is None else cache.replace(index=state)

    def _collect(self, new, rows, context, state, layer):
        """Old and new entries of all shards, and the compressor's state with the new ones."""
        layout, ratio = self.execution.layout, self.spec.ratio
        new = sequence.collect_entries(layout, new, *context.closings(ratio), context.row.shape[1])
        if state is None:
            return new, None
        begin, total = context.call.begin, context.call.total
        first = begin // ratio
        count = (begin + total) // ratio - first
        entries = _write(layout, state.entries, layer, new, first, count)
        return _read(layout, entries, layer), state.replace(entries=entries, raw=rows)

    def _in_parts(self, cache):
        """Whether each shard attends to its own part of the cached entries."""
        return cache is not None and sequence.spread_entries(self.execution.layout)

    def _own(self, low, high, entries, cache):
        """[low, high) in the numbering of the entries at hand."""
        if not self._in_parts(cache):
            return low, high
        return sequence.own_range(self.execution.layout, low, high, entries.shape[1])

    def _own_choice(self, chosen_BTK, entries, cache):
        if not self._in_parts(cache):
            return chosen_BTK
        return sequence.own_entries(self.execution.layout, chosen_BTK, entries.shape[1])

    def _attend(self, q, keys, in_parts):
        """The core attention and its log-sum-exp; of entries in parts, the merged partial ones."""
        options = {"scale": self.config.head_dim**-0.5, "implementation": self.execution.kernels}
        sink, layout = self.attn_sink, self.execution.layout
        in_parts = in_parts and "entries_BCH" in keys
        if in_parts:
            rows = keys["window_BSH"].shape[1] if "window_BSH" in keys else 0
            sink, first = sequence.first_shard_only(layout, sink, keys.get("first_BT"), rows)
            keys = keys | {"first_BT": first}
        o, lse = sparse_attention.sparse_attention(q, sink, with_lse=True, **options, **keys)
        return sequence.merge_attention(layout, o, lse) if in_parts else o, lse

    def _choose(self, q_BTIZ, weight_BTI, keys_BCZ, low, high, context, in_parts):
        """The indexer's choice, or none where every visible entry would be in it."""
        layout, count = self.execution.layout, keys_BCZ.shape[1]
        entries = count * (layout.size("entries") if in_parts else 1)
        topk, aux, wanted = self.config.index_topk or entries, {}, context.aux
        if "index_scores" in wanted:
            scores = self.indexer.scores(q_BTIZ, weight_BTI, keys_BCZ)
            aux = {"index_scores": scores, "index_keys": keys_BCZ}
        if context.dense or (entries <= topk and "chosen" not in wanted):
            return {}, aux
        places = (q_BTIZ, weight_BTI, keys_BCZ, low, high)
        if in_parts:
            best = self.indexer.best(*places, min(topk, count))
            chosen, own = sequence.best_of_all(layout, *best, count, topk)
            choice = {"chosen_BTK": own}
        else:
            choice = self.indexer.choose(*places, topk)
            chosen = _indices(choice, count) if "chosen" in wanted else None
        return choice, aux | ({"chosen": chosen} if "chosen" in wanted else {})

    def _output(self, o, cos_sin):
        """Turns the values back, projects each group of heads down, then all of them up."""
        config, execution = self.config, self.execution
        cos, sin = (angle[:, :, None] for angle in cos_sin)
        o = self._rotated(execution.round(o), cos, sin, inverse=True)
        groups = config.o_groups // execution.layout.size("heads")
        o = o.reshape(*o.shape[:2], groups, -1)
        z = self.wo_a.grouped(o, groups)
        return self.wo_b("btx,dx->btd", z.reshape(*z.shape[:2], -1))


def _indices(choice, entries):
    """A choice among so many entries as indices [B,T,K]; None for all visible ones."""
    if "member_BTW" in choice:
        return membership.to_indices(choice["member_BTW"], choice["topk"], entries)
    return choice.get("chosen_BTK")


def _write(layout, buffer_RBCX, layer, new_BEH, start_B, count_B):
    """A cache's buffer with new entries at `start`; each shard writes those of its own part."""
    first = layout.index("entries") * buffer_RBCX.shape[2]
    return write_rows(buffer_RBCX, layer, new_BEH, start_B - first, count_B)


def _read(layout, buffer_RBCX, layer):
    """A layer's cached entries: of all shards, unless each attends to its own."""
    entries = read_layer(buffer_RBCX, layer)
    if sequence.spread_entries(layout):
        return entries
    return collectives.gather(entries, layout.axes("entries"), 1)
