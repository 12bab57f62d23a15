"""How api enters a Pallas implementation: sizes planned before the jit, then the passes."""

import dataclasses
import functools
from typing import Any

import jax

from v4jax.kernels.grouped_matmul import passes


@dataclasses.dataclass(frozen=True)
class Kernels:
    """What a platform's kernels of one call share; its class adds the methods that `passes` calls.

    `dtype` is the type that every matmul's result is rounded to, `sizes` the platform's plan.
    """

    group_sizes_E: jax.Array
    limit: float
    dtype: str
    sizes: Any
    interpret: bool


def functions(kernels: type[Kernels], plan):
    """(forward, backward) of a platform; `plan` makes its sizes of (x, weights, rounding)."""

    @functools.partial(jax.jit, static_argnames=("run", "limit", "rounding", "sizes", "interpret"))
    def enter(run, group_sizes_E, x_XD, gate_X, weights, *dy_XD, limit, rounding, sizes, interpret):
        own = kernels(group_sizes_E, limit, rounding.dtype, sizes, interpret)
        return run(own, x_XD, gate_X, weights, *dy_XD, rounding)

    def forward(x_XD, gate_X, group_sizes_E, weights, *, rounding, **static):
        """See api.expert_ffn."""
        static |= {"rounding": rounding, "sizes": plan(x_XD, weights, rounding)}
        return enter(passes.forward, group_sizes_E, x_XD, gate_X, weights, **static)

    def backward(x_XD, gate_X, group_sizes_E, weights, dy_XD, *, rounding, **static):
        """Gradients of x, gate and weights (None where they are frozen)."""
        static |= {"rounding": rounding, "sizes": plan(x_XD, weights, rounding)}
        return enter(passes.backward, group_sizes_E, x_XD, gate_X, weights, dy_XD, **static)

    return forward, backward
