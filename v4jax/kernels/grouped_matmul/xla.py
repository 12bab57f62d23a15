"""Grouped experts in plain XLA, quick where `jax.lax.ragged_dot` is not (CPU), right everywhere.

Experts that have rows are visited in order. Each takes its weights out of the stack once and walks
over its rows in pieces; a piece is computed at the smallest of a few static sizes that covers what
is left, so little is wasted on uneven groups. Its result is padded to the longest size (a branch
that returned the whole output would copy it) and may run into the next expert's rows: those are
overwritten when their own expert comes. A handful of rows (a decode step) skips all that: one
matrix-vector product a row and weight.
"""

import functools

import jax
import jax.numpy as jnp

from v4jax.kernels.grouped_matmul import formats, reference

PIECES = (16, 64, 128, 192, 256)
LONGEST = PIECES[-1]
FEW_ROWS = 8


def forward(x_XD, gate_X, group_sizes_E, weights, *, limit, rounding):
    """See api.expert_ffn."""
    rows = x_XD.shape[0]
    if rows <= FEW_ROWS:
        return _row_by_row(limit, rounding, x_XD, gate_X, weights, group_sizes_E)
    inputs = (_pad_rows(x_XD), _pad_rows(gate_X))

    def compute(size, expert, _, x, gate):
        return _fill(reference.gated_ffn(x, gate, expert, limit, rounding), size)

    def store(out, y, begin, _):
        return jax.lax.dynamic_update_slice_in_dim(out, y, begin, axis=0)

    out = jnp.zeros(inputs[0].shape, rounding.dtype)
    return _walk(group_sizes_E, weights, inputs, compute, store, out)[:rows]


def backward(x_XD, gate_X, group_sizes_E, weights, dy_XD, *, limit, rounding):
    """Gradients of x, gate and weights (None where they are frozen).

    Recomputes each piece and adds its weight gradient in float32; no activation is kept.
    """
    rows = x_XD.shape[0]
    inputs = (_pad_rows(x_XD), _pad_rows(gate_X), _pad_rows(dy_XD))
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
        return _fill(dx, size), _fill(dgate, size), dexpert

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
    dx, dgate, dweights = _walk(group_sizes_E, weights, inputs, compute, store, carry)
    if trained:
        dweights = jax.tree.map(lambda d, w: d.astype(w.dtype), dweights, weights)
    return dx[:rows], dgate[:rows], dweights


def _pad_rows(x):
    """Room behind the last row for the longest piece."""
    return jnp.pad(x, [(0, LONGEST)] + [(0, 0)] * (x.ndim - 1))


def _fill(x, size):
    """A piece's rows with zeros up to the longest piece."""
    return jnp.pad(x, [(0, LONGEST - size)] + [(0, 0)] * (x.ndim - 1))


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


def _walk(group_sizes_E, weights, inputs, compute, store, carry):
    """Over all groups in order, piece by piece.

    Args:
      inputs: padded arrays of rows.
      compute: (size, expert's weights, rows left in the group, *the piece's rows) -> results.
      store: (carry, results, first row, expert) -> carry.
    """
    end_E = jnp.cumsum(group_sizes_E)
    begin_E = end_E - group_sizes_E
    busy = jnp.argsort(group_sizes_E == 0, stable=True)

    def expert(i, carry):
        e = busy[i]
        own = _expert(weights, e)

        def step(state):
            begin, carry = state
            left = end_E[e] - begin
            rows = [jax.lax.dynamic_slice_in_dim(x, begin, LONGEST, axis=0) for x in inputs]
            which = jnp.sum(jnp.asarray(PIECES[:-1]) < left)
            branches = [functools.partial(_one_piece, compute, size) for size in PIECES]
            results = jax.lax.switch(which, branches, own, left, *rows)
            return begin + LONGEST, store(carry, results, begin, e)

        return jax.lax.while_loop(lambda s: s[0] < end_E[e], step, (begin_E[e], carry))[1]

    return jax.lax.fori_loop(0, jnp.sum(group_sizes_E > 0), expert, carry)


def _one_piece(compute, size, own, left, *rows):
    return compute(size, own, left, *(x[:size] for x in rows))


def _add_at(total, part, index):
    old = jax.lax.dynamic_index_in_dim(total, index, axis=0, keepdims=False)
    new = old + part.astype(jnp.float32)
    return jax.lax.dynamic_update_index_in_dim(total, new, index, axis=0)
