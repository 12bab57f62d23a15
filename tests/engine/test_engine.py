"""The engine's invariants on a tiny model of every layer kind (inference.md, 2.5)."""

import concurrent.futures
import itertools

import jax
import numpy as np
import pytest

from tests.support import compiling
from tests.support.engines import answer, prompt_of, tiny_engine
from v4jax.engine.request import Request
from v4jax.errors import InputError
from v4jax.infer.generate import generate

DRAWN = {"temperature": 1.2, "top_p": 0.9, "seed": 11}


@pytest.fixture(scope="module")
def made():
    return tiny_engine()


@pytest.fixture(scope="module")
def engine(made):
    return made[0]


def run(engine, requests):
    streams = [engine.submit(request) for request in requests]
    return [stream.result() for stream in streams]


def test_the_tokens_are_those_of_generate(made):
    engine, model, params = made
    prompts = [prompt_of(n) for n in (1, 5, 40, 127, 128, 129, 257, 300)]
    for settings in ({}, {"temperature": 1.3, "seed": 7, "top_p": 0.9}):
        found = engine.generate(prompts, max_new_tokens=20, **settings)
        expected = generate(model, params, prompts, max_new_tokens=20, max_length=384, **settings)
        assert found.tokens == expected.tokens
        assert found.finish_reason == expected.finish_reason


def test_log_probabilities_do_not_depend_on_the_other_slots(engine):
    """The same bits alone, among seven others, and among others that come, go and are cancelled."""
    request = Request(prompt_of(50), max_new_tokens=24, logprobs=3, **DRAWN)
    alone = engine.submit(request).result()
    others = [Request(prompt_of(n, 1), max_new_tokens=n % 13 + 1) for n in range(20, 160, 20)]
    among = run(engine, [*others[:2], request, *others[2:]])[2]
    assert among.logprobs == alone.logprobs
    waiting = iter(Request(prompt_of(n, 2), max_new_tokens=40) for n in itertools.count(3))
    stream, others = engine.submit(request), []
    for turn in itertools.count():
        if stream.finished:
            break
        if turn % 3 == 0:
            others.append(engine.submit(next(waiting)))
        if turn % 5 == 4:
            others.pop(0).cancel()
        engine.step()
    for each in others:
        each.cancel()
        each.result()
    assert stream.result().logprobs == alone.logprobs


def test_a_slot_that_held_another_request_is_as_new(engine):
    request = Request(prompt_of(9), max_new_tokens=30, logprobs=0)
    fresh = tiny_engine()[0].submit(request).result()
    run(engine, [Request(prompt_of(n, 5), max_new_tokens=17) for n in (300, 200, 131, 64)])
    assert run(engine, [request] * 5)[4].logprobs == fresh.logprobs


@pytest.mark.parametrize("steps", [0, 1, 2, 3, 4, 9])
def test_cancelled_at_any_point(engine, steps):
    expected = answer(engine, prompt_of(200), 12)
    stream = engine.submit(Request(prompt_of(300), max_new_tokens=50))
    for _ in range(steps):
        engine.step()
    stream.cancel()
    result = stream.result()
    assert result.finish == "cancelled"
    assert engine.stats()["slots_busy"] == engine.stats()["queue_depth"] == 0
    assert answer(engine, prompt_of(200), 12) == expected


def test_tokens_that_are_not_finite_end_their_request_only(made):
    """A model whose embedding of one token is NaN."""
    _, model, params = made
    table = params["params"]["embed"]["weight"]
    broken = jax.tree.map(lambda x: x, params)
    broken["params"]["embed"]["weight"] = np.asarray(table).copy()
    broken["params"]["embed"]["weight"][7] = np.nan
    good = [[3, 4, 5], [8, 9]]
    engine = tiny_engine()[0]
    expected = engine.generate(good, max_new_tokens=6).tokens
    engine._programs._variables = jax.tree.map(jax.numpy.asarray, broken)
    results = run(engine, [Request(tokens, max_new_tokens=6) for tokens in (good[0], [7], good[1])])
    if 7 not in sum(expected, []):
        assert [results[0].tokens, results[2].tokens] == expected
    assert results[1].finish == "error"
    assert "not finite at new token 0" in results[1].error
    assert answer(engine, good[0], 6) == expected[0]


def test_priorities(engine):
    filling = [engine.submit(Request(prompt_of(4), max_new_tokens=30)) for _ in range(4)]
    for _ in range(4):
        engine.step()
    later = [engine.submit(Request([1], max_new_tokens=1, priority=p)) for p in (0, 3)]
    order = []
    while not all(stream.finished for stream in later):
        engine.step()
        order += [p for p, stream in zip((0, 3), later, strict=True) if stream.finished]
    assert order[0] == 3
    for stream in filling:
        assert len(stream.result().tokens) == 30


def test_stop_ids_at_every_position(made):
    engine, model, params = made
    tokens = answer(engine, prompt_of(30), 12)
    for place, stop in enumerate(tokens):
        first = tokens.index(stop)
        result = engine.submit(Request(prompt_of(30), max_new_tokens=12, stop_ids=(stop,))).result()
        assert (result.tokens, result.finish) == (tokens[:first], "stop"), place


def test_log_probabilities_of_the_prompt(made):
    engine, model, params = made
    prompt = prompt_of(200)
    logits = jax.jit(model.apply)(params, np.array([prompt])).logits[0]
    expected = np.asarray(jax.nn.log_softmax(logits))
    own = expected[np.arange(199), prompt[1:]]
    np.testing.assert_allclose(engine.score(prompt), own, atol=2e-5)
    result = engine.submit(Request(prompt, max_new_tokens=2, prompt_logprobs=4)).result()
    assert result.prompt_logprobs[0] is None
    for place, found in enumerate(result.prompt_logprobs[1:]):
        best = np.sort(expected[place])[::-1][:4]
        np.testing.assert_allclose([logprob for _, logprob in found.top], best, atol=2e-5)
    assert result.tokens == answer(engine, prompt, 2)


def test_a_thread_runs_the_loop():
    engine = tiny_engine()[0]
    expected = [answer(engine, prompt_of(n), 9) for n in (3, 140)]
    engine.start()
    streams = [engine.submit(Request(prompt_of(n), max_new_tokens=9)) for n in (3, 140)]
    assert [stream.result().tokens for stream in streams] == expected
    waiting = [engine.submit(Request(prompt_of(n), max_new_tokens=200)) for n in range(2, 12)]
    engine.close()
    assert {stream.result().finish for stream in waiting} <= {"cancelled", "length"}
    assert waiting[-1].result().finish == "cancelled"
    engine.close()
    with pytest.raises(InputError, match="engine is closed"):
        engine.submit(Request([1]))


def test_nothing_is_compiled_after_the_warm_up(engine):
    engine.warm_up()
    with compiling.counted() as names:
        for n, logprobs in ((1, None), (200, 3), (300, 0)):
            answer(engine, prompt_of(n), 5, logprobs=logprobs, prompt_logprobs=logprobs)
        answer(engine, prompt_of(3), 5, **DRAWN)
    assert names == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokens": prompt_of(380)}, "380 tokens and max_new_tokens is 8, 388 together"),
        ({"tokens": []}, "is empty"),
        ({"tokens": [331]}, "expected 0 to 330"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"temperature": -1.0}, "temperature is -1.0"),
        ({"seed": -1}, "seed is -1"),
        ({"logprobs": 21}, "logprobs is 21"),
        ({"stop": "x"}, "no tokenizer"),
    ],
)
def test_bad_requests_are_refused(engine, changes, message):
    with pytest.raises(InputError, match=message):
        engine.submit(Request(**({"tokens": [1], "max_new_tokens": 8} | changes)))


def test_nobody_waits_for_a_step_to_hand_a_request_in(made):
    """While a step holds the engine, requests, cancellations and counters answer at once."""
    engine, told = made[0], []
    expected = answer(engine, prompt_of(7), 5)
    with engine._lock:
        outside = concurrent.futures.ThreadPoolExecutor(1)
        request = Request(prompt_of(7), max_new_tokens=5)
        stream = outside.submit(engine.submit, request, lambda: told.append(1)).result(10)
        other = outside.submit(engine.submit, Request(prompt_of(9))).result(10)
        outside.submit(other.cancel).result(10)
        assert outside.submit(engine.stats).result(10)["slots_busy"] == 0
    assert not stream.admitted
    assert stream.result().tokens == expected and stream.admitted
    assert len(told) >= 2  # its slot, and an event or more
    assert other.result().finish == "cancelled"
    times = engine.stats()["step_seconds"]
    assert times["decode"][0] > 0 and times["decode"][1] > 0
