"""Activations times a matrix that stays in its stored FP8 or FP4 form."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from v4jax import quant

# Rows of the weight expanded at a time: 2,048 x 4,096 in float32 are 32 MiB, whatever the layer.
BLOCK_ELEMENTS = 2048 * 4096


def einsum(equation: str, x: Array, w: quant.QTensor) -> Float[Array, "..."]:
    """The einsum of x with w, w expanded a block of output rows at a time.

    Args:
      equation: contracts the last axis of both and keeps w's rows last, "btd,fd->btf"; a first
        axis of w may be shared with x ("btgd,god->btgo": groups, taken one at a time).
      x: activations; w is expanded to their dtype.
      w: stored weight of logical shape [..., out, in].

    Returns:
      float32, accumulated in float32.
    """
    left, right = equation.split("->")[0].split(",")
    if right[0] in left:
        return _grouped(equation, x, w, left.index(right[0]))
    blocks = _row_blocks(w.shape)
    if blocks == 1:
        return _expanded(equation, x, w)
    cut = jax.tree.map(lambda leaf: leaf.reshape(blocks, -1, *leaf.shape[1:]), w)
    parts = jax.lax.map(lambda block: _expanded(equation, x, block), cut)
    parts = jnp.moveaxis(parts, 0, -2)  # [..., blocks, out/blocks]
    return parts.reshape(*parts.shape[:-2], -1)


def _expanded(equation, x, w):
    return jnp.einsum(equation, x, w.dequantize(x.dtype), preferred_element_type=jnp.float32)


def _grouped(equation, x, w, axis):
    """One group of w, and its slice of x, at a time; the group stands at `axis` of x and result."""
    letter = equation.split("->")[0].split(",")[1][0]
    single = equation.replace(letter, "")
    parts = jax.lax.map(lambda pair: _expanded(single, *pair), (jnp.moveaxis(x, axis, 0), w))
    return jnp.moveaxis(parts, 0, axis)


def _row_blocks(shape):
    """The fewest equal cuts of the output rows, at multiples of 128, under BLOCK_ELEMENTS."""
    out, features = shape
    wanted = -(-out * features // BLOCK_ELEMENTS)
    for blocks in range(wanted, out // 128 + 1):
        if out % (blocks * 128) == 0:
            return blocks
    return 1
