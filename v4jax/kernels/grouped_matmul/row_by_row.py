"""A handful of rows through their experts one by one, in plain XLA: a decode step of one token."""

import functools

import jax
import jax.numpy as jnp

from v4jax.kernels.grouped_matmul import reference

FEW_ROWS = 8


@jax.named_scope("expert_ffn")
def of_tokens(x_XD, chosen_XK, gates_XK, weights, limit, rounding):
    """The sum over each token's experts, in the order of its choices, [X, D] float32."""

    def one(token):
        x_1D, gates_1K = (x[token : token + 1] for x in (x_XD, gates_XK))
        rows = (
            _row(x_1D, gates_1K[:, choice], weights, chosen_XK[token, choice], limit, rounding)
            for choice in range(chosen_XK.shape[1])
        )
        return functools.reduce(jnp.add, (row.astype(jnp.float32) for row in rows))

    return jnp.concatenate([one(token) for token in range(x_XD.shape[0])])


def forward(x_XD, gate_X, group_sizes_E, weights, limit, rounding):
    """See api.expert_ffn."""
    end, rows = jnp.cumsum(group_sizes_E), []
    for row in range(x_XD.shape[0]):
        expert = jnp.sum(end <= row)  # the first group that ends behind this row
        own = slice(row, row + 1)
        rows.append(_row(x_XD[own], gate_X[own], weights, expert, limit, rounding))
    return jnp.concatenate(rows)


def _row(x_1D, gate_1, weights, expert, limit, rounding):
    take = functools.partial(jax.lax.dynamic_index_in_dim, index=expert, axis=0, keepdims=False)
    return reference.gated_ffn(x_1D, gate_1, jax.tree.map(take, weights), limit, rounding)
