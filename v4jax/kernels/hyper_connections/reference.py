"""mHC in plain float32 JAX, as architecture section 3 reads. [.., T, M, D] streams."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

HIGHEST = jax.lax.Precision.HIGHEST


def mix(h_BTMD, fn_XV, rms_eps):
    """(fn @ v) / rms(v) for v the flattened streams: [B,T,X]."""
    v_BTV = h_BTMD.reshape(*h_BTMD.shape[:2], -1).astype(jnp.float32)
    scale = jax.lax.rsqrt(jnp.mean(v_BTV * v_BTV, axis=-1, keepdims=True) + rms_eps)
    return jnp.einsum("btv,xv->btx", v_BTV, fn_XV, precision=HIGHEST) * scale


def sinkhorn(logits_MMX: Float[Array, "m m x"], iterations: int, eps: float):
    """Rows and columns of exp(logits) normalised in turn, `iterations` times (section 3).

    The matrices stand first so that a step is elementwise over all tokens X at once.
    """
    a = jax.nn.softmax(logits_MMX, axis=1) + eps
    a = a / (a.sum(0, keepdims=True) + eps)

    def step(_, a):
        a = a / (a.sum(1, keepdims=True) + eps)
        return a / (a.sum(0, keepdims=True) + eps)

    return jax.lax.fori_loop(0, iterations - 1, step, a)


def collapse(weight_BTM, h_BTMD):
    """sum_i weight[i] * h[i], term by term: XLA:CPU takes 100 times longer over a reduction."""
    h_BTMD = h_BTMD.astype(jnp.float32)
    return sum(weight_BTM[:, :, i, None] * h_BTMD[:, :, i] for i in range(h_BTMD.shape[2]))


def pre(h_BTMD, fn_XV, base_X, scale_3, *, iterations, eps, rms_eps):
    """See api.pre."""
    batch, length, m, _ = h_BTMD.shape
    mixed = mix(h_BTMD, fn_XV, rms_eps)
    base = base_X[None, None]
    pre_BTM = jax.nn.sigmoid(mixed[..., :m] * scale_3[0] + base[..., :m]) + eps
    post_BTM = 2 * jax.nn.sigmoid(mixed[..., m : 2 * m] * scale_3[1] + base[..., m : 2 * m])
    logits = mixed[..., 2 * m :] * scale_3[2] + base[..., 2 * m :]
    logits_MMX = logits.reshape(batch * length, m, m).transpose(1, 2, 0)
    a = sinkhorn(logits_MMX, iterations, eps).transpose(2, 0, 1)
    return collapse(pre_BTM, h_BTMD), post_BTM, a.reshape(batch, length, m, m)


def post(y_BTD, h_BTMD, post_BTM, comb_BTMM):
    """See api.post. Term by term, which spares the backward pass sums over the middle axis."""
    m, y_BTD = h_BTMD.shape[2], y_BTD.astype(jnp.float32)
    streams = [h_BTMD[:, :, i].astype(jnp.float32) for i in range(m)]

    def stream(j):
        kept = sum(comb_BTMM[:, :, i, j, None] * streams[i] for i in range(m))
        return post_BTM[:, :, j, None] * y_BTD + kept

    return jnp.stack([stream(j) for j in range(m)], axis=2)


def head(h_BTMD, fn_MV, base_M, scale_1, *, eps, rms_eps):
    """See api.head."""
    mixed = mix(h_BTMD, fn_MV, rms_eps)
    pre_BTM = jax.nn.sigmoid(mixed * scale_1[0] + base_M[None, None]) + eps
    return collapse(pre_BTM, h_BTMD)
