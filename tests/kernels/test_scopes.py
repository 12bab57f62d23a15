"""A profile reads like the code: an operation's instructions carry its name."""

import functools

import jax
import jax.numpy as jnp
import pytest

from v4jax.kernels.grouped_matmul import api as experts
from v4jax.kernels.hyper_connections import api as mixing
from v4jax.kernels.indexer_topk import api as indexer
from v4jax.kernels.sparse_attention import api as attention

FLOAT, INT = jnp.float32, jnp.int32


def attend(q, sink, rows, first):
    return attention.sparse_attention(q, sink, scale=1.0, window_BSH=rows, first_BT=first, window=2)


CASES = {
    "sparse_attention": (
        attend,
        [((1, 3, 2, 8), FLOAT), ((2,), FLOAT), ((1, 3, 8), FLOAT), ((1, 3), INT)],
    ),
    "index_scores": (
        indexer.index_scores,
        [((1, 3, 2, 8), FLOAT), ((1, 3, 2), FLOAT), ((1, 5, 8), FLOAT)],
    ),
    "expert_ffn": (
        functools.partial(experts.expert_ffn, limit=10.0),
        [((12, 8), FLOAT), ((12,), FLOAT), ((2,), INT), ((2, 4, 8), FLOAT), ((2, 8, 4), FLOAT)]
        + [((2, 4, 8), FLOAT)],
    ),
    "mhc_pre": (
        functools.partial(mixing.pre, iterations=2, eps=1e-6, rms_eps=1e-6),
        [((1, 3, 2, 8), FLOAT), ((8, 16), FLOAT), ((8,), FLOAT), ((3,), FLOAT)],
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_instructions_carry_the_name_of_their_operation(name):
    function, shapes = CASES[name]
    arguments = [jax.ShapeDtypeStruct(*shape) for shape in shapes]
    text = jax.jit(function).lower(*arguments).as_text(debug_info=True)
    assert f"/{name}/" in text
