"""Grouped experts in plain XLA, quick where `jax.lax.ragged_dot` is not (CPU), right everywhere.

Experts that have rows are visited in order. Each takes its weights out of the stack once and walks
over its rows in pieces; a piece's length is the smallest of a short list of static sizes that
covers what is left, so little is wasted on uneven groups. A piece may run into the next expert's
rows: those are overwritten when their own expert comes. A handful of rows (a decode step) skips
all that: one matrix-vector product a row and weight.
"""

import functools

import jax
import jax.numpy as jnp

from v4jax.kernels.grouped_matmul import reference

PIECES = (8, 32, 64, 96, 128, 192, 256, 384, 512)
FEW_ROWS = 8


def expert_ffn(x_XD, gate_X, group_sizes_E, weights, limit, rounding):
    """See api.expert_ffn."""
    return _ffn(limit, rounding, x_XD, gate_X, weights, group_sizes_E)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _ffn(limit, rounding, x_XD, gate_X, weights, group_sizes_E):
    if x_XD.shape[0] <= FEW_ROWS:
        return _row_by_row(limit, rounding, x_XD, gate_X, weights, group_sizes_E)
    padded, gate = _pad_rows(x_XD), _pad_rows(gate_X)

    def piece(expert, begin, size, _, out):
        y = reference.gated_ffn(
            _take(padded, begin, size), _take(gate, begin, size), expert, limit, rounding
        )
        return jax.lax.dynamic_update_slice_in_dim(out, y, begin, axis=0)

    out = jnp.zeros(padded.shape, rounding.dtype)
    return _walk(group_sizes_E, weights, x_XD.shape[0], piece, out)[: x_XD.shape[0]]


def _pieces(rows):
    """The static sizes in use for X rows: up to the first that covers them all."""
    first = next((i for i, size in enumerate(PIECES) if size >= rows), len(PIECES) - 1)
    return PIECES[: first + 1]


def _pad_rows(x):
    """Room behind the last row for the longest piece."""
    return jnp.pad(x, [(0, _pieces(x.shape[0])[-1])] + [(0, 0)] * (x.ndim - 1))


def _take(x, begin, size):
    return jax.lax.dynamic_slice_in_dim(x, begin, size, axis=0)


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


def _walk(group_sizes_E, weights, rows, piece, carry):
    """Calls piece(expert weights, begin, size, (expert, end), carry) over all groups in order."""
    sizes = _pieces(rows)
    end_E = jnp.cumsum(group_sizes_E)
    begin_E = end_E - group_sizes_E
    busy = jnp.argsort(group_sizes_E == 0, stable=True)

    def expert(i, carry):
        e = busy[i]
        own, end = _expert(weights, e), end_E[e]

        def step(state):
            begin, carry = state
            left = end - begin
            which = jnp.sum(jnp.asarray(sizes[:-1], jnp.int32) < left)
            run = [functools.partial(_one_piece, piece, size, own, (e, end)) for size in sizes]
            carry = jax.lax.switch(which, run, begin, carry)
            return begin + jnp.asarray(sizes, jnp.int32)[which], carry

        return jax.lax.while_loop(lambda s: s[0] < end, step, (begin_E[e], carry))[1]

    return jax.lax.fori_loop(0, jnp.sum(group_sizes_E > 0), expert, carry)


def _one_piece(piece, size, own, place, begin, carry):
    return piece(own, begin, size, place, carry)


def _ffn_fwd(limit, rounding, x_XD, gate_X, weights, group_sizes_E):
    out = _ffn(limit, rounding, x_XD, gate_X, weights, group_sizes_E)
    return out, (x_XD, gate_X, weights, group_sizes_E)


def _ffn_bwd(limit, rounding, saved, dout):
    """Recomputes each piece and adds its weight gradient in float32; no activation is kept."""
    x_XD, gate_X, weights, group_sizes_E = saved
    rows = x_XD.shape[0]
    x, gate, dy = _pad_rows(x_XD), _pad_rows(gate_X), _pad_rows(dout)
    trained = _differentiable(weights)

    def piece(expert, begin, size, place, carry):
        e, end = place
        dx, dgate, dweights = carry
        own = begin + jnp.arange(size) < end
        run = functools.partial(reference.gated_ffn, limit=limit, rounding=rounding)
        args = (_take(x, begin, size), _take(gate, begin, size))
        cotangent = jnp.where(own[:, None], _take(dy, begin, size), 0)
        if trained:
            _, vjp = jax.vjp(lambda x, g, w: run(x, g, w), *args, expert)
            px, pgate, pw = vjp(cotangent)
            dweights = jax.tree.map(lambda total, part: _add_at(total, part, e), dweights, pw)
        else:
            _, vjp = jax.vjp(lambda x, g: run(x, g, expert), *args)
            px, pgate = vjp(cotangent)
        dx = jax.lax.dynamic_update_slice_in_dim(dx, px, begin, axis=0)
        dgate = jax.lax.dynamic_update_slice_in_dim(dgate, pgate, begin, axis=0)
        return dx, dgate, dweights

    zeros = jax.tree.map(lambda w: jnp.zeros(w.shape, jnp.float32), weights) if trained else None
    carry = (jnp.zeros_like(x), jnp.zeros_like(gate), zeros)
    dx, dgate, dweights = _walk(group_sizes_E, weights, rows, piece, carry)
    if trained:
        dweights = jax.tree.map(lambda d, w: d.astype(w.dtype), dweights, weights)
    return dx[:rows], dgate[:rows], dweights, None


def _differentiable(weights):
    return all(jnp.issubdtype(w.dtype, jnp.floating) for w in jax.tree.leaves(weights)) and not any(
        w.dtype == jnp.float8_e4m3fn for w in jax.tree.leaves(weights)
    )


def _add_at(total, part, index):
    old = jax.lax.dynamic_index_in_dim(total, index, axis=0, keepdims=False)
    new = old + part.astype(jnp.float32)
    return jax.lax.dynamic_update_index_in_dim(total, new, index, axis=0)


_ffn.defvjp(_ffn_fwd, _ffn_bwd)
