"""Tokens to their experts and back, for use inside `shard_map`.

Rows are copies of tokens, one for each of a token's K choices, sorted by expert. They travel in the
activations' type; an expert's weights (FP8 and FP4 ones too) stay where they are.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Inexact, Int

from v4jax.errors import InputError
from v4jax.ops import derivatives
from v4jax.sharding import collectives
from v4jax.sharding.exchange import plan_exchange
from v4jax.sharding.rules import Layout

UNROLLED = 4  # waves
Ffn = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]


def route(
    layout: Layout,
    x_XD: Inexact[Array, "x d"],
    chosen_XK: Int[Array, "x k"],
    weights_XK: Float[Array, "x k"],
    experts: int,
    ffn: Ffn,
    implementation: str | None = None,
) -> Float[Array, "x d"]:
    """The sum over each token's experts, in the order of its choices.

    That order holds for one device and for `exchange="all_to_all"`. Where shards sum what each of
    them computed ("gather", and tokens that all have) it holds among one shard's experts.

    Args:
      x_XD: this shard's tokens.
      chosen_XK: a token's experts, counted over all shards and different from one another.
      weights_XK: their weights.
      experts: how many there are on all shards; shard i has the i-th part of them.
      ffn: (x_RD, weight_R, sizes_E) -> y_RD, this shard's experts on rows sorted by expert. Rows
        after the first sum(sizes_E) are zeros; what it makes of them is ignored.
      implementation: "reference" for derivatives of every order, on one device.

    Returns:
      [X, D] float32. Differentiable in x, the weights and what `ffn` captures.

    Raises:
      InputError: experts lie on mesh axes of which only some have tokens of their own, or are not
        divided by them.
    """
    axes = layout.axes("expert")
    if not axes:
        return _all_here(x_XD, chosen_XK, weights_XK, experts, ffn, implementation)
    layout.check_divides({"expert": experts})
    spread = {*layout.axes("batch"), *layout.axes("sequence")}
    shared = [axis for axis in axes if axis not in spread]
    if shared and len(shared) < len(axes):
        own = [axis for axis in axes if axis in spread]
        raise InputError(
            f"strategy {layout.strategy.name!r} spreads experts over mesh axes {own}, whose shards "
            f"have different tokens, and {shared}, whose shards have the same; expected either all "
            "or none of them in its axes of batch and sequence"
        )
    gathers = shared or layout.strategy.exchange == "gather"
    one = _tokens_gathered if gathers else _to_their_experts
    moved = () if shared else axes
    return _in_waves(
        functools.partial(one, layout, moved, experts, ffn),
        min(layout.waves, x_XD.shape[0]),
        x_XD,
        chosen_XK,
        weights_XK,
    )


def _in_waves(one, waves, *tokens):
    """`one` on so many parts of the tokens; none needs another's, so they can overlap.

    Many even ones are a loop with two a turn: they still overlap in pairs, and the program does not
    grow with their number.
    """
    if waves <= 1:
        return one(*tokens)
    count = tokens[0].shape[0]
    if waves > UNROLLED and count % waves == 0:
        parts = [x.reshape(waves, count // waves, *x.shape[1:]) for x in tokens]
        _, y = jax.lax.scan(lambda _, part: (None, one(*part)), None, parts, unroll=2)
        return y.reshape(count, *y.shape[2:])
    ends = [count * (wave + 1) // waves for wave in range(waves)]
    starts = [0, *ends[:-1]]
    parts = zip(starts, ends, strict=True)
    return jnp.concatenate([one(*(x[start:end] for x in tokens)) for start, end in parts])


def _all_here(x_XD, chosen_XK, weights_XK, experts, ffn, implementation):
    """One device: every row has its expert here."""
    expert_R = chosen_XK.reshape(-1)
    permutation = _sorted(expert_R, experts, chosen_XK.shape)
    sizes_E = jnp.zeros(experts, jnp.int32).at[expert_R].add(1)
    dispatch, combine = (derivatives.of(f, implementation) for f in (_dispatch, _combine))
    with jax.named_scope("dispatch"):
        rows = dispatch(x_XD, permutation), _rows(weights_XK, permutation, dispatch)
    y_RD = ffn(*rows, sizes_E)
    with jax.named_scope("combine"):
        return combine(y_RD, permutation, "float32")


def _tokens_gathered(layout, axes, experts, ffn, x_XD, chosen_XK, weights_XK):
    """Every shard gets the tokens of all, runs its experts on those that chose them, and sums.

    Args:
      axes: over which tokens differ; none if all shards have the same.
    """
    x_XD, chosen_XK, weights_XK = (
        collectives.gather(x, axes, 0) for x in (x_XD, chosen_XK, weights_XK)
    )
    here = experts // layout.size("expert")
    expert_R = chosen_XK.reshape(-1) - here * layout.index("expert")
    # Rows of other shards' experts go behind the last.
    expert_R = jnp.where((expert_R >= 0) & (expert_R < here), expert_R, here)
    sizes_E = jnp.zeros(here, jnp.int32).at[expert_R].add(1, mode="drop")
    permutation = _sorted(expert_R, here + 1, chosen_XK.shape)._replace(
        total=sizes_E.sum(dtype=jnp.int32)
    )
    with jax.named_scope("dispatch"):
        rows = _dispatch(x_XD, permutation), _rows(weights_XK, permutation)
    y_RD = ffn(*rows, sizes_E)
    with jax.named_scope("combine"):
        y_XD = _combine(y_RD, permutation, "float32")
        if axes:
            return collectives.scatter_total(y_XD, axes, 0)
        return collectives.total(y_XD, layout.axes("expert"))


def _to_their_experts(layout, axes, experts, ffn, x_XD, chosen_XK, weights_XK):
    """Rows to the shards of their experts by all-to-all, and back."""
    expert_R = chosen_XK.reshape(-1)
    permutation = _sorted(expert_R, experts, chosen_XK.shape)
    counts_E = jnp.zeros(experts, jnp.int32).at[expert_R].add(1)
    exchange, counts_SE, passed = plan_exchange(layout, axes, counts_E, chosen_XK.shape)
    here = _by_expert(counts_SE, exchange.rows_there)
    with jax.named_scope("dispatch"):
        x_RD = _dispatch(exchange.there(_dispatch(x_XD, permutation)), here)
        weight_R = _dispatch(exchange.there(_rows(weights_XK, permutation)), here)
    y_RD = ffn(x_RD, weight_R, counts_SE.sum(0, dtype=jnp.int32))
    with jax.named_scope("combine"):
        y_RD = exchange.back(_combine(y_RD, here, y_RD.dtype.name))
        y_XD = _combine(y_RD, permutation, "float32")
    return y_XD if passed is None else jnp.where(passed, jnp.nan, y_XD)


class _Permutation(NamedTuple):
    """Where rows came from and where a token's rows are.

    Attributes:
      source_R: the token and choice of each row, as token * K + choice.
      row_XK: the row of each token's choice.
      total: how many rows are real, the first ones; None for all.
    """

    source_R: jax.Array
    row_XK: jax.Array
    total: jax.Array | None = None


def _sorted(key_R, keys, shape):
    """Places that sort rows by `key_R`, of 0 <= key < keys, equal ones in their old order."""
    rows = key_R.size
    if keys * rows <= 1 << 32:
        # Key and row in one number: to sort one array takes a CPU a quarter of the time of two.
        key_and_row_R = key_R.astype(jnp.uint32) * rows + jnp.arange(rows, dtype=jnp.uint32)
        source_R = (jnp.sort(key_and_row_R) % rows).astype(jnp.int32)
    else:
        source_R = jnp.argsort(key_R, stable=True).astype(jnp.int32)
    row_R = jnp.zeros_like(source_R).at[source_R].set(jnp.arange(source_R.size, dtype=jnp.int32))
    return _Permutation(source_R, row_R.reshape(shape))


def _by_expert(counts_SE, rows):
    """Places that bring rows sorted by (shard they came from, expert) into order of experts."""
    starts_SE = _starts(counts_SE.reshape(-1)).reshape(counts_SE.shape)
    starts_ES = _starts(counts_SE.T.reshape(-1)).reshape(counts_SE.T.shape)
    row_R = _moved(counts_SE, starts_SE, starts_ES.T, rows)
    source_R = _moved(counts_SE.T, starts_ES, starts_SE.T, rows)
    return _Permutation(source_R, row_R[:, None], counts_SE.sum(dtype=jnp.int32))


def _starts(sizes):
    return jnp.cumsum(sizes) - sizes


def _moved(sizes, starts, targets, rows):
    """Where each of `rows` rows goes when blocks at `starts` move to `targets`; the rest stay."""
    index_R = jnp.arange(rows, dtype=jnp.int32)
    distances = (targets - starts).reshape(-1)
    distance_R = jnp.repeat(distances, sizes.reshape(-1), total_repeat_length=rows)
    return jnp.where(index_R < sizes.sum(dtype=jnp.int32), index_R + distance_R, index_R)


def _rows(weights_XK, permutation, dispatch=None):
    """A token's weights, one a row."""
    each = permutation._replace(row_XK=permutation.row_XK.reshape(-1, 1))
    return (dispatch or _dispatch)(weights_XK.reshape(-1), each)


# The two below are each other's transpose, so that neither's gradient is a scatter.


@jax.custom_vjp
def _dispatch(x_X, permutation: _Permutation):
    """Each token [X, ...] in the rows of its choices [R, ...]; zeros in those that are not real."""
    k = permutation.row_XK.shape[1]
    rows = x_X[permutation.source_R // k]
    if permutation.total is None:
        return rows
    return jnp.where(
        _column(jnp.arange(rows.shape[0], dtype=jnp.int32) < permutation.total, rows), rows, 0
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _combine(y_R, permutation: _Permutation, dtype: str):
    """The sum over each token's real rows in the order of its choices, in float32, as `dtype`."""
    total = None
    for choice in range(permutation.row_XK.shape[1]):
        # One choice at a time: the [X, K, ...] of all at once is slow to gather and to sum.
        row_X = permutation.row_XK[:, choice]
        y = y_R[row_X].astype(jnp.float32)
        if permutation.total is not None:
            y = jnp.where(_column(row_X < permutation.total, y), y, 0.0)
        total = y if total is None else total + y
    return total.astype(dtype)


def _column(mask, like):
    return mask.reshape(-1, *[1] * (like.ndim - 1))


def _dispatch_forward(x_X, permutation):
    return _dispatch(x_X, permutation), permutation


def _dispatch_backward(permutation, dy_R):
    return _combine(dy_R, permutation, dy_R.dtype.name), None


def _combine_forward(y_R, permutation, dtype):
    return _combine(y_R, permutation, dtype), (permutation, jnp.zeros((0,), y_R.dtype))


def _combine_backward(dtype, kept, dx_X):
    permutation, like = kept
    return _dispatch(dx_X.astype(like.dtype), permutation), None


_dispatch.defvjp(_dispatch_forward, _dispatch_backward)
_combine.defvjp(_combine_forward, _combine_backward)
