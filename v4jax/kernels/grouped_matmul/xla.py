"""Grouped experts in plain XLA, quick where `jax.lax.ragged_dot` is not (CPU), right everywhere.

Experts that have rows are visited in order. Each takes its weights out of the stack once and walks
over its rows in pieces; a piece is computed at the smallest of a few static sizes that covers what
is left, so little is wasted on uneven groups. Its result is padded to the longest size (a branch
that returned the whole output would copy it) and may run into the next expert's rows: those are
overwritten when their own expert comes. Float w1 and w3 come out of the stacks as one matrix, for
one product in place of two. A handful of rows (a decode step) skips all that: one matrix-vector
product a row and weight.
"""

import functools

import jax
import jax.numpy as jnp

from v4jax import quant
from v4jax.kernels.grouped_matmul import formats, reference

PIECES = (16, *range(32, 385, 32))
# The gradients hold three times as much for each row, and take twice as long to compile.
BACKWARD_PIECES = (16, 64, 128, 192, 256)
FEW_ROWS = 8


def forward(x_XD, gate_X, group_sizes_E, weights, *, limit, rounding):
    """See api.expert_ffn."""
    rows = x_XD.shape[0]
    if rows <= FEW_ROWS:
        return _row_by_row(limit, rounding, x_XD, gate_X, weights, group_sizes_E)
    pieces = _up_to(PIECES, rows)
    inputs = _pad_rows((x_XD, gate_X), pieces)
    joins = formats.trained(weights)

    def take(index):
        expert = _expert(weights, index)
        return _join_halves(expert) if joins else expert

    def compute(size, expert, _, x, gate):
        run = _joined_ffn if joins else reference.gated_ffn
        return _fill(run(x, gate, expert, limit, rounding), pieces[-1])

    def store(out, y, begin, _):
        return jax.lax.dynamic_update_slice_in_dim(out, y, begin, axis=0)

    out = jnp.zeros(inputs[0].shape, rounding.dtype)
    return _walk(group_sizes_E, pieces, take, inputs, compute, store, out)[:rows]


def backward(x_XD, gate_X, group_sizes_E, weights, dy_XD, *, limit, rounding):
    """Gradients of x, gate and weights (None where they are frozen).

    Recomputes each piece and adds its weight gradient in float32; no activation is kept.
    """
    rows = x_XD.shape[0]
    pieces = _up_to(BACKWARD_PIECES, rows)
    inputs = _pad_rows((x_XD, gate_X, dy_XD), pieces)
    trained = formats.trained(weights)

    def compute(size, expert, left, x, gate, dy):
        own = jnp.arange(size) < left
        dy = jnp.where(own[:, None], dy, 0)

        def run(x, gate, expert):
            return reference.gated_ffn(x, gate, expert, limit, rounding)

        if trained:
            dx, dgate, dexpert = jax.vjp(run, x, gate, expert)[1](dy)
        else:
            dx, dgate = jax.vjp(lambda x, g: run(x, g, expert), x, gate)[1](dy)
            dexpert = None
        return _fill(dx, pieces[-1]), _fill(dgate, pieces[-1]), dexpert

    def store(carry, results, begin, e):
        dx, dgate, dweights = carry
        px, pgate, pweights = results
        return (
            jax.lax.dynamic_update_slice_in_dim(dx, px, begin, axis=0),
            jax.lax.dynamic_update_slice_in_dim(dgate, pgate, begin, axis=0),
            jax.tree.map(lambda total, part: _add_at(total, part, e), dweights, pweights),
        )

    zeros = jax.tree.map(lambda w: jnp.zeros(w.shape, jnp.float32), weights) if trained else None
    carry = (jnp.zeros_like(inputs[0]), jnp.zeros_like(inputs[1]), zeros)
    take = functools.partial(_expert, weights)
    dx, dgate, dweights = _walk(group_sizes_E, pieces, take, inputs, compute, store, carry)
    if trained:
        dweights = jax.tree.map(lambda d, w: d.astype(w.dtype), dweights, weights)
    return dx[:rows], dgate[:rows], dweights


def _up_to(pieces, rows):
    """The sizes that so few rows can need."""
    enough = sum(size < rows for size in pieces) + 1
    return pieces[:enough]


def _pad_rows(arrays, pieces):
    """Room behind the last row for the longest piece."""
    return tuple(_fill(x, x.shape[0] + pieces[-1]) for x in arrays)


def _fill(x, size):
    """Rows with zeros behind them up to `size`."""
    return jnp.pad(x, [(0, size - x.shape[0])] + [(0, 0)] * (x.ndim - 1))


def _join_halves(expert):
    """(w1 above w3, w2)."""
    w1, w2, w3 = expert
    return jnp.concatenate([w1, w3]), w2


def _joined_ffn(x, gate, expert, limit, rounding):
    """`reference.gated_ffn` with the weights of `_join_halves`."""
    up, down = expert
    a, b = jnp.split(reference.matmul(x, up, rounding), 2, axis=1)
    z = reference.swiglu(a, b, gate, limit)
    return reference.matmul(quant.round_to(z, rounding.dtype), down, rounding)


def _row_by_row(limit, rounding, x_XD, gate_X, weights, group_sizes_E):
    end = jnp.cumsum(group_sizes_E)
    rows = []
    for row in range(x_XD.shape[0]):
        expert = jnp.sum(end <= row)  # the first group that ends behind this row
        own = _expert(weights, expert)
        one = slice(row, row + 1)
        rows.append(reference.gated_ffn(x_XD[one], gate_X[one], own, limit, rounding))
    return jnp.concatenate(rows)


def _expert(weights, index):
    return jax.tree.map(
        lambda w: jax.lax.dynamic_index_in_dim(w, index, axis=0, keepdims=False), weights
    )


def _walk(group_sizes_E, pieces, take, inputs, compute, store, carry):
    """Over all groups in order, piece by piece.

    Args:
      take: expert -> its weights.
      inputs: padded arrays of rows.
      compute: (size, expert's weights, rows left in the group, *the piece's rows) -> results.
      store: (carry, results, first row, expert) -> carry.
    """
    end_E = jnp.cumsum(group_sizes_E)
    begin_E = end_E - group_sizes_E
    busy = jnp.argsort(group_sizes_E == 0, stable=True)
    branches = [functools.partial(_one_piece, compute, size) for size in pieces]

    def expert(i, carry):
        e = busy[i]
        own = take(e)

        def step(state):
            begin, carry = state
            left = end_E[e] - begin
            which = jnp.sum(jnp.asarray(pieces[:-1], jnp.int32) < left)
            results = jax.lax.switch(which, branches, own, left, begin, inputs)
            return begin + pieces[-1], store(carry, results, begin, e)

        return jax.lax.while_loop(lambda s: s[0] < end_E[e], step, (begin_E[e], carry))[1]

    return jax.lax.fori_loop(0, jnp.sum(group_sizes_E > 0), expert, carry)


def _one_piece(compute, size, own, left, begin, inputs):
    rows = (jax.lax.dynamic_slice_in_dim(x, begin, size, axis=0) for x in inputs)
    return compute(size, own, left, *rows)


def _add_at(total, part, index):
    old = jax.lax.dynamic_index_in_dim(total, index, axis=0, keepdims=False)
    new = old + part.astype(jnp.float32)
    return jax.lax.dynamic_update_index_in_dim(total, new, index, axis=0)
