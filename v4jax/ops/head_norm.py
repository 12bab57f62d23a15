"""The norm of each query head, without a weight, and the rotation after it.

    y = rope(round(q / sqrt(mean(q^2) + eps)))

`norm_and_rope` has a gradient of its own, made from its result, which the core attention keeps
anyway: q itself is not kept. `native_norm` is the chain of bf16 tensors of the released code.
"""

import functools

import jax
import jax.numpy as jnp

from v4jax import quant
from v4jax.ops import products
from v4jax.ops.rms_norm import inverse_rms
from v4jax.ops.rope import rotate, rotated


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def norm_and_rope(eps, dtype, q_BTNH, cos, sin):
    """Each head's q / rms(q), rounded, rotated by the angles and rounded again."""
    return _norm_and_rope_forward(eps, dtype, q_BTNH, cos, sin)[0]


def _norm_and_rope_forward(eps, dtype, q_BTNH, cos, sin):
    normed, scale_BTN = head_norm(eps, dtype, quant.keep_in_bf16(q_BTNH))
    out = rotate(normed, cos, sin, dtype)
    return out, (out, scale_BTN, cos, sin)


def head_norm(eps, dtype, q_BTNH):
    """Each head's q / rms(q), rounded, and 1 / rms(q)."""
    scale_BTN = inverse_rms(q_BTNH, eps)
    return quant.round_to(q_BTNH.astype(jnp.float32) * scale_BTN[..., None], dtype), scale_BTN


def _norm_and_rope_backward(eps, dtype, saved, g_BTNH):
    """From the result, which the core attention keeps anyway, so that q itself is not kept.

    A rotation changes no product of two rows, so what the norm removes, the gradient's part along
    the normed row, is found before the rotation back; it is taken out after it, since the arrays at
    hand can be shifted as they are stored.
    """
    out, scale_BTN, cos, sin = saved
    g, out = quant.keep_in_bf16(g_BTNH), quant.keep_in_bf16(out)
    along_BTN = products.over_channels(g, out) / g.shape[-1]
    across = rotated(g, cos, -sin) - along_BTN[..., None] * rotated(out, cos, -sin)
    return quant.round_to(across * scale_BTN[..., None], dtype), None, None


norm_and_rope.defvjp(_norm_and_rope_forward, _norm_and_rope_backward)


def native_norm(q, eps):
    """The per-head norm as a chain of bf16 tensors (section 10, point 2)."""
    dtype, q = q.dtype, q.astype(jnp.float32)

    def rounded(x):
        return quant.round_to(x, dtype).astype(jnp.float32)

    mean = rounded(jnp.mean(rounded(q * q), axis=-1, keepdims=True))
    inverse = rounded(1 / jnp.sqrt(rounded(mean + eps)))
    return quant.round_to(q * inverse, dtype)
