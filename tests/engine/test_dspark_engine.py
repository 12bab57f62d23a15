"""A DSpark draft in the engine: plain decoding's tokens, also behind a restored prefix."""

import pytest

from tests.model.test_dspark import GAMMA, dspark_config
from tests.support.engines import SIZES, prompt_of
from tests.support.tiny import drawn
from v4jax.engine.engine import Engine
from v4jax.engine.prefix_cache import PrefixCache
from v4jax.engine.request import Request
from v4jax.model.transformer import Transformer


@pytest.fixture(scope="module")
def made():
    model = Transformer(dspark_config(), min_repeats=2)
    return model, drawn(model)


def test_the_tokens_are_plain_decodings(made):
    plain = Engine(*made, **SIZES)
    engine = Engine(*made, **(SIZES | {"draft": "auto", "prefix_cache": PrefixCache()}))
    for settings in ({}, {"temperature": 0.9, "seed": 2}):
        requests = [
            Request(prompt_of(n), max_new_tokens=24, logprobs=0, **settings)
            for n in (3, 127, 200, 140, 300)
        ]
        expected = [plain.submit(request) for request in requests]
        cold, warm = ([engine.submit(request) for request in requests] for _ in range(2))
        for alone, first, again in zip(expected, cold, warm, strict=True):
            alone, first, again = alone.result(), first.result(), again.result()
            assert first.tokens == alone.tokens
            # Rings are restored: the draft proposes what it proposed, and is as often right.
            assert again.logprobs == first.logprobs
            assert (again.drafted, again.accepted) == (first.drafted, first.accepted)
            assert first.drafted >= 23
    assert engine.stats()["cached_tokens"] > 0
    assert len(engine.stats()["acceptance"]) == GAMMA


@pytest.mark.slow
def test_which_widths_are_verified_changes_no_token(made):
    requests = [Request(prompt_of(n), max_new_tokens=24) for n in (3, 127, 200, 140, 300)]
    plain, scheduled = (
        Engine(*made, **(SIZES | {"draft": draft, "exact": exact}))
        for draft, exact in ((None, True), ("dspark", False))
    )
    for request in requests:
        expected = plain.submit(request).result().tokens
        assert scheduled.submit(request).result().tokens == expected
