"""The routed experts: rows sorted by expert through each expert's clamped SwiGLU."""

import dataclasses
import functools

import jax
from jaxtyping import Array, Float, Inexact, Int

from v4jax import quant
from v4jax.kernels import dispatch
from v4jax.kernels.grouped_matmul import reference, xla
from v4jax.kernels.grouped_matmul.gpu import matmul as pallas_gpu
from v4jax.kernels.grouped_matmul.tpu import matmul as pallas_tpu

IMPLEMENTATIONS = {"xla": xla, "pallas_tpu": pallas_tpu, "pallas_gpu": pallas_gpu}


@dataclasses.dataclass(frozen=True)
class Rounding:
    """Where an expert rounds: to `dtype` after each matmul, and E4M3 before each if `native`."""

    dtype: str = "float32"
    native: bool = False


@jax.named_scope("expert_ffn")
def expert_ffn(
    x_XD: Inexact[Array, "x d"],
    gate_X: Float[Array, " x"],
    group_sizes_E: Int[Array, " e"],
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
        sizes add up to X or less: rows after the last group must be finite, and their results and
        gradients are whatever was in memory. A group may be empty and costs nothing.
      gate_X: routing weight of each row.
      w1_EFD, w2_EDF, w3_EFD: stacked experts, all arrays or all in one stored FP8 / FP4 form, which
        is expanded a tile (in plain XLA: an expert) at a time.
      limit: clamp of both halves; the gradient is zero where it bites.
      rounding: where the expert rounds.
      implementation: None chooses for the platform; or "xla", "pallas_tpu", "pallas_gpu",
        "reference".

    Returns:
      [X, D] of rounding.dtype; differentiable in x, gate and unquantised weights. Only the inputs
      are kept for the gradient, and everything else is computed again.

    Raises:
      NotImplementedError: there is no such implementation, or it cannot take the arguments.
    """
    weights = (w1_EFD, w2_EDF, w3_EFD)
    if implementation == "reference":
        return reference.expert_ffn(x_XD, gate_X, group_sizes_E, weights, limit, rounding)
    return _ffn(limit, rounding, implementation, x_XD, gate_X, group_sizes_E, weights)


@jax.named_scope("gated_ffn")
def gated_ffn(
    x, w1_FD, w2_DF, w3_FD, *, limit, rounding=Rounding(), gate=None, implementation=None
) -> jax.Array:
    """The same expert on rows [X, D] that all belong to it: the shared expert, plain XLA."""
    weights = (w1_FD, w2_DF, w3_FD)
    return reference.gated_ffn(x, gate, weights, limit, rounding, implementation)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _ffn(limit, rounding, implementation, *args):
    return _run("forward", limit, rounding, implementation, *args)


def _run(direction, limit, rounding, implementation, *args):
    functions = {
        name: functools.partial(getattr(module, direction), limit=limit, rounding=rounding)
        for name, module in IMPLEMENTATIONS.items()
    }

    def refuse(name, *args):
        return IMPLEMENTATIONS[name].refuse(*args[:4], rounding)

    return dispatch.run("expert_ffn", implementation, functions, refuse, *args)


def _ffn_forward(limit, rounding, implementation, *args):
    return _ffn(limit, rounding, implementation, *args), args


def _ffn_backward(limit, rounding, implementation, args, dy):
    dx, dgate, dweights = _run("backward", limit, rounding, implementation, *args, dy)
    return dx, dgate, None, dweights


_ffn.defvjp(_ffn_forward, _ffn_backward)
