"""A token's few numbers as kernels take them, one row per number; float32 as bfloat16 parts."""

import einops
import jax
import jax.numpy as jnp

from v4jax.kernels.hyper_connections.arguments import Mixing, Sublayer, Weights


def rows_of_tokens(mixing: Mixing | Sublayer):
    """post above comb, row major: [M + M*M, N]."""
    post = einops.rearrange(mixing.post, "b t m -> m (b t)")
    return jnp.concatenate([post, einops.rearrange(mixing.comb, "b t i j -> (i j) (b t)")])


def tokens_of_rows(small_XN, like_BTM) -> Mixing:
    """The inverse of `rows_of_tokens`."""
    batch, _, m = like_BTM
    post_BTM = einops.rearrange(small_XN[:m], "m (b t) -> b t m", b=batch)
    comb = einops.rearrange(small_XN[m:], "(i j) (b t) -> b t i j", b=batch, i=m)
    return Mixing(post_BTM, comb)


def unrows(y_ND, like_BTD):
    """[B, T, D] of padded rows."""
    batch, length, d = like_BTD.shape
    return y_ND[: batch * length, :d].reshape(like_BTD.shape)


def stream_count(rows: int) -> int:
    """The M of so many rows, (2+M)M."""
    return next(m for m in range(1, 9) if (2 + m) * m == rows)


def row_scale(scale_3, m: int):
    """The scale of each row of fn."""
    return jnp.concatenate(
        [jnp.broadcast_to(scale_3[k], (n,)) for k, n in enumerate((m, m, m * m))]
    )


def rows_as_columns(weights: Weights, m: int):
    """base and the scale of each row, [X, 1]."""
    return weights.base[:, None], row_scale(weights.scale, m)[:, None]


def logit_grads(dlogits_XN, mixed_XN, m: int):
    """d(base) and d(scale) of logits = mixed * scale + base."""
    along = (dlogits_XN * mixed_XN).sum(1)
    dscale = jnp.stack([along[:m].sum(), along[m : 2 * m].sum(), along[2 * m :].sum()])
    return dlogits_XN.sum(1), dscale


def float_parts(w, count: int):
    """Float32 arrays that bfloat16 holds and whose sum is w: to 17 bits with two, exact with three.

    Rounded by the bits and not by casting, which a compiler with excess precision may undo.
    """
    parts = []
    for _ in range(count):
        bits = jax.lax.bitcast_convert_type(w, jnp.uint32) + jnp.uint32(0x8000)
        bits = bits & jnp.uint32(0xFFFF0000)
        parts.append(jax.lax.bitcast_convert_type(bits, jnp.float32))
        w = w - parts[-1]
    return parts
