"""A Pallas kernel as api calls it: its plan made before the jit, its numbers one static tuple."""

import jax
import jax.numpy as jnp


def forward(kernel, streams: int, plan, numbers=("iterations", "eps", "rms_eps")):
    """A function of arrays, `dtype`, `interpret` and the numbers.

    Args:
      kernel: jitted, with static plan, dtype, interpret and, where there are numbers, options.
      streams: which of the arrays are the streams.
      plan: (streams, dtype) -> the kernel's plan.
    """

    def call(*arrays, dtype, interpret, **given):
        dtype = jnp.dtype(dtype)
        static = _static(plan(arrays[streams], dtype), interpret, given, numbers)
        return kernel(*arrays, dtype=dtype, **static)

    return call


def backward(kernel, streams: int, plan, numbers=("iterations", "eps")):
    """The same of a gradient, whose last argument are those of the results: theirs is the dtype."""

    def call(*arrays, interpret, **given):
        dtype = jax.tree.leaves(arrays[-1])[0].dtype
        return kernel(*arrays, **_static(plan(arrays[streams], dtype), interpret, given, numbers))

    return call


def _static(plan, interpret, given, numbers):
    options = {"options": tuple(given[name] for name in numbers)} if numbers else {}
    return {"plan": plan, "interpret": interpret} | options
