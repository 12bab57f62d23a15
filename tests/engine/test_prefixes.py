"""A request whose prefix is restored gives what it gives cold, to the bit (inference.md, 2.6)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.support.engines import answer, prompt_of, tiny_engine
from v4jax.engine.prefix_cache import PrefixCache
from v4jax.engine.request import Request
from v4jax.errors import InputError

VARIANTS = {
    "released": {},
    "draft": {"draft": "mtp", "draft_tokens": 3},
    "bfloat16": {"options": (("dtype", "bfloat16"),)},
    "native": {"options": (("numerics", "native"), ("dtype", None))},
    "scanned": {"variant": "scanned"},
    "ablated": {"variant": "ablated", "prefill_chunk": 384, "max_length": 1152},
    "all_visible": {"variant": "all_visible"},
}
QUICK = ("released", "draft")


def garbage_rows(engine, monkeypatch):
    """Every row begins with numbers that nothing may read, its counts but."""
    fresh = engine._programs.fresh_row

    def filled():
        row = fresh()
        rng = np.random.default_rng(0)

        def fill(x):
            if not jnp.issubdtype(x.dtype, jnp.floating):
                return x
            return jnp.asarray(rng.standard_normal(x.shape) * 30, x.dtype)

        return row._replace(cache=row.cache.replace(layers=jax.tree.map(fill, row.cache.layers)))

    monkeypatch.setattr(engine._programs, "fresh_row", filled)


@pytest.fixture(
    scope="module",
    params=[
        name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in VARIANTS
    ],
)
def engines(request):
    options = VARIANTS[request.param]
    cache = PrefixCache()
    stored = tiny_engine(**options, prefix_cache=cache)[0]
    return tiny_engine(**options)[0], stored, cache


def run(engine, tokens, **options):
    settings = {"max_new_tokens": 12, "logprobs": 2, "temperature": 0.7, "seed": 4}
    return engine.submit(Request(tokens, **(settings | options))).result()


def test_restored_equals_cold_bit_for_bit(engines, monkeypatch):
    cold, stored, cache = engines
    page = stored._loop.prefixes.page
    garbage_rows(stored, monkeypatch)
    for length in (page + 1, page + 77, 2 * page, 2 * page + 1, 2 * page + 44):
        prompt = prompt_of(length, 9)
        expected = run(cold, prompt)
        first, second = run(stored, prompt), run(stored, prompt)
        other = run(stored, prompt[:-1] + [330 - prompt[-1]])
        assert (first.cached_tokens, second.cached_tokens) == (0, (length - 1) // page * page)
        assert other.cached_tokens == second.cached_tokens
        for result in (first, second):
            assert result.tokens == expected.tokens
            assert result.logprobs == expected.logprobs
            assert result.accepted == expected.accepted
    assert cache.stats()["hits"] == 10


def test_a_shared_prefix_is_found_once_a_second_request_has_left_it(engines):
    cold, stored, _ = engines
    page = stored._loop.prefixes.page
    shared = prompt_of(page, 21)
    prompts = [shared + prompt_of(page + 30, 30 + i) for i in range(3)]
    results = [run(stored, prompt) for prompt in prompts]
    assert [result.cached_tokens for result in results] == [0, 0, page]
    for prompt, result in zip(prompts, results, strict=True):
        assert result.logprobs == run(cold, prompt).logprobs


def test_tenants_do_not_share(engines):
    _, stored, _ = engines
    prompt = prompt_of(stored._loop.prefixes.page + 9, 50)
    assert [run(stored, prompt, salt=salt).cached_tokens > 0 for salt in ("a", "a", "b")] == [
        False,
        True,
        False,
    ]


@pytest.mark.slow
def test_a_conversation_goes_on():
    """Each turn finds all that was said before, what the model made too."""
    cache = PrefixCache()
    engine, model, params = tiny_engine(exact=False, prefix_cache=cache, max_length=768)
    plain = tiny_engine(exact=False, max_length=768)[0]
    for options in ({}, {"draft": "mtp", "draft_tokens": 3}):
        engine = tiny_engine(exact=False, prefix_cache=PrefixCache(), max_length=768, **options)[0]
        talk = prompt_of(100, 60)
        for turn in range(4):
            result = engine.submit(Request(talk, max_new_tokens=90)).result()
            assert result.tokens == answer(plain, talk, 90)
            # All whole pages of what was there at the end of the turn before.
            assert result.cached_tokens == (0 if turn == 0 else (len(talk) - 1 - 20) // 128 * 128)
            talk = talk + result.tokens + prompt_of(20, 61 + turn)


def test_a_second_run_after_a_restart(tmp_path):
    prompt = prompt_of(300, 70)
    first = tiny_engine(prefix_cache=PrefixCache(directory=tmp_path))[0]
    cold = run(first, prompt)
    first.close()
    second = tiny_engine(prefix_cache=PrefixCache(directory=tmp_path))[0]
    warm = run(second, prompt)
    assert (cold.cached_tokens, warm.cached_tokens) == (0, 256)
    assert warm.logprobs == cold.logprobs
    other = tiny_engine(prefix_cache=PrefixCache(directory=tmp_path), prefill_chunk=256)[0]
    assert run(other, prompt).cached_tokens == 0
    assert other.stats()["prefix_disk_foreign"] == 1


def test_a_cache_in_use_for_another_model():
    cache = PrefixCache()
    tiny_engine(prefix_cache=cache)
    tiny_engine(prefix_cache=cache)
    with pytest.raises(InputError, match="in use for another model"):
        tiny_engine(prefix_cache=cache, options=(("dtype", "bfloat16"),))
