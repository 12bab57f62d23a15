"""mHC in plain float32 JAX, as architecture section 3 reads. [B, T, M, D] streams."""

import jax
import jax.numpy as jnp

HIGHEST = jax.lax.Precision.HIGHEST


def mix(h_BTMD, fn_XV, rms_eps):
    """(fn @ v) / rms(v) for v the flattened streams: [B,T,X]."""
    v_BTV = h_BTMD.reshape(*h_BTMD.shape[:2], -1).astype(jnp.float32)
    norm = jax.lax.rsqrt(jnp.mean(v_BTV * v_BTV, axis=-1, keepdims=True) + rms_eps)
    return jnp.einsum("xv,btv->btx", fn_XV, v_BTV, precision=HIGHEST) * norm


def sinkhorn(logits_BTMM, iterations, eps):
    """Rows and columns of exp(logits) normalised alternately, `iterations` times."""
    a = jax.nn.softmax(logits_BTMM, axis=-1) + eps
    a = a / (a.sum(-2, keepdims=True) + eps)

    def step(_, a):
        a = a / (a.sum(-1, keepdims=True) + eps)
        return a / (a.sum(-2, keepdims=True) + eps)

    return jax.lax.fori_loop(0, iterations - 1, step, a)


def pre(h_BTMD, fn_XV, base_X, scale_3, *, iterations, eps, rms_eps):
    """See api.pre; u in float32."""
    m = h_BTMD.shape[2]
    mixed = mix(h_BTMD, fn_XV, rms_eps)
    base = base_X[None, None]
    pre_BTM = jax.nn.sigmoid(mixed[..., :m] * scale_3[0] + base[..., :m]) + eps
    post_BTM = 2 * jax.nn.sigmoid(mixed[..., m : 2 * m] * scale_3[1] + base[..., m : 2 * m])
    logits = mixed[..., 2 * m :] * scale_3[2] + base[..., 2 * m :]
    comb_BTMM = sinkhorn(logits.reshape(*logits.shape[:2], m, m), iterations, eps)
    u_BTD = jnp.einsum("btm,btmd->btd", pre_BTM, h_BTMD.astype(jnp.float32), precision=HIGHEST)
    return u_BTD, post_BTM, comb_BTMM


def post(y_BTD, h_BTMD, post_BTM, comb_BTMM):
    """See api.post; float32."""
    y_BTD, h_BTMD = y_BTD.astype(jnp.float32), h_BTMD.astype(jnp.float32)
    kept = jnp.einsum("btij,btid->btjd", comb_BTMM, h_BTMD, precision=HIGHEST)
    return post_BTM[..., None] * y_BTD[:, :, None] + kept


def head(h_BTMD, fn_MV, base_M, scale_1, *, eps, rms_eps):
    """See api.head."""
    pre_BTM = jax.nn.sigmoid(mix(h_BTMD, fn_MV, rms_eps) * scale_1[0] + base_M[None, None]) + eps
    return jnp.einsum("btm,btmd->btd", pre_BTM, h_BTMD.astype(jnp.float32), precision=HIGHEST)
