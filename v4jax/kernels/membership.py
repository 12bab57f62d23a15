"""Which entries a query has chosen, a bit an entry.

Entry e = 4096 g + 128 b + l is bit b of word 128 g + l, so that a kernel unpacks 128 neighbouring
entries from one row of 128 words with a shift. Words are uint32; a mask of C entries has
128 * ceil(C / 4096) of them, and bits past C are zero.
"""

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


def to_indices(member_BTW: UInt32[Array, "b t w"], topk: int) -> Int[Array, "b t k"]:
    """The first `topk` chosen entries of each query, ascending, -1 after the last."""
    batch, length, count = member_BTW.shape
    groups = count // LANES
    # A row of 128 entries (one bit of 128 words) at a time: rows in the order of the entries.
    bit = jnp.arange(BITS, dtype=jnp.uint32)[None, None, None, :, None]
    rows = (member_BTW.reshape(batch, length, groups, 1, LANES) >> bit) & 1
    rows = rows.reshape(batch * length, groups * BITS, LANES).astype(jnp.int32)
    ends = jnp.cumsum(rows.sum(-1), axis=-1)

    def one(rows_RL, end_R):
        slot = jnp.arange(1, topk + 1)
        row = jnp.searchsorted(end_R, slot, side="left", method="scan_unrolled")
        row = jnp.minimum(row, end_R.shape[0] - 1)
        within = jnp.cumsum(rows_RL, axis=-1)[row]  # [K, LANES]
        wanted = slot - (end_R[row] - rows_RL.sum(-1)[row])
        lane = jnp.sum(within < wanted[:, None], axis=-1)
        return jnp.where(slot <= end_R[-1], LANES * row + lane, -1)

    chosen = jax.vmap(one)(rows, ends)
    return chosen.reshape(batch, length, topk).astype(jnp.int32)
