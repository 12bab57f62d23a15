"""How far the indexer's choice is from the attention that was paid: its loss (V3.2's recipe).

Top-k passes no gradient, so the indexer learns from a KL of its own. Teacher: the probabilities of
the layer's joint softmax (window, entries, sink), summed over heads, L1-normalised over entries.
Student: the softmax of the index scores over the same entries: those chosen or, where a query
attends to all, every visible one. The teacher is fixed, and the caller detaches the indexer's
inputs.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from v4jax.kernels import membership
from v4jax.kernels.indexer_topk import api
from v4jax.kernels.sparse_attention.mass import attention_mass
from v4jax.ops import varying
from v4jax.sharding import collectives

# Elements of the largest array of a block of queries: scores of every head and entry.
BLOCK = 1 << 22
TINY = 1e-30
SUMS = ("kl", "uniform", "captured", "queries")


class Teacher(NamedTuple):
    """What the core attention did: its queries, log-sum-exp, entries and the scale of its scores.

    low and high [B,T]: which entries a query may see. chosen_BTK: those it attended to, -1 for
    none; None for all it may see.
    """

    q_BTNH: Array
    lse_BTN: Array
    entries_BCH: Array
    low_BT: Array
    high_BT: Array
    chosen_BTK: Array | None


class Student(NamedTuple):
    """The indexer's queries, head weights and keys, and how many entries it chooses."""

    q_BTIZ: Array
    weight_BTI: Array
    keys_BCZ: Any  # [B,C,Z], or `CompactKeys` out of a cache; a loss takes the former
    topk: int
    native: bool
    implementation: str | None = None


class _Static(NamedTuple):
    """What of a `Student` is no array."""

    topk: int
    native: bool
    implementation: str | None

    @property
    def options(self):
        # Of the implementations only the plain one is passed on: it alone changes derivatives.
        plain = self.implementation if self.implementation == "reference" else None
        return {"native": self.native, "implementation": plain}


def indexer_loss(
    teacher: Teacher, student: Student, scale: float, heads: tuple[str, ...] = ()
) -> Float[Array, " sums"]:
    """Sums over the queries that see an entry, in the order of `SUMS`; never NaN.

    kl: KL(teacher || student). uniform: KL to a student that knows nothing. captured: the part of
    the teacher's mass that lies on the `topk` entries of highest score; 0 unless a query attends to
    all, since else only those are known. queries: how many there are. Only kl has a gradient.
    heads: mesh axes that the heads are spread over.
    """
    if teacher.entries_BCH.shape[1] == 0:
        return jnp.zeros(len(SUMS), jnp.float32)
    teacher = jax.tree.map(jax.lax.stop_gradient, teacher)
    sums = _of_chosen if teacher.chosen_BTK is not None else _of_all
    keys = student.keys_BCZ
    static = _Static(student.topk, student.native, student.implementation)
    one = jax.checkpoint(functools.partial(sums, static, scale, heads))

    def add(total, block):
        return total + one(teacher.entries_BCH, keys, *block), None

    blocks = _blocks(teacher, student)
    zeros = varying.with_axes_of(jnp.zeros(len(SUMS), jnp.float32), blocks, keys)
    return jax.lax.scan(add, zeros, blocks)[0]


def _of_chosen(static, scale, heads, entries, keys, q, lse, q_index, weight, low, high, chosen):
    mass = collectives.total(attention_mass(q, lse, entries, chosen, scale=scale), heads)
    scores = api.index_scores_at(q_index, weight, keys, chosen, **static.options)
    kl, uniform, there = divergences(mass, scores, chosen >= 0)
    return jnp.stack([kl, uniform, jnp.zeros_like(kl), there])


def _of_all(static, scale, heads, entries, keys, q, lse, q_index, weight, low, high):
    entry = jnp.arange(keys.shape[1], dtype=jnp.int32)[None, None]
    seen_BTC = (entry >= low[..., None]) & (entry < high[..., None])
    logits = jnp.einsum("btnh,bch->btnc", q, entries, preferred_element_type=jnp.float32) * scale
    mass = jnp.sum(jnp.exp(jnp.where(seen_BTC[:, :, None], logits - lse[..., None], -jnp.inf)), 2)
    mass = collectives.total(mass, heads)
    scores = api.index_scores(q_index, weight, keys, **static.options)
    kl, uniform, there = divergences(mass, scores, seen_BTC)
    member = api.indexer_member(q_index, weight, keys, low, high, static.topk, **static.options)
    picked = jnp.where(membership.unpack(member, keys.shape[1]), _normalized(mass), 0.0)
    return jnp.stack([kl, uniform, jnp.sum(picked), there])


def divergences(
    mass_BTK: Float[Array, "b t k"], scores_BTK: Float[Array, "b t k"], there_BTK: Array
) -> tuple[Array, Array, Array]:
    """Sums over queries of KL(teacher || student) and of KL(teacher || uniform), and their number.

    Args:
      mass_BTK: attention paid, not normalised. scores_BTK: index scores.
      there_BTK: which of the entries count.
    """
    teacher = _normalized(jnp.where(there_BTK, mass_BTK, 0.0))
    lowest = jnp.finfo(jnp.float32).min
    student = jax.nn.log_softmax(jnp.where(there_BTK, scores_BTK, lowest), axis=-1)
    student = jnp.where(there_BTK, student, 0.0)
    own = teacher * jnp.log(jnp.maximum(teacher, TINY))
    count = jnp.sum(there_BTK, axis=-1, keepdims=True).astype(jnp.float32)
    kl = jnp.sum(own - teacher * student)
    uniform = jnp.sum(own + teacher * jnp.log(jnp.maximum(count, 1.0)))
    return kl, jax.lax.stop_gradient(uniform), jnp.sum(count > 0).astype(jnp.float32)


def _normalized(mass):
    return mass / jnp.maximum(jnp.sum(mass, axis=-1, keepdims=True), TINY)


def _blocks(teacher, student):
    """The arrays with a query axis, [blocks, B, Q, ...]; queries of the padding see no entry."""
    batch, length, heads, _ = teacher.q_BTNH.shape
    block = max(1, min(length, BLOCK // (batch * heads * teacher.entries_BCH.shape[1])))
    queries = [teacher.q_BTNH, teacher.lse_BTN, student.q_BTIZ, student.weight_BTI]
    arrays = [*queries, teacher.low_BT, teacher.high_BT]
    fill = [0] * len(arrays)
    if teacher.chosen_BTK is not None:
        arrays, fill = [*arrays, teacher.chosen_BTK], [*fill, -1]
    return tuple(_cut(x, block, value) for x, value in zip(arrays, fill, strict=True))


def _cut(x, block, value):
    padding = [(0, 0), (0, -x.shape[1] % block)] + [(0, 0)] * (x.ndim - 2)
    x = jnp.pad(x, padding, constant_values=value)
    return jnp.moveaxis(x.reshape(x.shape[0], -1, block, *x.shape[2:]), 1, 0)
