"""Which entries a query has chosen, one bit per entry.

Entry e = 4096 g + 128 b + l is bit b of word 128 g + l, so that a kernel unpacks 128 neighbouring
entries from one row of 128 words with a shift. Words are uint32; a mask of C entries has
128 * ceil(C / 4096) of them, and bits past C are zero.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, UInt32

LANES = 128
BITS = 32
GROUP = LANES * BITS


def words(entries: int) -> int:
    """How many words hold a mask of so many entries."""
    return LANES * -(-entries // GROUP)


def pack(mask_BTC: Bool[Array, "b t c"]) -> UInt32[Array, "b t w"]:
    """The packed form of a mask."""
    batch, length, entries = mask_BTC.shape
    mask = jnp.pad(mask_BTC, ((0, 0), (0, 0), (0, -entries % GROUP)))
    mask = mask.reshape(batch, length, -1, BITS, LANES)
    # Term by term: a reduction over a middle axis is slow on a CPU.
    word = sum(mask[:, :, :, b].astype(jnp.uint32) << b for b in range(BITS))
    return word.reshape(batch, length, -1)


def unpack(member_BTW: UInt32[Array, "b t w"], entries: int) -> Bool[Array, "b t c"]:
    """The mask of `entries` entries that `pack` packed."""
    batch, length, count = member_BTW.shape
    word = member_BTW.reshape(batch, length, count // LANES, 1, LANES)
    bit = jnp.arange(BITS, dtype=jnp.uint32)[None, None, None, :, None]
    mask = ((word >> bit) & 1).astype(bool)
    return mask.reshape(batch, length, count * BITS)[:, :, :entries]


def from_indices(chosen_BTK: Int[Array, "b t k"], entries: int) -> UInt32[Array, "b t w"]:
    """The packed mask of distinct chosen entries, -1 standing for none."""
    batch, length, _ = chosen_BTK.shape
    b, t = jnp.arange(batch)[:, None, None], jnp.arange(length)[None, :, None]
    group, rest = chosen_BTK // GROUP, chosen_BTK % GROUP
    # Distinct entries are distinct bits, so adding them is setting them. -1 goes past the end.
    index = jnp.where(chosen_BTK < 0, words(entries), group * LANES + rest % LANES)
    bit = jnp.uint32(1) << (rest // LANES).astype(jnp.uint32)
    zero = jnp.zeros((batch, length, words(entries)), jnp.uint32)
    return zero.at[b, t, index].add(bit, mode="drop")


def to_indices(member_BTW: UInt32[Array, "b t w"], topk: int, entries: int) -> Int[Array, "b t k"]:
    """The first `topk` chosen of so many entries, of each query, ascending; -1 after the last."""
    return indices_of(unpack(member_BTW, entries), topk)


def indices_of(mask_BTC: Bool[Array, "b t c"], topk: int) -> Int[Array, "b t k"]:
    """The same of a mask that is not packed."""
    batch, length, entries = mask_BTC.shape
    # Words of 32 neighbouring entries: a search over their counts, then bits of the one found.
    mask = jnp.pad(mask_BTC, ((0, 0), (0, 0), (0, -entries % BITS)))
    mask = mask.reshape(batch * length, -1, BITS).astype(jnp.uint32)
    bit = jnp.arange(BITS, dtype=jnp.uint32)[None, None]
    word = jnp.sum(mask << bit, axis=-1, dtype=jnp.uint32)
    count = jax.lax.population_count(word).astype(jnp.int32)
    chosen = jax.vmap(functools.partial(_indices_of_row, topk=topk))(word, count)
    return chosen.reshape(batch, length, topk)


def _indices_of_row(word_R, count_R, topk):
    end = jnp.cumsum(count_R)
    slot = jnp.arange(1, topk + 1, dtype=jnp.int32)
    at = jnp.searchsorted(end, slot, side="left", method="scan_unrolled")
    at = jnp.minimum(at, end.shape[0] - 1)
    entry = BITS * at.astype(jnp.int32) + _nth_bit(word_R[at], slot - (end - count_R)[at])
    return jnp.where(slot <= end[-1], entry, -1)


def _nth_bit(word, n):
    """Where the n-th set bit is, counted from 1 and from the lowest."""
    where = jnp.zeros_like(n)
    for half in (16, 8, 4, 2, 1):
        low = word & ((1 << half) - 1)
        count = jax.lax.population_count(low).astype(n.dtype)
        higher = n > count
        word = jnp.where(higher, word >> half, low)
        n = jnp.where(higher, n - count, n)
        where = jnp.where(higher, where + half, where)
    return where
