"""A softmax over one axis and the weighted sum over it, channel by channel.

    y[x] = sum_p softmax_p(gate[p, x]) c[p, x]

Both directions are elementwise: written out for the short spans of a compressor, and with a
gradient by hand, since the derivative term by term would sum a term of each token per element.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


@jax.custom_vjp
def softmax_sum(
    c_BEPX: Float[Array, "b e p x"], gate_BEPX: Float[Array, "b e p x"]
) -> Float[Array, "b e x"]:
    """sum_p softmax_p(gate) c, channel by channel; a gate may be -inf where c is finite.

    A short span is written out, term by term: XLA:CPU takes ten times longer over a reduction along
    a middle axis.
    """
    return _softmax_sum_forward(c_BEPX, gate_BEPX)[0]


def _softmax_sum_forward(c, gate):
    span = gate.shape[2]
    if span > 16:
        top = gate.max(2)
        weights = jnp.exp(gate - top[:, :, None])
        total = weights.sum(2)
        y = (weights * c).sum(2) / total
    else:
        gates = [gate[:, :, i] for i in range(span)]
        top = functools.reduce(jnp.maximum, gates)
        weights = [jnp.exp(g - top) for g in gates]
        total = sum(weights)
        y = sum(w * c[:, :, i] for i, w in enumerate(weights)) / total
    return y, (c, gate, top, total, y)


def _softmax_sum_backward(saved, dy):
    """Elementwise. Differentiated term by term, every element would sum a term of each token."""
    c, gate, *of_entry = saved
    top, total, y, dy = (x[:, :, None] for x in (*of_entry, dy))
    dc = jnp.exp(gate - top) / total * dy
    return dc, dc * (c - y)


softmax_sum.defvjp(_softmax_sum_forward, _softmax_sum_backward)
