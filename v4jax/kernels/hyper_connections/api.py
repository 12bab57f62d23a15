"""Manifold-constrained hyper-connections: mix M residual streams into one input and back."""

from jaxtyping import Array, Float, Inexact

from v4jax.kernels.hyper_connections import reference


def pre(
    h_BTMD: Inexact[Array, "b t m d"],
    fn_XV: Float[Array, "x v"],
    base_X: Float[Array, "x"],
    scale_3: Float[Array, "3"],
    *,
    iterations: int,
    eps: float,
    rms_eps: float,
) -> tuple[Float[Array, "b t d"], Float[Array, "b t m"], Float[Array, "b t m m"]]:
    """The sub-layer's input u, and what `post` needs: the weights of its output and the matrix.

    Args:
      h_BTMD: the residual streams.
      fn_XV: float32 [(2+M)M, M*D]; base_X [(2+M)M]; scale_3 [3].
      iterations: Sinkhorn rounds (hc_sinkhorn_iters).
      eps: hc_eps. rms_eps: rms_norm_eps.

    Returns:
      u [B,T,D], post [B,T,M] and the nearly doubly stochastic comb [B,T,M,M], all float32
      (architecture section 3).
    """
    return reference.pre(
        h_BTMD, fn_XV, base_X, scale_3, iterations=iterations, eps=eps, rms_eps=rms_eps
    )


def post(
    y_BTD: Inexact[Array, "b t d"],
    h_BTMD: Inexact[Array, "b t m d"],
    post_BTM: Float[Array, "b t m"],
    comb_BTMM: Float[Array, "b t m m"],
) -> Float[Array, "b t m d"]:
    """The new streams, float32: h'[j] = post[j] * y + sum_i comb[i, j] * h[i]."""
    return reference.post(y_BTD, h_BTMD, post_BTM, comb_BTMM)


def head(
    h_BTMD: Inexact[Array, "b t m d"],
    fn_MV: Float[Array, "m v"],
    base_M: Float[Array, "m"],
    scale_1: Float[Array, "1"],
    *,
    eps: float,
    rms_eps: float,
) -> Float[Array, "b t d"]:
    """The streams collapsed for the output head, float32; no Sinkhorn."""
    return reference.head(h_BTMD, fn_MV, base_M, scale_1, eps=eps, rms_eps=rms_eps)
