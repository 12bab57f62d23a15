"""The experts' forward and backward pass as a sequence of grouped matmuls.

Each is a method of `kernels`, one class a platform, on activations in the operand's type; whatever
XLA does between two of them (rounding to E4M3, casts) stands here.
"""

import jax.numpy as jnp

from v4jax.kernels.grouped_matmul import formats


def forward(kernels, x_XD, gate_X, weights, rounding):
    """y [X, D]."""
    w1, w2, w3 = weights
    x = formats.activations(x_XD, weights, rounding)
    z = kernels.up(x, gate_X.astype(jnp.float32), w1, w3)
    return kernels.down(formats.activations(z, weights, rounding), w2)


def backward(kernels, x_XD, gate_X, weights, dy_XD, rounding):
    """Gradients of x, gate and weights (None where they are frozen).

    Nothing of the forward pass was kept: h = x w1^T and b = x w3^T are computed again, in one
    kernel with the gradient through the SwiGLU.
    """
    w1, w2, w3 = weights
    dtype = formats.gradient_dtype(weights, rounding)
    train = formats.trained(weights)
    dy = dy_XD.astype(dtype)
    dz = kernels.dz(dy, w2)
    x = formats.activations(x_XD, weights, rounding)
    da, db, dgate, z = kernels.up_gradient(x, gate_X.astype(jnp.float32), dz, w1, w3, train)
    da, db = da.astype(dtype), db.astype(dtype)
    dx = kernels.dx(da, db, w1, w3, x_XD.dtype)
    dgate = dgate.astype(gate_X.dtype)
    if not train:
        return dx, dgate, None
    dw1, dw3 = kernels.weight_gradients([da, db], x.astype(dtype), w1.dtype)
    z = formats.activations(z, weights, rounding).astype(dtype)
    [dw2] = kernels.weight_gradients([dy], z, w2.dtype)
    return dx, dgate, (dw1, dw2, dw3)
