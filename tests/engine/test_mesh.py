"""The engine on a mesh gives the tokens of one device; each mesh is minutes of compilation."""

import itertools

import pytest

from tests.support import meshes, serving
from v4jax.engine.engine import Engine
from v4jax.engine.prefix_cache import PrefixCache
from v4jax.engine.request import Request
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


def test_a_draft_changes_no_token():
    alone, on_mesh = (serving.made(mesh, "mtp", (1, 2)) for mesh in (None, "data=2,expert=2"))
    expected, _ = drafted_answers(*alone, 4, None)
    found, drafts = drafted_answers(*on_mesh, 4, "mtp")
    assert found == expected
    assert any(accepted for _, accepted in drafts)


# Slots that the mesh divides have their caches whole, others have theirs in parts.
@pytest.mark.slow
@pytest.mark.parametrize("sizes", ["data=2,expert=2", "sequence=4"])
@pytest.mark.parametrize("slots, kind", itertools.product((4, 2), ("mtp", "dspark")))
def test_drafts_are_those_of_one_device(sizes, slots, kind):
    """Plain decoding's tokens; and as many drafts were accepted of each request."""
    (plain, _), (alone, drafts_alone), (found, drafts) = (
        drafted_answers(*serving.made(mesh, kind), slots, draft)
        for mesh, draft in ((None, None), (None, kind), (sizes, kind))
    )
    assert found == alone == plain
    assert drafts == drafts_alone
    assert any(accepted for _, accepted in drafts)


def drafted_answers(model, variables, slots, draft):
    """Of each request the tokens; and how many drafts were proposed and accepted."""
    engine = Engine(model, variables, **(SIZES | {"slots": slots}), draft=draft)
    # At a high temperature the noise decides, which the draft and the model share.
    requests = [
        Request([(7 * i * n + i) % 64 for i in range(n)], max_new_tokens=14, seed=n, temperature=t)
        for n in (1, 5, 127, 130, 200)
        for t in (0.0, 1.0, 6.0)
    ]
    streams = [engine.submit(request) for request in requests]
    results = [stream.result() for stream in streams]
    return [x.tokens for x in results], [(x.drafted, x.accepted) for x in results]
