"""Many random requests: every token is `generate`'s, and nothing is compiled on the way."""

import numpy as np
import pytest

from tests.support import compiling
from tests.support.engines import tiny_engine
from v4jax.engine.prefix_cache import PrefixCache
from v4jax.engine.request import Request
from v4jax.infer.generate import generate

REQUESTS = 2000


def described(rng):
    """A request: some begin as others do, some are greedy, some drawn, some scored."""
    head = np.random.default_rng(int(rng.integers(5))).integers(0, 331, 300)
    length = int(rng.integers(1, 300))
    own = int(rng.integers(0, length)) if rng.random() < 0.6 else 0
    tokens = [*head[:own].tolist(), *rng.integers(0, 331, length - own).tolist()]
    drawn = {"temperature": float(rng.uniform(0.3, 1.5)), "top_p": float(rng.uniform(0.5, 1))}
    settings = drawn | {"seed": int(rng.integers(1000))} if rng.random() < 0.5 else {}
    return {"tokens": tokens, "max_new_tokens": int(rng.integers(1, 60))} | settings


@pytest.mark.slow
@pytest.mark.parametrize("draft", [None, "mtp"])
def test_soak(draft):
    rng = np.random.default_rng(0)
    cache = PrefixCache(memory_bytes=4 << 20)
    engine, model, params = tiny_engine(
        exact=True, prefix_cache=cache, draft=draft, draft_tokens=draft and 3
    )
    engine.warm_up()
    asked = [described(rng) for _ in range(REQUESTS)]
    with compiling.counted() as names:
        streams, cancelled = [], set()
        for number, request in enumerate(asked):
            logprobs = 1 if rng.random() < 0.1 else None
            streams.append(engine.submit(Request(**request, logprobs=logprobs)))
            for _ in range(int(rng.integers(0, 8))):
                engine.step()
            if rng.random() < 0.1:
                victim = int(rng.integers(max(0, number - 6), number + 1))
                streams[victim].cancel()
                cancelled.add(victim)
        results = [stream.result() for stream in streams]
    assert names == []
    assert cache.stats()["hits"] > 100 and cache.stats()["evicted"] > 100
    for number, (request, result) in enumerate(zip(asked, results, strict=True)):
        assert result.finish == "length" or number in cancelled
        expected = _expected(model, params, request)
        assert result.tokens == expected[: len(result.tokens)]
        if result.finish == "length":
            assert len(result.tokens) == request["max_new_tokens"]


def _expected(model, params, request):
    options = dict(request)
    tokens, new = options.pop("tokens"), options.pop("max_new_tokens")
    return generate(
        model, params, [tokens], max_new_tokens=new, max_length=384, prefill_chunk=128, **options
    ).tokens[0]
