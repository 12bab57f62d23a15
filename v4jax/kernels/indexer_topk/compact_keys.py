"""Index keys as a cache keeps them: E2M1 codes and E8M0 scales, for keys of any width.

`stored_keys.StoredKeys` at any width Z: nibble i of word j of `codes` is channel Z / 8 i + j, byte
g % 4 of word g // 4 of `scales` belongs to channels 32 g to 32 g + 31. Both lie in `lane_blocks`.
Of Z = 128 that is 68 bytes per key, and the words are those of `StoredKeys`.
"""

import dataclasses
from typing import Any

import einops
import jax
import jax.numpy as jnp
from jaxtyping import Array, BFloat16, Float32, Inexact, Int

from v4jax import quant
from v4jax.kernels import lane_blocks
from v4jax.kernels.indexer_topk import stored_keys
from v4jax.kernels.indexer_topk.stored_keys import GROUP, NIBBLES, StoredKeys
from v4jax.reprs import short_repr


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class CompactKeys:
    """Index keys [...,C,Z] in words.

    Attributes:
      codes: int32 [...,N,ceil(Z/8),C/N].
      scales: int32 [...,N,S,C/N], S a word per four groups.
      width: Z.
    """

    codes: Any
    scales: Any
    width: int = dataclasses.field(metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the keys that these stand for."""
        *lead, blocks, _, size = self.codes.shape
        return (*lead, blocks * size, self.width)

    @property
    def ndim(self) -> int:
        return len(self.shape)

    def __repr__(self) -> str:
        return short_repr(self)


def empty(lead: tuple[int, ...], count: int, width: int, block: int | None = None) -> CompactKeys:
    """`count` keys of zeros for each index of the leading axes, in blocks (one, if left out)."""
    codes = lane_blocks.empty(lead, count, -(-width // NIBBLES), block or count)
    scales = lane_blocks.empty(lead, count, -(-width // (4 * GROUP)), block or count)
    return CompactKeys(codes, scales, width)


def pack(keys: Inexact[Array, "... c z"]) -> CompactKeys:
    """Keys that native numerics has rounded, in their stored form: exact."""
    width = keys.shape[-1]
    q = quant.quantize_fp4(_padded(keys, GROUP))
    pairs = q.values.astype(jnp.int32)
    codes = jnp.stack([pairs & 15, pairs >> 4], axis=-1).reshape(*keys.shape[:-1], -1)
    codes = _padded(codes[..., :width], NIBBLES)
    codes = codes.reshape(*keys.shape[:-1], NIBBLES, -1)
    codes = sum(codes[..., i, :] << (4 * i) for i in range(NIBBLES))
    scales = _padded(q.scales.astype(jnp.int32), 4).reshape(*keys.shape[:-1], -1, 4)
    scales = sum(scales[..., g] << (8 * g) for g in range(4))
    return CompactKeys(lane_blocks.of_rows(codes), lane_blocks.of_rows(scales), width)


def unpack(keys: CompactKeys) -> BFloat16[Array, "... c z"]:
    """The keys, all of them, exactly."""
    return _expand(keys, *map(lane_blocks.as_rows, (keys.codes, keys.scales))).astype(jnp.bfloat16)


def take(keys: CompactKeys, index: Int[Array, "b ..."]) -> Float32[Array, "b ... z"]:
    """Keys [B,...,Z] of a list [B,C,Z] at index [B,...]."""
    return _expand(keys, *(lane_blocks.take(x, index) for x in (keys.codes, keys.scales)))


def block(keys: CompactKeys, begin: Int[Array, ""] | int, size: int) -> Float32[Array, "b k z"]:
    """Keys [B,size,Z] of a list [B,C,Z] from `begin` on; in blocks, whole ones."""
    parts = (lane_blocks.cut(x, begin, size) for x in (keys.codes, keys.scales))
    return _expand(keys, *map(lane_blocks.as_rows, parts))


def pad(keys: CompactKeys, multiple: int) -> CompactKeys:
    """A list [B,C,Z] with so many more keys that their number is a multiple."""
    missing = -keys.shape[1] % multiple
    return jax.tree.map(lambda x: lane_blocks.pad(x, missing), keys) if missing else keys


def for_kernels(keys: CompactKeys) -> StoredKeys | BFloat16[Array, "b c z"]:
    """A list [B,C,Z] as TPU and GPU kernels take it: `StoredKeys`, or keys of another width."""
    if keys.width != stored_keys.WIDTH:
        return unpack(keys)
    return StoredKeys(*map(lane_blocks.as_lines, (keys.codes, keys.scales)))


def _expand(like, codes, scales):
    """float32 [...,Z] of the words of a key, both along the last axis."""
    lead = (1,) * (codes.ndim - 1)
    shift = 4 * jnp.arange(NIBBLES, dtype=jnp.int32).reshape(*lead, NIBBLES, 1)
    nibbles = ((codes[..., None, :] >> shift) & 15).reshape(*codes.shape[:-1], -1)
    shift = 8 * jnp.arange(4, dtype=jnp.int32).reshape(*lead, 1, 4)
    groups = (scales[..., None] >> shift) & 255
    groups = einops.rearrange(groups, "... s four -> ... (s four)")
    groups = stored_keys.exp2(groups[..., : -(-like.width // GROUP)])
    scale = jnp.repeat(groups, GROUP, axis=-1)[..., : like.width]
    return stored_keys.e2m1(nibbles[..., : like.width]) * scale


def _padded(x, multiple):
    """x with zeros behind its last axis."""
    missing = -x.shape[-1] % multiple
    return jnp.pad(x, [*((0, 0) for _ in x.shape[:-1]), (0, missing)]) if missing else x
