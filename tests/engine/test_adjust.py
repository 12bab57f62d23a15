"""Penalties and biases: against plain numpy, and the same tokens with drafts as without."""

import collections

import numpy as np
import pytest

from tests.support.engines import prompt_of, tiny_engine
from v4jax.engine import adjust
from v4jax.engine.adjust import Adjusting, adjusted, check
from v4jax.engine.request import Request
from v4jax.errors import InputError

GAMMA = 3
PENALTIES = {"repetition": 1.3, "presence": 0.7, "frequency": 0.4, "bias": {7: 2.5, 11: -3.0}}


def by_hand(logits_V, wanted, prompt, answer):
    """The definition, a token after the other."""
    counts, logits_V = collections.Counter(answer), np.array(logits_V, np.float32)
    for token, value in wanted.bias:
        logits_V[token] += np.float32(value)
    for token in {*prompt, *answer}:
        factor = np.float32(wanted.repetition)
        positive = logits_V[token] > 0
        logits_V[token] = logits_V[token] / factor if positive else logits_V[token] * factor
    for token, count in counts.items():
        logits_V[token] -= np.float32(wanted.frequency) * count + np.float32(wanted.presence)
    return logits_V


def test_the_definition():
    rng = np.random.default_rng(0)
    slots, places, vocab = 3, 4, 23
    logits = rng.standard_normal((slots, places, vocab)).astype(np.float32)
    drafts = rng.integers(0, vocab, (slots, places - 1))
    asked = [check(1.3, 0.7, 0.4, {7: 2.5}, vocab), None, check(0.8, -1, 0, None, vocab)]
    prompts = [rng.integers(0, vocab, 9) for _ in asked]
    answers = [rng.integers(0, vocab, 6).tolist() for _ in asked]
    state = Adjusting(slots, vocab)
    assert state.of(slice(None)) is None
    for slot, each in enumerate(asked):
        state.begin(slot, each, prompts[slot])
        state.count(slot, answers[slot][:2])
        state.count(slot, answers[slot])
    found = np.asarray(adjusted(logits, state.of(slice(None)), drafts.astype(np.int32)))
    np.testing.assert_array_equal(found[1], logits[1])
    for slot in (0, 2):
        for place in range(places):
            answer = [*answers[slot], *drafts[slot, :place]]
            expected = by_hand(logits[slot, place], asked[slot], prompts[slot], answer)
            np.testing.assert_allclose(found[slot, place], expected, rtol=1e-5, atol=1e-6)
    state.end(0)
    state.end(2)
    assert state.of(slice(None)) is None
    state.begin(0, check(1, 0.5, 0, None, vocab), prompts[1])  # nothing is left of the one before
    now = state.of(slice(0, 1))
    np.testing.assert_array_equal(now.seen[0], np.isin(np.arange(vocab), prompts[1]))
    assert not now.bias.any() and now.repetition[0] == 1


@pytest.mark.parametrize(
    "values, says",
    [
        ((0, 0, 0, None), "repetition is 0"),
        ((1, float("nan"), 0, None), "presence is nan"),
        ((1, 0, True, None), "frequency is True"),
        ((1, 0, 1e9, None), "frequency is 1000000000"),
        ((1, 0, 0, [1]), "bias has type list"),
        ((1, 0, 0, {23: 1.0}), "a token of bias is 23"),
        ((1, 0, 0, {2: "x"}), "bias is x"),
    ],
)
def test_values_out_of_range(values, says):
    with pytest.raises(InputError, match=says):
        check(*values, 23)


def test_what_changes_nothing_is_none():
    assert check(1, 0, 0.0, {}, 23) is None and check(1.0, 0, 0, {4: 0.0}, 23) is None
    assert not check(1, 0, 0, {4: 1}, 23).counts and check(1, 0.1, 0, None, 23).counts
    assert adjust.MOST == 100


@pytest.fixture(scope="module")
def engines():
    return tiny_engine()[0], tiny_engine(draft="mtp", draft_tokens=GAMMA)[0]


@pytest.mark.parametrize("drawn", [{}, {"temperature": 1.2, "seed": 3, "top_p": 0.9}])
def test_drafts_change_nothing(engines, drawn):
    plain, drafting = engines
    wanted = [PENALTIES, {}, {"frequency": 2.0}, {"bias": {5: 100.0}}]
    requests = [
        Request(prompt_of(20 + n), max_new_tokens=25, **settings, **drawn)
        for n, settings in enumerate(wanted)
    ]
    results = [
        [stream.result().tokens for stream in [engine.submit(each) for each in requests]]
        for engine in (plain, drafting)
    ]
    assert results[0] == results[1]
    assert results[0][3] == [5] * 25
    alone = [plain.submit(each).result().tokens for each in requests]
    assert alone == results[0]


def test_a_penalty_keeps_tokens_apart(engines):
    for engine in engines:
        request = Request(prompt_of(9), max_new_tokens=40, frequency=100.0)
        tokens = engine.submit(request).result().tokens
        assert len(set(tokens)) == 40
        biased = Request(prompt_of(9), max_new_tokens=8, bias=dict.fromkeys(range(5, 331), -100.0))
        assert max(engine.submit(biased).result().tokens) < 5


def test_log_probabilities_are_the_models_own(engines):
    plain = engines[0]
    request = Request(prompt_of(9), max_new_tokens=3, logprobs=1)
    first = plain.submit(request).result().logprobs[0]
    other = Request(prompt_of(9), max_new_tokens=3, logprobs=1, bias={first.token: -50.0})
    found = plain.submit(other).result().logprobs[0]
    assert found.token != first.token and found.top[0] == first.top[0]


def test_nothing_is_compiled_for_it():
    engine, _, _ = tiny_engine()
    engine.warm_up()
    before = engine.stats()["compilations"]
    engine.submit(Request(prompt_of(5), max_new_tokens=4, **PENALTIES)).result()
    assert engine.stats()["compilations"] == before
