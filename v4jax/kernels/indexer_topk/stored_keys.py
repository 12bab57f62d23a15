"""Index keys as the official kernels store them: E2M1 codes with one E8M0 scale per 32 channels.

68 bytes per key (architecture section 11), in 32-bit words and with keys along the last axis:
kernels then find a register's worth of keys side by side, and no lane is wasted. Counted from the
lowest, nibble i of word j of `codes` is channel 16 i + j, and byte g of `scales` belongs to
channels 32 g to 32 g + 31.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32, Inexact, Int

from v4jax import quant
from v4jax.reprs import short_repr

WIDTH, GROUP = 128, 32
NIBBLES = 8
WORDS = WIDTH // NIBBLES


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class StoredKeys:
    """Index keys [B,C,128] in words.

    Attributes:
      codes: int32 [B, 16, C].
      scales: int32 [B, 1, C].
    """

    codes: Any
    scales: Any

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the keys that these stand for."""
        return (self.codes.shape[0], self.codes.shape[2], WIDTH)

    def __repr__(self) -> str:
        return short_repr(self)


@functools.partial(jax.jit, inline=True)
def pack(keys_BCZ: Inexact[Array, "b c z"]) -> StoredKeys:
    """Finite keys in their stored form: exact where native numerics has rounded them already.

    Raises:
      NotImplementedError: for another width than 128.
    """
    if keys_BCZ.shape[2] != WIDTH:
        raise NotImplementedError(
            f"index keys are {keys_BCZ.shape[2]} channels wide (z); stored keys have {WIDTH}"
        )
    return of_bytes(quant.quantize_fp4(keys_BCZ))


def of_bytes(q: quant.QTensor) -> StoredKeys:
    """From 64 bytes of codes, low nibble first, and 4 scale bytes per key: the words hold the same.

    Args:
      q: values uint8 [B, C, 64] and scales uint8 [B, C, 4].
    """
    batch, count, _ = q.values.shape
    pairs = q.values.astype(jnp.int32)
    codes = jnp.stack([pairs & 15, pairs >> 4], axis=-1).reshape(batch, count, NIBBLES, WORDS)
    codes = sum(codes[:, :, i] << (4 * i) for i in range(NIBBLES))
    scales = q.scales.astype(jnp.int32)
    scales = sum(scales[..., g] << (8 * g) for g in range(WIDTH // GROUP))
    return StoredKeys(jnp.swapaxes(codes, 1, 2), scales[:, None])


@functools.partial(jax.jit, inline=True)
def write(
    stored: StoredKeys, keys_BEZ: Inexact[Array, "b e z"], index_BE: Int[Array, "b e"]
) -> StoredKeys:
    """The list with new keys at distinct places; a place past the end, or -1, drops its key."""
    new = pack(keys_BEZ)
    index = jnp.where(index_BE < 0, stored.codes.shape[2], index_BE)[:, None]
    batch = jnp.arange(index.shape[0])[:, None, None]

    def put(words, new):
        row = jnp.arange(words.shape[1])[None, :, None]
        return words.at[batch, row, index].set(new, mode="drop")

    return jax.tree.map(put, stored, new)


def pad(stored: StoredKeys, multiple: int) -> StoredKeys:
    """With so many more keys that their number is a multiple."""
    missing = -stored.codes.shape[2] % multiple
    return jax.tree.map(lambda x: jnp.pad(x, ((0, 0), (0, 0), (0, missing))), stored)


def block(stored: StoredKeys, begin, size: int) -> Float32[Array, "b c z"]:
    """Keys [B, size, 128] from `begin` on."""
    return unpack(
        jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, begin, size, axis=2), stored)
    )


@functools.partial(jax.jit, inline=True)
def unpack(stored: StoredKeys) -> Float32[Array, "b c z"]:
    """The keys as float32."""
    parts = [
        e2m1(nibble(stored.codes, i)) * exp2(scale_of(stored.scales, i)) for i in range(NIBBLES)
    ]
    return jnp.swapaxes(jnp.concatenate(parts, axis=1), 1, 2)


# What follows works inside every kernel too: int32 arithmetic, no division.


def nibble(words, i):
    """Nibble i of every word."""
    return (words >> (4 * i)) & 15


def scale_of(words, i):
    """The scale of nibble i: that of channels 16 i to 16 i + 15."""
    return (words >> (8 * (i >> 1))) & 255


def exp2(code):
    """float32 2^(code - 127) of an E8M0 code between 1 and 254."""
    return jax.lax.bitcast_convert_type(code << 23, jnp.float32)


def e2m1(code):
    """float32 of an E2M1 code."""
    magnitude = code & 7
    # Codes 2 to 7 are exponent and mantissa bit in place; 0 and 1 stand for 0 and a half.
    bits = jnp.where(magnitude < 2, magnitude * (126 << 23), (magnitude << 22) + (126 << 23))
    value = jax.lax.bitcast_convert_type(bits, jnp.float32)
    return jnp.where(code >= 8, -value, value)
