"""The routed experts: rows sorted by expert through each expert's clamped SwiGLU."""

import dataclasses

import jax
from jaxtyping import Array, Float, Inexact, Int

from v4jax import quant
from v4jax.kernels.grouped_matmul import reference, xla

IMPLEMENTATIONS = {"xla": xla.expert_ffn, "reference": reference.expert_ffn}


@dataclasses.dataclass(frozen=True)
class Rounding:
    """Where an expert rounds: to `dtype` after each matmul, and E4M3 before each if `native`."""

    dtype: str = "float32"
    native: bool = False


def expert_ffn(
    x_XD: Inexact[Array, "x d"],
    gate_X: Float[Array, "x"],
    group_sizes_E: Int[Array, "e"],
    w1_EFD: Array | quant.QTensor,
    w2_EDF: Array | quant.QTensor,
    w3_EFD: Array | quant.QTensor,
    *,
    limit: float,
    rounding: Rounding = Rounding(),
    implementation: str | None = None,
) -> Float[Array, "x d"]:
    """w2 @ (gate * silu(min(w1 x, limit)) * clip(w3 x, -limit, limit)) for rows of many experts.

    Args:
      x_XD: rows sorted by expert; the first group_sizes[0] belong to expert 0, and so on. The
        sizes add up to X. A group may be empty and costs nothing.
      gate_X: routing weight of each row.
      w1_EFD, w2_EDF, w3_EFD: stacked experts, arrays or in stored FP8 / FP4 form, expanded an
        expert at a time.
      limit: clamp of both halves; the gradient is zero where it bites.
      implementation: None chooses; "xla" or "reference" by name.

    Returns:
      [X, D] of x's dtype; differentiable in x, gate and unquantised weights.

    Raises:
      NotImplementedError: an implementation of that name does not exist.
    """
    function = IMPLEMENTATIONS.get(implementation or "xla")
    if function is None:
        raise NotImplementedError(
            f"expert_ffn has no implementation {implementation!r}; "
            f"expected one of {sorted(IMPLEMENTATIONS)}"
        )
    weights = (w1_EFD, w2_EDF, w3_EFD)
    return function(x_XD, gate_X, group_sizes_E, weights, limit, rounding)


def gated_ffn(x, w1_FD, w2_DF, w3_FD, *, limit, rounding=Rounding(), gate=None) -> jax.Array:
    """The same expert on rows [X, D] that all belong to it: the shared expert."""
    return reference.gated_ffn(x, gate, (w1_FD, w2_DF, w3_FD), limit, rounding)
