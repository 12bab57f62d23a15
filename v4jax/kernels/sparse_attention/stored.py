"""Entries as the official kernels store them: E4M3 channels with scales, bf16 rope channels.

One entry of 512 channels (architecture section 11) in two rows of 32-bit words that a TPU's DMA can
address and that waste no lane. Bytes count from the lowest.

`words`, 128 per entry: byte i of word j belongs to channel 128 i + j. It is an E4M3 code below
channel 448, and above the high byte of the bf16.

`tails`, 32 words per entry: byte i of word j < 16 is the low byte of rope channel 16 i + j; words
16 and 17 hold the E8M0 scales of the seven groups of 64 channels; the others are zero. Entry
128 s + 32 k + r has words 32 k to 32 k + 31 of row 32 s + r, so that a tile of entries finds its
tails by whole rows and whole quarters of rows.

That is 640 bytes per entry versus 1,024 in bf16; 56 of them are those zeros.
"""

import dataclasses
import functools
from typing import Any

import einops
import jax
import jax.numpy as jnp
from jaxtyping import Array, Inexact, Int

from v4jax import quant
from v4jax.reprs import short_repr

WIDTH, ROPE, GROUP = 512, 64, 64
KEPT = WIDTH - ROPE
LANES = 128
PLANES = WIDTH // LANES
TAIL = 32
# Where the scales begin in a tail.
SCALES = ROPE // 4
# Entries whose tails lie in the same TAIL rows.
SET = PLANES * TAIL  # 128: `tail_row` shifts by its 7 bits, `quarter` by TAIL's 5


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class StoredRows:
    """Entries [B,C,512] in words.

    Attributes:
      words: int32 [B, C, 128].
      tails: int32 [B, 32 ceil(C / 128), 128].
    """

    words: Any
    tails: Any

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the rows that these stand for."""
        return (*self.words.shape[:-1], WIDTH)

    @property
    def ndim(self) -> int:
        return len(self.words.shape)

    def __repr__(self) -> str:
        return short_repr(self)


@functools.partial(jax.jit, inline=True)
def pack(rows_BCH: Inexact[Array, "b c h"]) -> StoredRows:
    """Finite rows in their stored form: exact where native numerics has rounded them already.

    Raises:
      NotImplementedError: for another width than 512.
    """
    if rows_BCH.shape[2] != WIDTH:
        raise NotImplementedError(
            f"rows are {rows_BCH.shape[2]} channels wide (h); stored rows have {WIDTH}"
        )
    return of_words(*_pack(rows_BCH))


def of_words(words: Int[Array, "b c 128"], tails: Int[Array, "b c w"]) -> StoredRows:
    """From the words of each entry and those of its tail, of which zeros may be left out."""
    missing = (-words.shape[1] % SET, TAIL - tails.shape[2])
    tails = jnp.pad(tails, ((0, 0), *((0, count) for count in missing)))
    tails = einops.rearrange(tails, "b (s k r) w -> b (s r) (k w)", k=PLANES, r=TAIL)
    return StoredRows(words, tails)


@functools.partial(jax.jit, inline=True)
def write(
    stored: StoredRows, rows_BEH: Inexact[Array, "b e h"], index_BE: Int[Array, "b e"]
) -> StoredRows:
    """The list with new rows at distinct places; a place past the end, or -1, drops its row."""
    words, tails = _pack(rows_BEH)
    entries = stored.words.shape[1]
    index = jnp.where(index_BE < 0, entries, index_BE)
    batch = jnp.arange(index.shape[0], dtype=jnp.int32)[:, None]
    row = jnp.where(index < entries, tail_row(index), stored.tails.shape[1])
    column = TAIL * quarter(index)[..., None] + jnp.arange(TAIL, dtype=jnp.int32)[None, None]
    return StoredRows(
        stored.words.at[batch, index].set(words, mode="drop"),
        stored.tails.at[batch[..., None], row[..., None], column].set(tails, mode="drop"),
    )


def _pack(rows_BCH):
    """words [B,C,128] and tails [B,C,32]."""
    batch, count, _ = rows_BCH.shape
    kept = quant.fake_quant_e4m3(rows_BCH[..., :KEPT], GROUP).astype(jnp.float32)
    kept = kept.reshape(batch, count, -1, GROUP)
    scale = scale_byte(jnp.max(jnp.abs(kept), axis=-1))
    # On the grid of E4M3 already, so that no backend's cast rounds.
    codes = (kept * exp2(254 - scale)[..., None]).astype(jnp.float8_e4m3fn)
    codes = jax.lax.bitcast_convert_type(codes, jnp.uint8).astype(jnp.int32)
    rope = jax.lax.bitcast_convert_type(rows_BCH[..., KEPT:].astype(jnp.bfloat16), jnp.uint16)
    rope = rope.astype(jnp.int32)
    codes = jnp.concatenate([codes.reshape(batch, count, KEPT), rope >> 8], axis=-1)
    scale = jnp.pad(scale, ((0, 0), (0, 0), (0, 1))).reshape(batch, count, 2, 4)
    scale = _join_bytes(jnp.swapaxes(scale, 2, 3))
    tails = jnp.concatenate([_join_bytes((rope & 255).reshape(batch, count, 4, -1)), scale], -1)
    words = _join_bytes(codes.reshape(batch, count, PLANES, LANES))
    return words, jnp.pad(tails, ((0, 0), (0, 0), (0, TAIL - tails.shape[-1])))


def _join_bytes(x_BCIJ):
    """[B,C,4,J] bytes to words [B,C,J], the first the lowest."""
    return sum(x_BCIJ[:, :, i] << (8 * i) for i in range(4))


@functools.partial(jax.jit, inline=True)
def take(stored: StoredRows, index) -> Array:
    """float32 rows [B, ..., 512] at index [B, ...]."""
    batch = jnp.arange(index.shape[0], dtype=jnp.int32).reshape(-1, *(1 for _ in index.shape[1:]))
    tails = stored.tails.reshape(*stored.tails.shape[:2], PLANES, TAIL)
    return _expand(stored.words[batch, index], tails[batch, tail_row(index), quarter(index)])


def block(stored: StoredRows, begin, size: int) -> Array:
    """float32 rows [B, size, 512] from `begin` on, both multiples of SET."""
    words = jax.lax.dynamic_slice_in_dim(stored.words, begin, size, axis=1)
    rows = size // PLANES
    tails = jax.lax.dynamic_slice_in_dim(stored.tails, begin // PLANES, rows, axis=1)
    tails = einops.rearrange(tails, "b (s r) (k w) -> b (s k r) w", r=TAIL, k=PLANES)
    return _expand(words, tails)


def pad(stored: StoredRows, multiple: int) -> StoredRows:
    """With so many more entries of zeros that their number is a multiple (itself one of SET)."""
    missing = -stored.words.shape[1] % multiple
    rows = (stored.words.shape[1] + missing) // PLANES - stored.tails.shape[1]
    after = ((0, 0), (0, missing), (0, 0)), ((0, 0), (0, rows), (0, 0))
    return StoredRows(jnp.pad(stored.words, after[0]), jnp.pad(stored.tails, after[1]))


@functools.partial(jax.jit, inline=True)
def unpack(stored: StoredRows) -> Inexact[Array, "b c h"]:
    """The rows as float32, all of them."""
    whole = pad(stored, SET)
    return block(whole, 0, whole.words.shape[1])[:, : stored.words.shape[1]]


def _expand(words, tails):
    """[..., 128] and [..., 32] to float32 [..., 512]."""
    codes = jnp.concatenate([byte(words, i) for i in range(PLANES)], axis=-1)
    low = jnp.concatenate([byte(tails[..., :SCALES], i) for i in range(4)], axis=-1)
    scale = [exp2(byte(tails[..., SCALES + g // 4], g % 4)) for g in range(KEPT // GROUP)]
    scale = jnp.repeat(jnp.stack(scale, axis=-1), GROUP, axis=-1)
    rope = bf16_of(codes[..., KEPT:], low)
    return jnp.concatenate([e4m3(codes[..., :KEPT]) * scale, rope], axis=-1)


# What follows works inside every kernel too: int32 arithmetic, no division.


def tail_row(index):
    """The row of `tails` that holds an entry's words."""
    return (index >> 7) * TAIL + (index & (TAIL - 1))


def quarter(index):
    """Which quarter of that row they are."""
    return (index >> 5) & (PLANES - 1)


def scale_byte(amax):
    """E8M0 of 2^ceil(log2(max(amax, 1e-4) / 448)), without a logarithm or a division."""
    amax = jnp.maximum(amax, 1e-4)
    power = jnp.minimum(quant.pow2_ceil(amax), 2.0**127)
    scale = power * jnp.where(amax <= 0.875 * power, 2.0**-9, 2.0**-8)
    return jax.lax.bitcast_convert_type(scale, jnp.int32) >> 23


def byte(words, i):
    """Byte i of every word."""
    return (words >> (8 * i)) & 255


def exp2(code):
    """float32 2^(code - 127) of an E8M0 code between 1 and 254."""
    return jax.lax.bitcast_convert_type(code << 23, jnp.float32)


def bf16_of(high, low):
    """float32 of the two bytes of a bf16."""
    return jax.lax.bitcast_convert_type((high << 24) | (low << 16), jnp.float32)


def e4m3(code):
    """float32 of an E4M3 code."""
    magnitude = code & 127
    normal = jax.lax.bitcast_convert_type((magnitude << 20) + (120 << 23), jnp.float32)
    # Codes below 8 are E4M3's own subnormals, 127 is its NaN.
    value = jnp.where(magnitude < 8, magnitude.astype(jnp.float32) * 2.0**-9, normal)
    value = jnp.where(magnitude == 127, jnp.nan, value)
    return jnp.where(code >= 128, -value, value)
