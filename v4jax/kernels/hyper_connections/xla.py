"""mHC in plain XLA, fast on a CPU: sums over streams written term by term.

XLA:CPU takes 10 to 100 times longer over a reduction along any axis but the last. What is small
has its tokens last ([X, N]), so that a Sinkhorn step is elementwise over all of them.
"""

import jax
import jax.numpy as jnp

from v4jax.kernels.hyper_connections import sinkhorn
from v4jax.kernels.hyper_connections.arguments import Mixing, Saved, Sublayer, Weights
from v4jax.quant import round_to

HIGHEST = jax.lax.Precision.HIGHEST


def pre(h_BTMD, weights: Weights, *, iterations, eps, rms_eps, dtype):
    """See api.pre: (u, `Mixing`), and what its backward takes."""
    batch, length, m, _ = h_BTMD.shape
    mixed_BTX, norm_BT1 = project(h_BTMD, weights.fn, rms_eps)
    mixed_XN = mixed_BTX.reshape(batch * length, -1).T
    pre_MN, post_MN, comb_MMN = mix(mixed_XN, weights.base, weights.scale, m, iterations, eps)
    post_BTM = post_MN.T.reshape(batch, length, m)
    comb_BTMM = comb_MMN.transpose(2, 0, 1).reshape(batch, length, m, m)
    u_BTD = round_to(collapse(pre_MN.T.reshape(batch, length, m), h_BTMD), dtype)
    return (u_BTD, Mixing(post_BTM, comb_BTMM)), Saved(mixed_XN, norm_BT1.reshape(-1))


def pre_backward(h_BTMD, weights: Weights, saved: Saved, grads, *, iterations, eps):
    """Gradients of h and the weights from those of (u, mixing)."""
    batch, length, m, d = h_BTMD.shape
    mixed_XN, norm_N = saved
    du_BTD, (dpost_BTM, dcomb_BTMM) = grads
    du_BTD = du_BTD.astype(jnp.float32)
    streams = [h_BTMD[:, :, i].astype(jnp.float32) for i in range(m)]

    def small(mixed_XN, base_X, scale_3):
        return mix(mixed_XN, base_X, scale_3, m, iterations, eps)

    (pre_MN, _, _), small_backward = jax.vjp(small, mixed_XN, weights.base, weights.scale)
    dpre_BTM = inner("btd,btmd->btm", du_BTD, h_BTMD)
    dpre_MN = dpre_BTM.reshape(-1, m).T
    dpost_MN = dpost_BTM.reshape(-1, m).T
    dcomb_MMN = dcomb_BTMM.reshape(-1, m, m).transpose(1, 2, 0)
    dmixed_XN, dbase_X, dscale_3 = small_backward((dpre_MN, dpost_MN, dcomb_MMN))
    draw_XN = dmixed_XN * norm_N[None]
    v_NV = h_BTMD.reshape(batch * length, m * d).astype(jnp.float32)
    dfn_XV = jnp.matmul(draw_XN, v_NV, precision=HIGHEST)
    dv_BTMD = jnp.matmul(draw_XN.T, weights.fn, precision=HIGHEST).reshape(h_BTMD.shape)
    shrink_N = norm_N * norm_N * (dmixed_XN * mixed_XN).sum(0) / (m * d)
    shrink_BT1 = shrink_N.reshape(batch, length, 1)
    pre_MBT1 = pre_MN.reshape(m, batch, length, 1)
    dh = [dv_BTMD[:, :, i] + pre_MBT1[i] * du_BTD - shrink_BT1 * streams[i] for i in range(m)]
    dh_BTMD = jnp.stack(dh, axis=2).astype(h_BTMD.dtype)
    return dh_BTMD, Weights(dfn_XV, dbase_X, dscale_3)


def post(sublayer: Sublayer, *, dtype):
    """See api.post. All new streams in one pass: stacked one by one they would be copied."""
    y_BTD, h_BTMD, post_BTM, comb_BTMM = sublayer
    y_BTD, h_BTMD = y_BTD.astype(jnp.float32), h_BTMD.astype(jnp.float32)
    kept = sum(comb_BTMM[:, :, i, :, None] * h_BTMD[:, :, i, None] for i in range(h_BTMD.shape[2]))
    return round_to(post_BTM[..., None] * y_BTD[:, :, None] + kept, dtype)


def post_backward(sublayer: Sublayer, grad_BTMD) -> Sublayer:
    """The gradients."""
    y_BTD, h_BTMD, post_BTM, comb_BTMM = sublayer
    m = h_BTMD.shape[2]
    grads = [grad_BTMD[:, :, j].astype(jnp.float32) for j in range(m)]
    dy = sum(post_BTM[:, :, j, None] * grads[j] for j in range(m))
    dh = [sum(comb_BTMM[:, :, i, j, None] * grads[j] for j in range(m)) for i in range(m)]
    dpost_BTM = inner("btd,btjd->btj", y_BTD, grad_BTMD)
    dcomb_BTMM = inner("btid,btjd->btij", h_BTMD, grad_BTMD)
    dh_BTMD = jnp.stack(dh, axis=2).astype(h_BTMD.dtype)
    return Sublayer(dy.astype(y_BTD.dtype), dh_BTMD, dpost_BTM, dcomb_BTMM)


def post_pre(sublayer: Sublayer, weights: Weights, *, dtype, **options):
    """See api.post_pre: one after the other."""
    new_BTMD = post(sublayer, dtype=dtype)
    rest, saved = pre(new_BTMD, weights, dtype=dtype, **options)
    return (new_BTMD, *rest), saved


def post_pre_backward(
    sublayer: Sublayer, new_BTMD, weights: Weights, saved: Saved, grads, **options
):
    """Gradients of the sub-layer and the weights from those of (h', u, mixing')."""
    grad_BTMD, *grads = grads
    dnew_BTMD, dweights = pre_backward(new_BTMD, weights, saved, grads, **options)
    return post_backward(sublayer, grad_BTMD + dnew_BTMD), dweights


def head(h_BTMD, fn_MV, base_M, scale_1, *, eps, rms_eps):
    """See api.head."""
    mixed_BTM, _ = project(h_BTMD, fn_MV, rms_eps)
    pre_BTM = jax.nn.sigmoid(mixed_BTM * scale_1[0] + base_M[None, None]) + eps
    return collapse(pre_BTM, h_BTMD)


def project(h_BTMD, fn_XV, rms_eps):
    """(fn @ v) / rms(v) for v the flattened streams [B,T,X], and 1 / rms(v) [B,T,1]."""
    v_BTV = h_BTMD.reshape(*h_BTMD.shape[:2], -1).astype(jnp.float32)
    norm = jax.lax.rsqrt(jnp.mean(v_BTV * v_BTV, axis=-1, keepdims=True) + rms_eps)
    return jnp.einsum("btv,xv->btx", v_BTV, fn_XV, precision=HIGHEST) * norm, norm


def mix(mixed_XN, base_X, scale_3, m, iterations, eps):
    """pre [M,N], post [M,N] and the matrix [M,M,N] of the logits."""
    base = base_X[:, None]
    pre_MN = jax.nn.sigmoid(mixed_XN[:m] * scale_3[0] + base[:m]) + eps
    post_MN = 2 * jax.nn.sigmoid(mixed_XN[m : 2 * m] * scale_3[1] + base[m : 2 * m])
    logits = mixed_XN[2 * m :] * scale_3[2] + base[2 * m :]
    return pre_MN, post_MN, sinkhorn.outside(logits.reshape(m, m, -1), iterations, eps)


def inner(equation, a, b):
    """Inner products over channels, as matrix products: many times faster than sums."""
    return jnp.einsum(equation, a.astype(jnp.float32), b.astype(jnp.float32), precision=HIGHEST)


def collapse(weight_BTM, h_BTMD):
    """sum_i weight[i] * h[i]."""
    h_BTMD = h_BTMD.astype(jnp.float32)
    return sum(weight_BTM[:, :, i, None] * h_BTMD[:, :, i] for i in range(h_BTMD.shape[2]))
