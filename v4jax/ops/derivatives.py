"""Which derivatives an operation has: its own gradient, or all of them."""

from collections.abc import Callable

import jax


def of(function: jax.custom_vjp, implementation: str | None) -> Callable:
    """A function with a gradient written by hand, or the plain one that it stands for.

    JAX takes no other derivative of the former: no `jax.jvp`, no `jax.linearize`, no second one.
    Of the latter it takes any, at the cost of what the gradient by hand saves.

    Args:
      function: made by `jax.custom_vjp`.
      implementation: the name under which kernels are asked for; "reference" is the plain path.
    """
    return function.fun if implementation == "reference" else function
