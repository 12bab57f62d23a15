"""The cross-entropy of the output head, a block of the vocabulary at a time.

No array of tokens x vocabulary is ever held: one pass over the table finds each token's maximum
and denominator, as flash attention does, and with gradients a second pass makes the logits of a
block again, and of them the block's [v,D] of the table's gradient, written once, and its share of
[X,D]. A quarter more operations than with kept logits, and faster: a block stays in the cache.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Inexact, Int

from v4jax.ops import products
from v4jax.sharding import collectives

# Logits of a block, float32; more where the states themselves are more.
BLOCK = 1 << 21


def cross_entropy(
    y_XD: Inexact[Array, "x d"],
    table_VD: Inexact[Array, "v d"],
    target_X: Int[Array, " x"],
    weight_X: Float[Array, " x"],
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
    y, target = y_XD.astype(jnp.float32), _local(axes, table_VD, target_X)
    return jnp.sum(weight_X * _softmax(axes, y, table_VD, target)[0])


def _forward(axes, y_XD, table_VD, target_X, weight_X):
    y, target = y_XD.astype(jnp.float32), _local(axes, table_VD, target_X)
    nats, top, denominator = _softmax(axes, y, table_VD, target)
    scale = weight_X / denominator

    def add(carry, block):
        dy, dtable = carry
        start, rows, logits, hit, first = block
        probability = jnp.exp(logits - top[:, None]) * scale[:, None]
        dlogits = jnp.where(hit, probability - weight_X[:, None], probability)
        # Rows that were in the block before get the same gradient again.
        drows = products.outer(dlogits, y).astype(dtable.dtype)
        dtable = jax.lax.dynamic_update_slice_in_dim(dtable, drows, start, 0)
        return dy + jnp.einsum("xv,vd->xd", dlogits, jnp.where(first[:, None], rows, 0)), dtable

    zeros = (jnp.zeros_like(y), jnp.zeros_like(table_VD))
    dy, dtable = _over_blocks(add, zeros, y, table_VD, target)
    return jnp.sum(weight_X * nats), (dy.astype(y_XD.dtype), dtable)


def _backward(axes, gradients, g):
    # On a mesh these are this shard's parts, and so is g: as psum's transpose has it.
    g = collectives.total(g, axes)
    dy, dtable = ((g * x.astype(jnp.float32)).astype(x.dtype) for x in gradients)
    return dy, dtable, None, None


_nats.defvjp(_forward, _backward)


def correct(
    y_XD: Inexact[Array, "x d"],
    table_VD: Inexact[Array, "v d"],
    target_X: Int[Array, " x"],
    weight_X: Float[Array, " x"],
) -> Float[Array, ""]:
    """The sum of the weights of targets that have the highest logit, the lowest id of equals."""

    def add(carry, block):
        top, best = carry
        start, _, logits, _, _ = block
        here = jnp.max(logits, axis=-1)
        at = start + jnp.argmax(logits, axis=-1).astype(jnp.int32)
        return jnp.maximum(top, here), jnp.where(here > top, at, best)

    y = y_XD.astype(jnp.float32)
    carry = (jnp.full(target_X.shape, -jnp.inf), jnp.zeros(target_X.shape, jnp.int32))
    _, best = _over_blocks(add, carry, y, table_VD, target_X)
    return jnp.sum(jnp.where(best == target_X, weight_X, 0.0))


def _local(axes, table_VD, target_X):
    """Targets counted from this shard's first row of the table."""
    return target_X - table_VD.shape[0] * jax.lax.axis_index(axes) if axes else target_X


def _softmax(axes, y, table, target):
    """Each token's nats, its largest logit and its denominator sum exp(logit - largest)."""

    def add(carry, block):
        top, denominator, right = carry
        start, _, logits, hit, first = block
        higher = jnp.maximum(top, jnp.max(logits, axis=-1))
        weight = jnp.where(first[None], jnp.exp(logits - higher[:, None]), 0)
        denominator = denominator * jnp.exp(top - higher) + jnp.sum(weight, axis=-1)
        return higher, denominator, right + _picked(logits, hit & first[None], target - start)

    nothing = jnp.zeros(target.shape, jnp.float32)
    carry = (jnp.full(target.shape, -jnp.inf), nothing, nothing)
    top, denominator, right = _over_blocks(add, carry, y, table, target)
    highest = collectives.largest(top, axes)
    denominator = collectives.total(denominator * jnp.exp(top - highest), axes)
    nats = jnp.log(denominator) + highest - collectives.total(right, axes)
    return nats, highest, denominator


def _picked(logits, hit, target):
    """Each token's logit at its target, 0 where this block does not have it."""

    def gather(logits, hit, target):
        index = jnp.clip(target, 0, logits.shape[1] - 1)[:, None]
        value, here = (jnp.take_along_axis(x, index, axis=1)[:, 0] for x in (logits, hit))
        return jnp.where(here, value, 0)

    def masked(logits, hit, _):
        return jnp.sum(jnp.where(hit, logits, 0), axis=-1)

    # A masked sum is two passes over the block on a CPU, and none of its own elsewhere.
    return jax.lax.platform_dependent(logits, hit, target, cpu=gather, default=masked)


def _over_blocks(add, carry, y, table, target):
    """Folds `add` over equal blocks of the table: (start, rows, logits, hit, first).

    rows [v,D] and logits [x,v] in float32; hit [x,v] marks the target; the last block reaches
    back where blocks do not divide the vocabulary, and `first` [v] marks what is new in it.
    """
    vocab, width = table.shape
    wide = max(BLOCK // max(y.shape[0], 1), width, 1)
    blocks = -(-vocab // wide)
    wide = -(-vocab // blocks)

    def step(carry, number):
        start = jnp.minimum(number * wide, vocab - wide)
        rows = jax.lax.dynamic_slice_in_dim(table, start, wide).astype(jnp.float32)
        here = start + jnp.arange(wide, dtype=jnp.int32)
        hit = here[None] == target[:, None]
        first = here >= number * wide if vocab % wide else jnp.ones(wide, bool)
        return add(carry, (start, rows, jnp.einsum("xd,vd->xv", y, rows), hit, first)), None

    return jax.lax.scan(step, carry, jnp.arange(blocks, dtype=jnp.int32))[0]
