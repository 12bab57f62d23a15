"""The routed experts: rows sorted by expert through each expert's clamped SwiGLU."""

import dataclasses
import functools
from collections.abc import Callable

import jax
from jaxtyping import Array, Float, Inexact, Int

from v4jax import quant
from v4jax.kernels import dispatch
from v4jax.kernels.grouped_matmul import every_expert, reference, row_by_row, xla
from v4jax.kernels.grouped_matmul.gpu import matmul as pallas_gpu
from v4jax.kernels.grouped_matmul.tpu import matmul as pallas_tpu
from v4jax.ops import varying

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


def of_tokens(
    routed: Callable[..., jax.Array],
    x_XD: Inexact[Array, "x d"],
    chosen_XK: Int[Array, "x k"],
    gates_XK: Float[Array, "x k"],
    weights: tuple[Array | quant.QTensor, ...],
    *,
    limit: float,
    rounding: Rounding = Rounding(),
    implementation: str | None = None,
) -> Float[Array, "x d"]:
    """The sum over each token's experts: `routed`, or without it where that is faster.

    Args:
      routed: (x, chosen, gates, weights) -> the sum, by sorting rows for `expert_ffn`. It captures
        no arrays. Gradients are always its own.
      x_XD: tokens.
      chosen_XK: a token's experts; a hash table may name one twice.
      gates_XK: their routing weights.
      weights: stacked w1, w2, w3 of all experts, as `expert_ffn` takes them.
      limit, rounding, implementation: as `expert_ffn` takes them.

    Returns:
      [X, D] float32. A decode step on a CPU may differ from `routed` by rounding.
    """
    args = (x_XD, chosen_XK, gates_XK, weights)
    form = None
    if implementation in (None, "xla") and not varying.checked():
        form = _form_for_few(*chosen_XK.shape, weights, rounding)
    if form is None:
        return routed(*args)
    return _of_few_tokens(routed, functools.partial(form, limit=limit, rounding=rounding), *args)


def _form_for_few(tokens, choices, weights, rounding):
    """How a CPU runs so few tokens without sorting rows by expert, or None."""
    if every_expert.pays(tokens, choices, weights, rounding):
        return every_expert.of_tokens
    return row_by_row.of_tokens if tokens * choices <= row_by_row.FEW_ROWS else None


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


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _of_few_tokens(routed, form, *args):
    return jax.lax.platform_dependent(*args, cpu=form, default=routed)


def _of_few_tokens_forward(routed, form, *args):
    return _of_few_tokens(routed, form, *args), args


def _of_few_tokens_backward(routed, form, args, dy):
    x, chosen, *differentiable = args
    pull = jax.vjp(lambda x, *rest: routed(x, chosen, *rest), x, *differentiable)[1]
    dx, dgates, dweights = pull(dy)
    return dx, None, dgates, dweights


_of_few_tokens.defvjp(_of_few_tokens_forward, _of_few_tokens_backward)
