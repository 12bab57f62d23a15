"""Grouped experts in plain XLA, fast where `jax.lax.ragged_dot` is not (CPU), right on any backend.

An expert's rows are cut into pieces: as many of the longest as there are, and one of the smallest
of a few static sizes that covers what is left, so little is wasted on uneven groups. All last
pieces of one size are a loop of their own, which writes its results where they belong: a branch on
the size would have to give back results padded to the longest. A piece may run into the next
expert's rows, which it leaves as they were. Float w1 and w3 are one matrix, for one product in
place of two. A handful of rows (a decode step) skips all that: row_by_row.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from v4jax import quant
from v4jax.kernels.grouped_matmul import formats, reference, row_by_row
from v4jax.ops import varying

LONGEST = 384
ALIGNED = 16  # rows
# Steps from one size to the next, in parts of the mean group. The gradients' pieces are fewer: they
# take three times as long to compile.
FORWARD_PARTS, BACKWARD_PARTS = 8, 4


def forward(x_XD, gate_X, group_sizes_E, weights, *, limit, rounding):
    """See api.expert_ffn."""
    rows = x_XD.shape[0]
    if rows <= row_by_row.FEW_ROWS:
        return row_by_row.forward(x_XD, gate_X, group_sizes_E, weights, limit, rounding)
    pieces = _piece_sizes(rows, group_sizes_E.size, FORWARD_PARTS)
    inputs = _pad_rows((x_XD, gate_X), pieces)
    joins = formats.trained(weights)

    def take(index):
        expert = _expert(weights, index)
        return _join_halves(*expert) if joins else expert

    def step(out, piece, expert, x, gate):
        run = _joined_ffn if joins else reference.gated_ffn
        return _put(out, run(x, gate, expert, limit, rounding), piece)

    out = jnp.zeros(inputs[0].shape, rounding.dtype)
    return _walk(group_sizes_E, rows, pieces, take, inputs, step, out)[:rows]


def backward(x_XD, gate_X, group_sizes_E, weights, dy_XD, *, limit, rounding):
    """Gradients of x, gate and weights (None where they are frozen).

    Recomputes each piece and adds its weight gradient in float32; no activation is kept.
    """
    rows = x_XD.shape[0]
    pieces = _piece_sizes(rows, group_sizes_E.size, BACKWARD_PARTS)
    inputs = _pad_rows((x_XD, gate_X, dy_XD), pieces)
    trained = formats.trained(weights)
    stacks = _join_halves(*weights) if trained else weights

    def step(carry, piece, expert, x, gate, dy):
        dx, dgate, dstacks = carry
        dy = jnp.where(_own(piece, x)[:, None], dy, 0)

        def run(x, gate, expert):
            ffn = _joined_ffn if trained else reference.gated_ffn
            return ffn(x, gate, expert, limit, rounding)

        if trained:
            px, pgate, parts = jax.vjp(run, x, gate, expert)[1](dy)
            dstacks = jax.tree.map(lambda total, part: _add_at(total, part, piece), dstacks, parts)
        else:
            px, pgate = jax.vjp(lambda x, gate: run(x, gate, expert), x, gate)[1](dy)
        return _put(dx, px, piece), _put(dgate, pgate, piece), dstacks

    zeros = jax.tree.map(lambda w: jnp.zeros(w.shape, jnp.float32), stacks) if trained else None
    carry = (jnp.zeros_like(inputs[0]), jnp.zeros_like(inputs[1]), zeros)
    take = functools.partial(_expert, stacks)
    dx, dgate, dstacks = _walk(group_sizes_E, rows, pieces, take, inputs, step, carry)
    if not trained:
        return dx[:rows], dgate[:rows], None
    up, down = dstacks
    dw1, dw3 = jnp.split(up, 2, axis=1)
    dweights = (d.astype(w.dtype) for d, w in zip((dw1, down, dw3), weights, strict=True))
    return dx[:rows], dgate[:rows], tuple(dweights)


def _piece_sizes(rows, groups, parts):
    """Even steps, of a part of the mean group, up to twice it; about LONGEST at most."""
    typical = min(-(-rows // groups), LONGEST // 2)
    step = ALIGNED * -(-typical // (parts * ALIGNED))
    return tuple(range(step, min(2 * typical, rows) + step, step))


def _pad_rows(arrays, pieces):
    """Room behind the last row for the longest piece."""
    return tuple(jnp.pad(x, [(0, pieces[-1])] + [(0, 0)] * (x.ndim - 1)) for x in arrays)


def _join_halves(w1, w2, w3):
    """(w1 above w3, w2), of one expert or of a stack."""
    return jnp.concatenate([w1, w3], axis=-2), w2


def _joined_ffn(x, gate, expert, limit, rounding):
    """`reference.gated_ffn` with the weights of `_join_halves`."""
    up, down = expert
    a, b = jnp.split(reference.matmul(x, up, rounding), 2, axis=1)
    z = reference.swiglu(a, b, gate, limit)
    return reference.matmul(quant.round_to(z, rounding.dtype), down, rounding)


def _expert(weights, index):
    return jax.tree.map(
        lambda w: jax.lax.dynamic_index_in_dim(w, index, axis=0, keepdims=False), weights
    )


class _Piece(NamedTuple):
    """Rows of one expert: where they begin and how many, at most as many as are computed."""

    expert: jax.Array
    begin: jax.Array
    rows: jax.Array


def _walk(group_sizes_E, rows, sizes, take, inputs, step, carry):
    """Over all groups, piece by piece.

    Args:
      rows: how many there are in all.
      sizes: of pieces, ascending.
      take: expert -> its weights.
      inputs: padded arrays of rows.
      step: (carry, piece, expert's weights, *the piece's rows) -> carry.
    """
    carry = varying.with_axes_of(carry, group_sizes_E, inputs)
    longest = sizes[-1]
    begin_E = jnp.cumsum(group_sizes_E) - group_sizes_E
    whole_E, left_E = group_sizes_E // longest, group_sizes_E % longest

    def run(size, carry, piece, expert):
        own = (jax.lax.dynamic_slice_in_dim(x, piece.begin, size, axis=0) for x in inputs)
        return step(carry, piece, expert, *own)

    def whole_pieces(e, carry):
        expert = take(e)

        def one(i, carry):
            return run(longest, carry, _Piece(e, begin_E[e] + i * longest, longest), expert)

        return jax.lax.fori_loop(0, whole_E[e], one, carry)

    def last_piece(size, e, carry):
        piece = _Piece(e, begin_E[e] + whole_E[e] * longest, left_E[e])
        return run(size, carry, piece, take(e))

    if rows >= longest:
        carry = _by_kind(jnp.minimum(whole_E, 1), [whole_pieces], carry)
    # 0 where nothing is left, and i + 1 for the i-th size.
    shorter = jnp.asarray([(0, *sizes[:-1])], jnp.int32)
    kind_E = jnp.sum(left_E[:, None] > shorter, axis=1, dtype=jnp.int32)
    return _by_kind(kind_E, [functools.partial(last_piece, size) for size in sizes], carry)


def _by_kind(kind_E, bodies, carry):
    """bodies[kind - 1](e, carry) for each e whose kind is not 0, kind by kind."""
    order = jnp.argsort(kind_E, stable=True)
    ends = jnp.sum(kind_E[None] <= jnp.arange(len(bodies) + 1)[:, None], axis=1, dtype=jnp.int32)
    for i, body in enumerate(bodies):
        carry = jax.lax.fori_loop(
            ends[i], ends[i + 1], lambda n, carry, body=body: body(order[n], carry), carry
        )
    return carry


def _own(piece, rows):
    """Which of the computed rows are the piece's."""
    return jnp.arange(rows.shape[0]) < piece.rows


def _put(out, rows, piece):
    """The piece's rows in their place."""
    own = _own(piece, rows).reshape(-1, *[1] * (rows.ndim - 1))
    old = jax.lax.dynamic_slice_in_dim(out, piece.begin, rows.shape[0], axis=0)
    rows = jnp.where(own, rows, old)
    return jax.lax.dynamic_update_slice_in_dim(out, rows, piece.begin, axis=0)


def _add_at(total, part, piece):
    old = jax.lax.dynamic_index_in_dim(total, piece.expert, axis=0, keepdims=False)
    new = old + part.astype(jnp.float32)
    return jax.lax.dynamic_update_index_in_dim(total, new, piece.expert, axis=0)
