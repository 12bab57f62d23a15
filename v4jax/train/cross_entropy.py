"""The cross-entropy of the output head, a chunk of tokens at a time.

No array of tokens x vocabulary outlives a chunk, in either direction: the forward pass of a
gradient makes the gradient of each chunk at once and keeps [X,D] and [V,D].
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Inexact, Int

from v4jax.sharding import collectives

# Logits of a chunk, float32.
CHUNK = 1 << 23


def cross_entropy(
    y_XD: Inexact[Array, "x d"],
    table_VD: Inexact[Array, "v d"],
    target_X: Int[Array, "x"],
    weight_X: Float[Array, "x"],
    axes: tuple[str, ...] = (),
) -> Float[Array, ""]:
    """sum of weight * -log softmax(y @ table.T)[target], exactly; no gradient in the weights.

    Args:
      y_XD: normed states. table_VD: the output table or, inside `shard_map`, this shard's part.
      target_X: ids out of the whole vocabulary. weight_X: 0 where a target does not count.
      axes: mesh axes that the vocabulary is spread over.
    """
    return _nats(axes, y_XD, table_VD, target_X, weight_X)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _nats(axes, y_XD, table_VD, target_X, weight_X):
    table = table_VD.astype(jnp.float32)

    def add(total, chunk):
        y, target, weight = chunk
        nats, _ = _chunk_nats(axes, y, table, target)
        return total + jnp.sum(weight * nats), None

    chunks = _chunks(table.shape[0], y_XD.astype(jnp.float32), target_X, weight_X)
    return jax.lax.scan(add, jnp.float32(0), chunks)[0]


def _forward(axes, y_XD, table_VD, target_X, weight_X):
    table = table_VD.astype(jnp.float32)

    def add(carry, chunk):
        total, dtable = carry
        y, target, weight = chunk
        nats, (probability, hit) = _chunk_nats(axes, y, table, target)
        dlogits = weight[:, None] * jnp.where(hit, probability - 1, probability)
        dtable = dtable + jnp.einsum("xv,xd->vd", dlogits, y)
        dy = jnp.einsum("xv,vd->xd", dlogits, table)
        return (total + jnp.sum(weight * nats), dtable), dy

    chunks = _chunks(table.shape[0], y_XD.astype(jnp.float32), target_X, weight_X)
    carry = (jnp.float32(0), jnp.zeros_like(table))
    (total, dtable), dy = jax.lax.scan(add, carry, chunks)
    dy = dy.reshape(-1, dy.shape[-1])[: y_XD.shape[0]]
    return total, (dy.astype(y_XD.dtype), dtable.astype(table_VD.dtype))


def _backward(axes, gradients, g):
    # On a mesh these are this shard's parts, and so is g: as psum's transpose has it.
    g = collectives.total(g, axes)
    dy, dtable = ((g * x.astype(jnp.float32)).astype(x.dtype) for x in gradients)
    return dy, dtable, None, None


_nats.defvjp(_forward, _backward)


def correct(
    y_XD: Inexact[Array, "x d"],
    table_VD: Inexact[Array, "v d"],
    target_X: Int[Array, "x"],
    weight_X: Float[Array, "x"],
) -> Float[Array, ""]:
    """The sum of the weights of targets that have the highest logit."""
    table = table_VD.astype(jnp.float32)

    def add(total, chunk):
        y, target, weight = chunk
        best = jnp.argmax(jnp.einsum("xd,vd->xv", y, table), axis=-1)
        return total + jnp.sum(jnp.where(best == target, weight, 0.0)), None

    chunks = _chunks(table.shape[0], y_XD.astype(jnp.float32), target_X, weight_X)
    return jax.lax.scan(add, jnp.float32(0), chunks)[0]


def _chunk_nats(axes, y, table, target):
    """Nats of each token, and its probabilities [x,V] with a mark at the target."""
    logits = jnp.einsum("xd,vd->xv", y, table)
    here = jnp.arange(table.shape[0], dtype=jnp.int32)
    if axes:
        here = here + table.shape[0] * jax.lax.axis_index(axes)
    hit = here[None] == target[:, None]
    top = collectives.largest(jnp.max(logits, axis=-1), axes)
    weight = jnp.exp(logits - top[:, None])
    denominator = collectives.total(jnp.sum(weight, axis=-1), axes)
    right = collectives.total(jnp.sum(jnp.where(hit, logits, 0.0), axis=-1), axes)
    return jnp.log(denominator) + top - right, (weight / denominator[:, None], hit)


def _chunks(vocab, *arrays):
    """Equal parts of the tokens, as few as CHUNK allows; padding weighs nothing."""
    tokens = arrays[0].shape[0]
    parts = max(1, -(-tokens * vocab // CHUNK))
    size = -(-tokens // parts)
    return tuple(
        jnp.pad(x, [(0, parts * size - tokens)] + [(0, 0)] * (x.ndim - 1)).reshape(
            parts, size, *x.shape[1:]
        )
        for x in arrays
    )
