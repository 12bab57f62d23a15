"""One row at a time through its expert, in plain XLA: few rows, or many more experts than rows.

XLA:CPU copies an expert's matrix out of its stack before a product. Written as sums of a few terms
the product is an elementwise operation, which reads the stack where it stands.
"""

import functools

import jax
import jax.numpy as jnp

from v4jax import quant
from v4jax.kernels.grouped_matmul import formats, reference, swiglu
from v4jax.ops import varying

UNROLLED = 8  # rows
TERMS, LANES = 32, 16  # at most so many terms of a sum; at least so many sums side by side


def serves(rows: int, weights, rounding) -> bool:
    """Whether this is faster than pieces of each expert's rows."""
    if rows <= UNROLLED:
        return True
    return _reads_in_place(weights, rounding) and 2 * rows <= weights[0].shape[0]


@jax.named_scope("expert_ffn")
def of_tokens(x_XD, chosen_XK, gates_XK, weights, limit, rounding):
    """The sum over each token's experts, in the order of its choices, [X, D] float32."""
    ffn = _in_place if _reads_in_place(weights, rounding) else _copied

    def one(token):
        x_1D, gates_1K = (x[token : token + 1] for x in (x_XD, gates_XK))
        rows = (
            ffn(x_1D, gates_1K[:, choice], weights, chosen_XK[token, choice], limit, rounding)
            for choice in range(chosen_XK.shape[1])
        )
        return functools.reduce(jnp.add, (row.astype(jnp.float32) for row in rows))

    return jnp.concatenate([one(token) for token in range(x_XD.shape[0])])


def forward(x_XD, gate_X, group_sizes_E, weights, limit, rounding):
    """See api.expert_ffn."""
    rows, end = x_XD.shape[0], jnp.cumsum(group_sizes_E)
    ffn = _in_place if _reads_in_place(weights, rounding) else _copied

    def one(row):
        # The first group that ends behind this row; for a row behind all of them, the last.
        expert = jnp.minimum(jnp.sum(end <= row, dtype=jnp.int32), end.size - 1)
        x_1D, gate_1 = (jax.lax.dynamic_slice_in_dim(x, row, 1) for x in (x_XD, gate_X))
        return ffn(x_1D, gate_1, weights, expert, limit, rounding)

    if rows <= UNROLLED:
        return jnp.concatenate([one(row) for row in range(rows)])

    def step(row, out):
        return jax.lax.dynamic_update_slice_in_dim(out, one(row), row, axis=0)

    out = jnp.zeros(x_XD.shape, rounding.dtype)
    out = varying.with_axes_of(out, group_sizes_E, x_XD, gate_X)
    return jax.lax.fori_loop(0, rows, step, out)


def _reads_in_place(weights, rounding):
    if rounding.native or not formats.trained(weights):
        return False
    return all(_lanes(w.shape[-1]) for w in weights)


def _copied(x_1D, gate_1, weights, expert, limit, rounding):
    take = functools.partial(jax.lax.dynamic_index_in_dim, index=expert, axis=0, keepdims=False)
    return reference.gated_ffn(x_1D, gate_1, jax.tree.map(take, weights), limit, rounding)


def _in_place(x_1D, gate_1, weights, expert, limit, rounding):
    w1, w2, w3 = weights
    a, b = (_times(w, expert, x_1D, rounding.dtype) for w in (w1, w3))
    z = swiglu.forward(a.astype(jnp.float32), b.astype(jnp.float32), gate_1[:, None], limit)
    return _times(w2, expert, quant.round_to(z, rounding.dtype), rounding.dtype)


def _times(w_EFD, expert, x_1D, dtype):
    """x @ w[expert].T, in LANES or more sums side by side, then the sum of those."""
    (_, f, d), lanes = w_EFD.shape, _lanes(w_EFD.shape[-1])

    def term(at):
        w_FL = jax.lax.dynamic_slice(w_EFD, (expert, 0, at), (1, f, lanes))[0]
        # As the products of the other paths: weights in the activations' type, float32 sums.
        return w_FL.astype(dtype).astype(jnp.float32) * x_1D[:, at : at + lanes].astype(jnp.float32)

    sums_FL = functools.reduce(jnp.add, map(term, range(0, d, lanes)))
    return quant.round_to(sums_FL.sum(-1), dtype)[None]


def _lanes(d):
    """How many sums side by side, 0 if none divides d."""
    lanes = LANES * -(-d // (LANES * TERMS))
    return 0 if d % lanes else lanes
