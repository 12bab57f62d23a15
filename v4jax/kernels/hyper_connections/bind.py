"""A Pallas kernel as api calls it: its plan made before the jit, its numbers one static tuple."""

import jax
import jax.numpy as jnp

from v4jax.kernels.hyper_connections.arguments import Sublayer


def forward(kernel, plan, numbers=("iterations", "eps", "rms_eps")):
    """A function of arguments, the first the streams or a `Sublayer`, and of static numbers.

    Args:
      kernel: jitted, with static plan, dtype, interpret and, where there are numbers, options.
      plan: (streams, dtype) -> the kernel's plan.
    """

    def call(first, *others, dtype, interpret, **given):
        dtype = jnp.dtype(dtype)
        static = _static(plan(streams_of(first), dtype), interpret, given, numbers)
        return kernel(first, *others, dtype=dtype, **static)

    return call


def backward(kernel, plan, numbers=("iterations", "eps")):
    """The same of a gradient, whose last argument are those of the results: theirs is the dtype."""

    def call(first, *others, interpret, **given):
        dtype = jax.tree.leaves(others[-1])[0].dtype
        static = _static(plan(streams_of(first), dtype), interpret, given, numbers)
        return kernel(first, *others, **static)

    return call


def streams_of(first):
    """The streams among an operation's arguments, of which this is the first."""
    return first.h if isinstance(first, Sublayer) else first


def _static(plan, interpret, given, numbers):
    options = {"options": tuple(given[name] for name in numbers)} if numbers else {}
    return {"plan": plan, "interpret": interpret} | options
