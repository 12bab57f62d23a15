"""Entries as a cache keeps them: the official kernels' bytes, for rows of any width.

E4M3 channels with a scale per 64 of them, then rope channels in bf16 (architecture section 11), in
32-bit words. Bytes count from the lowest. With W channels, R of them rope:

`words`, W / 4 per entry: byte i of word j belongs to channel W / 4 i + j. It is an E4M3 code below
channel W - R, and above the high byte of the bf16.

`low`, R / 4 per entry: byte i of word j is the low byte of rope channel R / 4 i + j. `scales`: byte
g % 4 of word g // 4 is the E8M0 scale of group g. Both lie in `lane_blocks`.

Of W = 512 and R = 64 that is 584 bytes per entry; `stored.StoredRows` are the same bytes as TPU and
GPU kernels fetch them, in 640.
"""

import dataclasses
from typing import Any

import einops
import jax
import jax.numpy as jnp
from jaxtyping import Array, BFloat16, Float32, Inexact, Int

from v4jax.kernels import lane_blocks
from v4jax.kernels.sparse_attention import stored
from v4jax.kernels.sparse_attention.stored import GROUP, StoredRows
from v4jax.reprs import short_repr


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class CompactRows:
    """Entries [...,C,W] in words.

    Attributes:
      words: int32 [...,C,ceil(W/4)].
      low: int32 [...,N,ceil(R/4),C/N].
      scales: int32 [...,N,S,C/N], S a word per four groups.
      width, rope: W and R.
    """

    words: Any
    low: Any
    scales: Any
    width: int = dataclasses.field(metadata={"static": True})
    rope: int = dataclasses.field(metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the rows that these stand for."""
        return (*self.words.shape[:-1], self.width)

    @property
    def ndim(self) -> int:
        return len(self.words.shape)

    def __repr__(self) -> str:
        return short_repr(self)


def empty(
    lead: tuple[int, ...], count: int, width: int, rope: int, block: int | None = None
) -> CompactRows:
    """`count` entries of zeros for each index of the leading axes, in blocks (one, if left out)."""
    words = jnp.zeros((*lead, count, -(-width // 4)), jnp.int32)
    low = lane_blocks.empty(lead, count, -(-rope // 4), block or count)
    groups = -(-(width - rope) // GROUP)
    scales = lane_blocks.empty(lead, count, -(-groups // 4), block or count)
    return CompactRows(words, low, scales, width, rope)


def pack(rows: Inexact[Array, "... c w"], rope: int) -> CompactRows:
    """Rows that native numerics has rounded, in their stored form: exact."""
    width, kept = rows.shape[-1], rows.shape[-1] - rope
    grouped = rows[..., :kept].astype(jnp.float32)
    grouped = _padded(grouped, GROUP).reshape(*rows.shape[:-1], -1, GROUP)
    scale = stored.scale_byte(jnp.max(jnp.abs(grouped), axis=-1))
    # On the grid of E4M3 already, so that no backend's cast rounds.
    codes = (grouped * stored.exp2(254 - scale)[..., None]).astype(jnp.float8_e4m3fn)
    codes = jax.lax.bitcast_convert_type(codes, jnp.uint8).astype(jnp.int32)
    codes = codes.reshape(*rows.shape[:-1], -1)[..., :kept]
    bf16 = jax.lax.bitcast_convert_type(rows[..., kept:].astype(jnp.bfloat16), jnp.uint16)
    bf16 = bf16.astype(jnp.int32)
    scales = einops.rearrange(_padded(scale, 4), "... (s four) -> ... four s", four=4)
    return CompactRows(
        words=_planes_joined(jnp.concatenate([codes, bf16 >> 8], axis=-1)),
        low=lane_blocks.of_rows(_planes_joined(bf16 & 255)),
        scales=lane_blocks.of_rows(_bytes_joined(scales)),
        width=width,
        rope=rope,
    )


def unpack(rows: CompactRows) -> BFloat16[Array, "... c w"]:
    """The rows, all of them, exactly."""
    low, scales = map(lane_blocks.as_rows, (rows.low, rows.scales))
    return _expand(rows, rows.words, low, scales).astype(jnp.bfloat16)


def take(rows: CompactRows, index: Int[Array, "b ..."]) -> Float32[Array, "b ... w"]:
    """Rows [B,...,W] of a list [B,C,W] at index [B,...]."""
    batch = jnp.arange(index.shape[0], dtype=jnp.int32).reshape(-1, *(1 for _ in index.shape[1:]))
    low, scales = (lane_blocks.take(x, index) for x in (rows.low, rows.scales))
    return _expand(rows, rows.words[batch, index], low, scales)


def block(rows: CompactRows, begin: Int[Array, ""] | int, size: int) -> Float32[Array, "b k w"]:
    """Rows [B,size,W] of a list [B,C,W] from `begin` on; in blocks, whole ones."""
    words = jax.lax.dynamic_slice_in_dim(rows.words, begin, size, axis=1)
    parts = (lane_blocks.cut(x, begin, size) for x in (rows.low, rows.scales))
    return _expand(rows, words, *map(lane_blocks.as_rows, parts))


def pad(rows: CompactRows, multiple: int) -> CompactRows:
    """A list [B,C,W] with so many more entries of zeros that their number is a multiple."""
    missing = -rows.shape[1] % multiple
    if not missing:
        return rows
    words = jnp.pad(rows.words, ((0, 0), (0, missing), (0, 0)))
    low, scales = (lane_blocks.pad(x, missing) for x in (rows.low, rows.scales))
    return dataclasses.replace(rows, words=words, low=low, scales=scales)


def for_kernels(rows: CompactRows) -> StoredRows | BFloat16[Array, "b c w"]:
    """A list [B,C,W] as TPU and GPU kernels take it: `StoredRows`, or rows of another width."""
    if (rows.width, rows.rope) != (stored.WIDTH, stored.ROPE):
        return unpack(rows)
    tails = lane_blocks.as_rows(jnp.concatenate([rows.low, rows.scales], axis=2))
    return stored.of_words(rows.words, tails)


def _expand(like, words, low, scales):
    """float32 [...,W] of words, low bytes and scales of an entry, each along the last axis."""
    kept = like.width - like.rope
    codes = _planes(words, like.width)
    groups = einops.rearrange(_bytes(scales), "... four s -> ... (s four)")
    groups = stored.exp2(groups[..., : -(-kept // GROUP)])
    scale = jnp.repeat(groups, GROUP, axis=-1)[..., :kept]
    rope = stored.bf16_of(codes[..., kept:], _planes(low, like.rope))
    return jnp.concatenate([stored.e4m3(codes[..., :kept]) * scale, rope], axis=-1)


def _padded(x, multiple):
    """x with zeros behind its last axis."""
    missing = -x.shape[-1] % multiple
    return jnp.pad(x, [*((0, 0) for _ in x.shape[:-1]), (0, missing)]) if missing else x


def _planes_joined(x):
    """Bytes [...,n] to words [...,ceil(n/4)]: byte i of word j is number ceil(n/4) i + j."""
    x = _padded(x, 4)
    return _bytes_joined(x.reshape(*x.shape[:-1], 4, -1))


def _bytes_joined(x):
    """Bytes [...,4,J] to words [...,J], the first the lowest."""
    return sum(x[..., i, :] << (8 * i) for i in range(4))


def _planes(words, count):
    """What `_planes_joined` joined, of so many bytes."""
    x = _bytes(words)
    return x.reshape(*words.shape[:-1], -1)[..., :count]


def _bytes(words):
    """Words [...,J] to bytes [...,4,J]."""
    shift = 8 * jnp.arange(4, dtype=jnp.int32).reshape(*(1 for _ in words.shape[:-1]), 4, 1)
    return (words[..., None, :] >> shift) & 255
