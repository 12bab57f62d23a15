"""The clamped SwiGLU and its gradient, elementwise, for kernels and plain XLA alike."""

import jax
import jax.numpy as jnp


def forward(a, b, gate, limit):
    """gate * silu(min(a, limit)) * clip(b, -limit, limit); all float32 and of one shape but gate.

    Args:
      gate: broadcastable in every kernel that calls this: [rows, 1] or of a's shape.
    """
    a = jnp.minimum(a, limit)
    return a * jax.nn.sigmoid(a) * jnp.clip(b, -limit, limit) * jnp.broadcast_to(gate, a.shape)


def backward(a, b, gate, dz, limit):
    """(z, dz/dgate of each element, da, db): what `forward` gave and its gradients."""
    gate = jnp.broadcast_to(gate, a.shape)
    bounded = jnp.minimum(a, limit)
    sigmoid = jax.nn.sigmoid(bounded)
    silu = bounded * sigmoid
    clipped = jnp.clip(b, -limit, limit)
    slope = sigmoid * (1 + bounded * (1 - sigmoid))
    dz_gate = dz * gate
    da = dz_gate * clipped * slope * _passes(a, limit)
    db = dz_gate * silu * _passes(jnp.abs(b), limit)
    return silu * clipped * gate, dz * silu * clipped, da, db


def _passes(x, limit):
    """1 below the clamp, 0 above, and a half on it, as `jnp.minimum` shares a tie."""
    below, at_most = x < limit, x <= limit
    return 0.5 * (below.astype(jnp.float32) + at_most.astype(jnp.float32))
