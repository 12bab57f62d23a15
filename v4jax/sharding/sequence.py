"""Sequence parallelism: each shard holds a slice of the tokens, or a part of every cache.

Every function is for use inside `shard_map` and does on one device what it says without a word of
communication. Two arrangements (technical report, section 3.4.3):

* Tokens spread ("sequence" has axes; training and prefill). A shard holds T neighbouring rows. The
  last rows of the shards to the left come by `ppermute` (`joined_rows`), compressed entries are
  made where their block closes and are gathered on all shards (`collect_entries`).
* Entries spread ("entries" has axes and "sequence" has none; decode at long context). All shards
  hold the same few tokens and each its part of the cached entries. Each picks its best entries,
  the best of all are picked from those (`best_of_all`), and each attends to its own; the partial
  softmaxes are merged by their log-sum-exps (`merge_attention`).
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Shaped

from v4jax.sharding import collectives
from v4jax.sharding.rules import Layout

ABSENT = -1e30  # a sink that adds nothing to any other shard's


def spread_entries(layout: Layout) -> bool:
    """Whether a call's tokens are on all shards and the cached entries in parts."""
    return bool(layout.axes("entries")) and not layout.axes("sequence")


def joined_rows(
    layout: Layout, new_BTX: Shaped[Array, "b t x"], older_BPX: Array | None, reach: int
) -> Shaped[Array, "b s x"]:
    """This shard's rows behind those that came before them, [B,P+T,X].

    Args:
      new_BTX: the rows of this shard's tokens.
      older_BPX: the cache's rows from before the call, on all shards; None without a cache.
      reach: how many rows before its own a token may need: P, where there is no cache. On one
        device P is then 0.
    """
    axes = layout.axes("sequence")
    if older_BPX is None and not axes:
        return new_BTX
    if older_BPX is None:
        older_BPX = jnp.zeros((new_BTX.shape[0], reach, new_BTX.shape[2]), new_BTX.dtype)
    new_BTX = new_BTX.astype(older_BPX.dtype)
    if axes:
        older_BPX = _rows_before(axes, new_BTX, older_BPX)
    return jnp.concatenate([older_BPX, new_BTX], axis=1)


def _rows_before(axes, new_BTX, older_BPX):
    """The P rows before this shard's first: its left neighbours', and before those the cache's."""
    length, reach = new_BTX.shape[1], older_BPX.shape[1]
    parts, missing = [], reach
    # A slice shorter than the reach: rows of several neighbours, the farthest first.
    for distance in range(1, jax.lax.axis_size(axes)):
        if missing <= 0:
            break
        taken = new_BTX[:, max(0, length - missing) :]
        parts.insert(0, collectives.from_left(taken, axes, distance))
        missing -= length
    if missing > 0:
        parts.insert(0, jnp.zeros_like(older_BPX[:, :missing]))
    neighbours = jnp.concatenate(parts, axis=1) if parts else older_BPX
    before = jax.lax.axis_index(axes) * length  # the call's rows before this shard's
    twice = jnp.concatenate([older_BPX, jnp.zeros_like(older_BPX)], axis=1)
    older = jax.lax.dynamic_slice_in_dim(twice, jnp.minimum(before, reach), reach, axis=1)
    from_cache = jnp.arange(reach, dtype=jnp.int32) < reach - before
    return jnp.where(from_cache[None, :, None], older, neighbours)


def last_rows(
    layout: Layout, joined_BSX: Array, total_B: Int[Array, " b"], keep: int
) -> Shaped[Array, "b p x"]:
    """The last `keep` real rows of the whole call, on all shards.

    Args:
      joined_BSX: `joined_rows` with a cache of `keep` rows.
      total_B: the call's real rows.
    """
    axes = layout.axes("sequence")
    if not axes and joined_BSX.shape[1] == keep + 1:
        # A decode step: a choice of two slices is one pass, rows at places of their own a gather.
        moved = (total_B > 0)[:, None, None]
        return jnp.where(moved, joined_BSX[:, 1:], joined_BSX[:, :-1])
    if not axes:
        take = jax.vmap(lambda x, n: jax.lax.dynamic_slice_in_dim(x, n, keep, axis=0))
        return take(joined_BSX, total_B)
    length = joined_BSX.shape[1] - keep
    index = jax.lax.axis_index(axes)
    row = (
        total_B[:, None] - keep + jnp.arange(keep, dtype=jnp.int32)[None]
    )  # in the whole call; below 0: older
    here = row - index * length
    mine = (here < length) & ((here >= 0) | (index == 0))
    take = jax.vmap(lambda x, at: x[jnp.clip(at, 0, x.shape[0] - 1)])
    rows = jnp.where(mine[..., None], take(joined_BSX, here + keep), 0)
    return collectives.total(rows.astype(joined_BSX.dtype), axes)


def row_of_all(layout: Layout, x_BTX: Array, at_B: Int[Array, " b"]) -> Array:
    """Row `at` of the whole call, [B,1,...], on all shards."""
    axes = layout.axes("sequence")
    length = x_BTX.shape[1]
    here = at_B - layout.index("sequence") * length
    trailing = (1,) * (x_BTX.ndim - 1)
    row = jnp.clip(here, 0, length - 1).reshape(-1, *trailing)
    found = jnp.take_along_axis(x_BTX, row, axis=1)
    if not axes:
        return found
    mine = ((here >= 0) & (here < length)).reshape(-1, *trailing)
    return collectives.total(jnp.where(mine, found, 0).astype(x_BTX.dtype), axes)


def collect_entries(
    layout: Layout, new_BEX: Array, closing_BC: Array | None, before_BS: Array | None, length: int
) -> Shaped[Array, "b c x"]:
    """All shards' new entries as one list in the order in which their blocks close.

    Args:
      new_BEX: entries whose blocks close in this shard's slice; garbage after the last.
      closing_BC: the row of the whole call at which each entry's block closes; None where every
        shard closes exactly E blocks.
      before_BS: entries that close before each shard's slice. length: rows of a slice.
    """
    axes = layout.axes("sequence")
    everyone = collectives.gather(new_BEX, axes, 1)
    if not axes or closing_BC is None:
        return everyone
    slots = new_BEX.shape[1]
    shard = jnp.minimum(closing_BC // length, before_BS.shape[1] - 1)
    entry = jnp.arange(closing_BC.shape[1], dtype=jnp.int32)[None]
    slot = jnp.clip(entry - jnp.take_along_axis(before_BS, shard, axis=1), 0, slots - 1)
    return jax.vmap(lambda x, at: x[at])(everyone, shard * slots + slot)


def own_range(layout: Layout, low, high, count: int):
    """[low, high) in this shard's numbering of its `count` cached entries."""
    first = layout.index("entries") * count
    return jnp.clip(low - first, 0, count), jnp.clip(high - first, 0, count)


def best_of_all(
    layout: Layout, chosen_BTK: Int[Array, "b t k"], score_BTK: Float[Array, "b t k"], count, topk
) -> tuple[Int[Array, "b t k2"], Int[Array, "b t k2"]]:
    """The best `topk` of all shards' best entries, ties to the lower entry.

    Args:
      chosen_BTK: this shard's best, ascending, -1 for none; score_BTK: their scores.
      count: entries that each shard holds.

    Returns:
      Entries of all shards, ascending, -1 after the last; and those of them that lie here, in
      this shard's numbering, -1 elsewhere.
    """
    axes = layout.axes("entries")
    first = layout.index("entries") * count
    entry = jnp.where(chosen_BTK < 0, -1, chosen_BTK + first)
    score = jnp.where(chosen_BTK < 0, -jnp.inf, score_BTK)
    # In the order of the shards and ascending within each: so top_k's ties go to the lower entry.
    entry, score = (collectives.gather(x, axes, 2) for x in (entry, score))
    _, place = jax.lax.top_k(score, min(topk, score.shape[2]))
    entry = jnp.take_along_axis(entry, place, axis=2)
    last = jnp.iinfo(entry.dtype).max
    entry = jnp.sort(jnp.where(entry < 0, last, entry), axis=2)
    entry = jnp.where(entry == last, -1, entry)
    return entry, own_entries(layout, entry, count)


def own_entries(layout: Layout, entry_BTK: Array, count: int) -> Array:
    """Those of the entries that lie on this shard, in its numbering; -1 elsewhere."""
    here = entry_BTK - layout.index("entries") * count
    return jnp.where((entry_BTK >= 0) & (here >= 0) & (here < count), here, -1)


def first_shard_only(layout: Layout, sink_N, first_BT, rows: int):
    """Sink and window for partial attention: all shards but the first see neither."""
    elsewhere = layout.index("entries") > 0
    first_BT = first_BT if first_BT is None else jnp.where(elsewhere, rows, first_BT)
    return jnp.where(elsewhere, ABSENT, sink_N.astype(jnp.float32)), first_BT


def merge_attention(layout: Layout, out_BTNH: Array, lse_BTN: Array) -> Array:
    """Partial attentions over disjoint entries made one, by their log-sum-exps."""
    axes = layout.axes("entries")
    largest = collectives.largest(lse_BTN, axes)
    weight = jnp.exp(lse_BTN - largest)
    parts = collectives.total(weight[..., None] * out_BTNH.astype(jnp.float32), axes)
    return (parts / collectives.total(weight, axes)[..., None]).astype(out_BTNH.dtype)
