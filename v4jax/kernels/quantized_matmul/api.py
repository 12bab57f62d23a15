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
      equation: contracts the last axis of both and keeps w's other axes last, "btd,fd->btf"; a
        leading axis of w may be shared with x ("btgd,god->btgo"), and is then not cut.
      x: activations; w is expanded to their dtype.
      w: stored weight of logical shape [..., out, in].

    Returns:
      float32, accumulated in float32.
    """
    left, right = equation.split("->")[0].split(",")
    batched = len(right) > 2 or right[0] in left
    blocks = 1 if batched else _row_blocks(w.shape)
    if blocks == 1:
        expanded = w.dequantize(x.dtype)
        return jnp.einsum(equation, x, expanded, preferred_element_type=jnp.float32)
    cut = jax.tree.map(lambda leaf: leaf.reshape(blocks, -1, *leaf.shape[1:]), w)

    def rows(block):
        return jnp.einsum(
            equation, x, block.dequantize(x.dtype), preferred_element_type=jnp.float32
        )

    parts = jax.lax.map(rows, cut)  # [blocks, ..., out/blocks]
    parts = jnp.moveaxis(parts, 0, -2)
    return parts.reshape(*parts.shape[:-2], -1)


def _row_blocks(shape):
    """The fewest equal cuts of the output rows, at multiples of 128, under BLOCK_ELEMENTS."""
    out, features = shape
    wanted = -(-out * features // BLOCK_ELEMENTS)
    for blocks in range(wanted, out // 128 + 1):
        if out % (blocks * 128) == 0:
            return blocks
    return 1
