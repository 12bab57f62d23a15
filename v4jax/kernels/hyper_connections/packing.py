"""A token's few numbers as kernels take them, a row a number; float32 as bfloat16 parts."""

import jax
import jax.numpy as jnp


def rows_of_tokens(post_BTM, comb_BTMM):
    """post above comb, row major: [M + M*M, N]."""
    m = post_BTM.shape[-1]
    return jnp.concatenate([post_BTM.reshape(-1, m).T, comb_BTMM.reshape(-1, m * m).T])


def tokens_of_rows(small_XN, like_BTM):
    """The inverse of `rows_of_tokens`."""
    m = like_BTM[-1]
    post_BTM = small_XN[:m].T.reshape(like_BTM)
    return post_BTM, small_XN[m:].T.reshape(*like_BTM, m)


def row_scale(scale_3, m: int):
    """The scale of each row of fn."""
    return jnp.concatenate(
        [jnp.broadcast_to(scale_3[k], (n,)) for k, n in enumerate((m, m, m * m))]
    )


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
