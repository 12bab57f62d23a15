"""The engine on a mesh gives the tokens of one device; each mesh is minutes of compilation."""

import pytest

from tests.support import meshes
from v4jax.engine.engine import Engine
from v4jax.engine.prefix_cache import PrefixCache
from v4jax.engine.request import Request
from v4jax.errors import InputError
from v4jax.sharding.rules import PREFILL

SIZES = {"slots": 4, "max_length": 256, "prefill_chunk": 128, "exact": True}


def answers(model, variables, **options):
    """Tokens of several requests, sampled and greedy, twice with their prefixes stored."""
    engine = Engine(model, variables, **SIZES, **options)
    requests = [
        Request([(7 * i * n + i) % 64 for i in range(n)], max_new_tokens=10, **settings)
        for n in (5, 130, 200)
        for settings in ({}, {"temperature": 1.1, "seed": 3})
    ]
    found = []
    for _ in range(2):
        streams = [engine.submit(request) for request in requests]
        found.append([stream.result().tokens for stream in streams])
    assert found[0] == found[1]
    return found[0]


@pytest.mark.slow
@pytest.mark.parametrize("sizes", ["data=2,expert=2", "sequence=4"])
def test_the_tokens_are_those_of_one_device(sizes):
    expected = answers(*meshes.alone(), draft=None)
    model, variables = meshes.on_mesh(sizes, PREFILL)
    assert answers(model, variables, prefix_cache=PrefixCache()) == expected


def test_drafts_do_not_run_on_a_mesh():
    model, variables = meshes.on_mesh("data=2,expert=2", PREFILL)
    with pytest.raises(InputError, match="where drafts do not run yet"):
        Engine(model, variables, **SIZES, draft="mtp")
