"""Manifold-constrained hyper-connections: mix M residual streams into one input and back."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Inexact

from v4jax.kernels import dispatch
from v4jax.kernels.hyper_connections import bind, reference, xla
from v4jax.kernels.hyper_connections.arguments import Sublayer, Weights
from v4jax.kernels.hyper_connections.gpu import backward as pallas_gpu_backward
from v4jax.kernels.hyper_connections.gpu import forward as pallas_gpu
from v4jax.kernels.hyper_connections.refusals import refusal
from v4jax.kernels.hyper_connections.tpu import backward as pallas_tpu_backward
from v4jax.kernels.hyper_connections.tpu import forward as pallas_tpu
from v4jax.quant import round_to


@dataclasses.dataclass(frozen=True)
class Options:
    """What is static in a call of `pre`."""

    iterations: int
    eps: float
    rms_eps: float
    dtype: str
    implementation: str | None

    def forward(self):
        return {"rms_eps": self.rms_eps, "dtype": self.dtype} | self.backward()

    def backward(self):
        return {"iterations": self.iterations, "eps": self.eps}


@jax.named_scope("mhc_pre")
def pre(
    h_BTMD: Inexact[Array, "b t m d"],
    fn_XV: Float[Array, "x v"],
    base_X: Float[Array, " x"],
    scale_3: Float[Array, "3"],
    *,
    iterations: int,
    eps: float,
    rms_eps: float,
    dtype: DTypeLike = jnp.float32,
    implementation: str | None = None,
) -> tuple[Inexact[Array, "b t d"], Float[Array, "b t m"], Float[Array, "b t m m"]]:
    """The sub-layer's input u, and what `post` needs: the weights of its output and the matrix.

    Args:
      h_BTMD: the residual streams, float32 or bfloat16; the mathematics is float32.
      fn_XV: float32 [(2+M)M, M*D]; base_X [(2+M)M]; scale_3 [3].
      iterations: Sinkhorn rounds (hc_sinkhorn_iters).
      eps: hc_eps. rms_eps: rms_norm_eps.
      dtype: of u, rounded once at the end.
      implementation: None chooses; "xla", "pallas_tpu", "pallas_gpu" or "reference" by name.

    Returns:
      u [B,T,D], and in float32 post [B,T,M] and the nearly doubly stochastic comb [B,T,M,M]
      (architecture section 3). Differentiable in h and the weights; the backward pass keeps the
      inputs and the (2+M)M logits of each token and recomputes the Sinkhorn rounds.

    Raises:
      NotImplementedError: the implementation asked for does not exist or cannot take the arrays.
    """
    weights = Weights(fn_XV, base_X, scale_3)
    if implementation == "reference":
        small = {"iterations": iterations, "eps": eps, "rms_eps": rms_eps}
        u_BTD, post_BTM, comb_BTMM = reference.pre(h_BTMD, *weights, **small)
        return round_to(u_BTD, dtype), post_BTM, comb_BTMM
    options = Options(iterations, eps, rms_eps, jnp.dtype(dtype).name, implementation)
    u_BTD, mixing = _pre(options, h_BTMD, weights)
    return u_BTD, *mixing


@jax.named_scope("mhc_post")
def post(
    y_BTD: Inexact[Array, "b t d"],
    h_BTMD: Inexact[Array, "b t m d"],
    post_BTM: Float[Array, "b t m"],
    comb_BTMM: Float[Array, "b t m m"],
    *,
    dtype: DTypeLike = jnp.float32,
    implementation: str | None = None,
) -> Inexact[Array, "b t m d"]:
    """The new streams in `dtype`: h'[j] = post[j] * y + sum_i comb[i, j] * h[i].

    `implementation` and errors as for `pre`.
    """
    sublayer = Sublayer(y_BTD, h_BTMD, post_BTM, comb_BTMM)
    if implementation == "reference":
        return round_to(reference.post(*sublayer), dtype)
    return _post((jnp.dtype(dtype).name, implementation), sublayer)


@jax.named_scope("mhc_post_pre")
def post_pre(
    y_BTD: Inexact[Array, "b t d"],
    h_BTMD: Inexact[Array, "b t m d"],
    post_BTM: Float[Array, "b t m"],
    comb_BTMM: Float[Array, "b t m m"],
    fn_XV: Float[Array, "x v"],
    base_X: Float[Array, " x"],
    scale_3: Float[Array, "3"],
    *,
    iterations: int,
    eps: float,
    rms_eps: float,
    dtype: DTypeLike = jnp.float32,
    implementation: str | None = None,
) -> tuple[
    Inexact[Array, "b t m d"],
    Inexact[Array, "b t d"],
    Float[Array, "b t m"],
    Float[Array, "b t m m"],
]:
    """One sub-layer's `post` and the next one's `pre`, while the streams are at hand.

    Args:
      y_BTD, h_BTMD, post_BTM, comb_BTMM: as for `post`. The rest: as for the next `pre`.
      dtype: of the new streams, which the next `pre` sees rounded, and of u.

    Returns:
      The new streams h', and u', post', comb' as `pre` gives them for h'.

    Raises:
      NotImplementedError: as for `pre`.
    """
    sublayer = Sublayer(y_BTD, h_BTMD, post_BTM, comb_BTMM)
    weights = Weights(fn_XV, base_X, scale_3)
    if implementation == "reference":
        named = {"dtype": dtype, "implementation": implementation}
        new_BTMD = post(*sublayer, **named)
        small = {"iterations": iterations, "eps": eps, "rms_eps": rms_eps}
        return new_BTMD, *pre(new_BTMD, *weights, **small, **named)
    options = Options(iterations, eps, rms_eps, jnp.dtype(dtype).name, implementation)
    new_BTMD, u_BTD, mixing = _post_pre(options, sublayer, weights)
    return new_BTMD, u_BTD, *mixing


@jax.named_scope("mhc_head")
def head(
    h_BTMD: Inexact[Array, "b t m d"],
    fn_MV: Float[Array, "m v"],
    base_M: Float[Array, " m"],
    scale_1: Float[Array, "1"],
    *,
    eps: float,
    rms_eps: float,
) -> Float[Array, "b t d"]:
    """The streams collapsed for the output head, float32; no Sinkhorn. Plain XLA: it is rare."""
    return xla.head(h_BTMD, fn_MV, base_M, scale_1, eps=eps, rms_eps=rms_eps)


FORWARD = {"xla": xla, "pallas_tpu": pallas_tpu, "pallas_gpu": pallas_gpu}
BACKWARD = {"xla": xla, "pallas_tpu": pallas_tpu_backward, "pallas_gpu": pallas_gpu_backward}


def _run(op, modules, implementation, dtype, options, first, *others):
    """Dispatches `op`, a function of each module; `first` holds the streams, and `dtype` is the
    results': they decide what is refused.
    """
    functions = {
        name: functools.partial(getattr(module, op), **options) for name, module in modules.items()
    }
    streams = bind.streams_of(first)

    def refuse(name, *_):
        return refusal(op, name, streams, dtype)

    name = f"hyper_connections.{op}"
    return dispatch.run(name, implementation, functions, refuse, first, *others)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _pre(options, h_BTMD, weights):
    return _pre_forward(options, h_BTMD, weights)[0]


def _pre_forward(options, h_BTMD, weights):
    static = (options.implementation, options.dtype, options.forward())
    out, saved = _run("pre", FORWARD, *static, h_BTMD, weights)
    return out, (h_BTMD, weights, saved)


def _pre_backward(options, kept, grads):
    static = (options.implementation, options.dtype, options.backward())
    return _run("pre_backward", BACKWARD, *static, *kept, grads)


_pre.defvjp(_pre_forward, _pre_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _post(options, sublayer):
    return _post_forward(options, sublayer)[0]


def _post_forward(options, sublayer):
    dtype, implementation = options
    out = _run("post", FORWARD, implementation, dtype, {"dtype": dtype}, sublayer)
    return out, sublayer


def _post_backward(options, sublayer, grad_BTMD):
    dtype, implementation = options
    return (_run("post_backward", BACKWARD, implementation, dtype, {}, sublayer, grad_BTMD),)


_post.defvjp(_post_forward, _post_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _post_pre(options, sublayer, weights):
    return _post_pre_forward(options, sublayer, weights)[0]


def _post_pre_forward(options, sublayer, weights):
    static = (options.implementation, options.dtype, options.forward())
    out, saved = _run("post_pre", FORWARD, *static, sublayer, weights)
    return out, (sublayer, out[0], weights, saved)


def _post_pre_backward(options, kept, grads):
    static = (options.implementation, options.dtype, options.backward())
    return _run("post_pre_backward", BACKWARD, *static, *kept, grads)


_post_pre.defvjp(_post_pre_forward, _post_pre_backward)
