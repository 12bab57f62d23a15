"""One expert, and every expert on every row with the foreign rows masked. For tests."""

import functools

import jax
import jax.numpy as jnp

from v4jax import quant
from v4jax.kernels.quantized_matmul import api as quantized_matmul
from v4jax.ops import derivatives, products


def matmul(x, w, rounding, implementation=None):
    """x [X, in] times w [out, in], rounded once to the activations' dtype (section 10)."""
    dtype = jnp.float32 if rounding.native else rounding.dtype
    if rounding.native:
        x = quant.fake_quant_e4m3(x, 128)
    if isinstance(w, quant.QTensor):
        y = quantized_matmul.einsum("xd,fd->xf", x.astype(dtype), w)
    elif x.dtype == w.dtype == dtype == "float32":
        y = derivatives.of(products.by_rows, implementation)(x, w)
    else:
        y = jnp.einsum(
            "xd,fd->xf", x.astype(dtype), w.astype(dtype), preferred_element_type=jnp.float32
        )
    return quant.round_to(y, rounding.dtype)


def swiglu(a, b, gate, limit):
    """gate * silu(min(a, limit)) * clip(b, -limit, limit) in float32."""
    a = jnp.minimum(a.astype(jnp.float32), limit)
    z = jax.nn.silu(a) * jnp.clip(b.astype(jnp.float32), -limit, limit)
    return z if gate is None else z * gate[:, None]


def gated_ffn(x, gate, weights, limit, rounding, implementation=None):
    """w2 @ swiglu(w1 x, w3 x) for rows x [X, D]; gate [X] or None."""
    w1, w2, w3 = weights
    times = functools.partial(matmul, rounding=rounding, implementation=implementation)
    z = swiglu(times(x, w1), times(x, w3), gate, limit)
    return times(quant.round_to(z, rounding.dtype), w2)


def expert_ffn(x_XD, gate_X, group_sizes_E, weights, limit, rounding):
    """See api.expert_ffn."""
    end = jnp.cumsum(group_sizes_E)
    row = jnp.arange(x_XD.shape[0])
    out = jnp.zeros(x_XD.shape, rounding.dtype)
    for e in range(group_sizes_E.shape[0]):
        own = (row >= end[e] - group_sizes_E[e]) & (row < end[e])
        expert = jax.tree.map(lambda w, e=e: w[e], weights)
        y = gated_ffn(x_XD, gate_X, expert, limit, rounding, "reference")
        out = jnp.where(own[:, None], y, out)
    return out
