"""A few tokens through every expert, on a CPU: a batch of decode steps whose rows choose most.

XLA:CPU copies an expert's matrix before it multiplies with it, at three times the cost of reading
it. Three products over the whole stacks copy nothing, and at so few rows they take as long as the
weights take to be read, whichever experts were chosen. A token's result depends on no other token.
"""

import jax
import jax.numpy as jnp

from v4jax.kernels.grouped_matmul import swiglu

MOST_TOKENS = 32


def pays(tokens: int, choices: int, weights, rounding) -> bool:
    """Whether this is faster than the chosen experts one by one.

    Args:
      tokens: how many there are, each with `choices` experts.
      weights: stacked w1, w2, w3; stored forms and bfloat16 would all be expanded.
    """
    if rounding.native or rounding.dtype != "float32":
        return False
    if not all(isinstance(w, jax.Array) and w.dtype == jnp.float32 for w in weights):
        return False
    return tokens <= MOST_TOKENS and 2 * tokens * choices >= weights[0].shape[0]


@jax.named_scope("expert_ffn")
def of_tokens(x_XD, chosen_XK, gates_XK, weights, limit, rounding):
    """The sum over each token's experts, in the order of its choices, [X, D]; all float32."""
    del rounding  # float32: see `pays`
    w1_EFD, w2_EDF, w3_EFD = weights
    x_DX = x_XD.T
    expert = jnp.arange(w1_EFD.shape[0], dtype=chosen_XK.dtype)[:, None, None]
    gate_EX = jnp.where(chosen_XK[None] == expert, gates_XK[None], 0).sum(-1)
    # The weights on the left: there, XLA:CPU packs the rows and not the weights.
    a_EFX, b_EFX = (jnp.einsum("efd,dx->efx", w, x_DX) for w in (w1_EFD, w3_EFD))
    z_EFX = swiglu.forward(a_EFX, b_EFX, gate_EX[:, None], limit)
    y_EDX = jnp.einsum("edf,efx->edx", w2_EDF, z_EFX)
    token = jnp.arange(x_XD.shape[0])
    picked = (
        jnp.where(_seen(chosen_XK, choice)[:, None], 0, y_EDX[chosen_XK[:, choice], :, token])
        for choice in range(chosen_XK.shape[1])
    )
    return sum(picked, start=0.0)


def _seen(chosen_XK, choice):
    """Whether an earlier choice [X] is the same expert: a hash table may name one twice.

    Its gates are summed above, so that it counts once.
    """
    return (chosen_XK[:, :choice] == chosen_XK[:, choice : choice + 1]).any(axis=1)
