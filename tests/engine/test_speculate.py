"""Speculative decoding gives plain decoding's tokens, whatever the draft says (inference.md, 3.5).

A draft of the tests' own stands in for the model's: right up to a place, wrong, or random. An
untrained model's own drafts are hardly ever accepted.
"""

import numpy as np
import pytest

from tests.support.engines import prompt_of, tiny_engine
from v4jax.engine.acceptance import Proposal
from v4jax.engine.request import Request
from v4jax.engine.speculate import Widths, verified_widths
from v4jax.errors import InputError

GAMMA = 5
# Answers that begin and end around blocks of 4 and 128 and the window of 24.
LENGTHS = (1, 3, 22, 24, 63, 120, 124, 126, 127, 128, 250)
NEW = 40


@pytest.fixture(scope="module")
def plain():
    return tiny_engine()[0]


@pytest.fixture(scope="module")
def engine():
    return tiny_engine(draft="mtp", draft_tokens=GAMMA)[0]


class Script:
    """Proposes what `tokens` says of each slot's answer, right as far as `right` says.

    right: of a round's number, how many drafts are right; the one behind them is wrong.
    """

    def __init__(self, engine, answers, right):
        self._engine, self._right, self.round = engine, right, 0
        self._answers = answers  # by prompt

    def __call__(self, lane):
        drafts_SP = np.zeros((4, GAMMA), np.int32)
        for slot, job in self._engine._loop.scheduler.decoding.items():
            tokens = self._answers[tuple(job.request.tokens.tolist())]
            ahead = np.array(tokens[job.asked :][:GAMMA] + [0] * GAMMA)[:GAMMA]
            right = self._right(self.round, slot)
            ahead[right:] = (ahead[right:] + 1) % 331
            drafts_SP[slot] = ahead
        self.round += 1
        return Proposal(drafts_SP)


RIGHT = {
    "always": lambda turn, slot: GAMMA,
    "never": lambda turn, slot: 0,
    "up_to_k": lambda turn, slot: (turn + slot) % (GAMMA + 1),
    "random": lambda turn, slot: int(np.random.default_rng([turn, slot]).integers(GAMMA + 1)),
    "two_failures": lambda turn, slot: 0 if turn % 4 < 2 else 4,
}


@pytest.mark.parametrize("settings", [{}, {"temperature": 1.1, "top_k": 40, "seed": 3}])
@pytest.mark.parametrize("name", RIGHT)
def test_the_tokens_are_plain_decodings(plain, engine, monkeypatch, name, settings):
    requests = [Request(prompt_of(n), max_new_tokens=NEW, logprobs=0, **settings) for n in LENGTHS]
    expected = [plain.submit(request) for request in requests]
    expected = [stream.result() for stream in expected]
    answers = {tuple(r.tokens): x.tokens for r, x in zip(requests, expected, strict=True)}
    monkeypatch.setattr(engine._programs, "proposed", Script(engine, answers, RIGHT[name]))
    before = engine.stats()
    streams = [engine.submit(request) for request in requests]
    for stream, alone in zip(streams, expected, strict=True):
        events, result = list(stream), stream.result()
        assert result.tokens == alone.tokens
        assert sum(len(event.drafted) for event in events) == result.accepted
        np.testing.assert_allclose(
            [x.logprob for x in result.logprobs], [x.logprob for x in alone.logprobs], atol=1e-4
        )
        assert len(result.tokens) == NEW
        if name == "always":
            assert result.accepted == result.drafted
        if name == "never":
            assert result.accepted == 0
    after = engine.stats()
    made = after["output_tokens"] - before["output_tokens"] - len(LENGTHS)
    rounds = after["row_rounds"] - before["row_rounds"]
    assert made == rounds + after["accepted"] - before["accepted"]


def test_the_models_own_draft(plain, engine):
    for settings in ({}, {"temperature": 0.8, "seed": 5}):
        request = Request(prompt_of(77), max_new_tokens=60, **settings)
        found, expected = engine.submit(request).result(), plain.submit(request).result()
        assert found.tokens == expected.tokens
        assert found.drafted > 100
    acceptance = engine.stats()["acceptance"]
    assert len(acceptance) == GAMMA


def test_a_rejected_draft_leaves_no_trace(engine, monkeypatch):
    """After a round the slot gives what a slot gives that was only ever fed the right tokens."""
    request = Request(prompt_of(130), max_new_tokens=30, logprobs=0)
    monkeypatch.setattr(
        engine._programs, "proposed", lambda lane: Proposal(np.zeros((4, GAMMA), np.int32))
    )
    rejected = engine.submit(request).result()
    wrong = min(set(range(1, 331)) - set(rejected.tokens))
    monkeypatch.setattr(
        engine._programs,
        "proposed",
        lambda lane: Proposal(np.full((4, GAMMA), wrong, np.int32)),
    )
    other = engine.submit(request).result()
    assert rejected.accepted == other.accepted == 0
    assert rejected.logprobs == other.logprobs


def test_a_draft_that_the_model_lacks():
    with pytest.raises(InputError, match="no DSpark draft"):
        tiny_engine(draft="dspark")
    with pytest.raises(InputError, match="expected one of"):
        tiny_engine(draft="medusa")
    with pytest.raises(InputError, match="draft_tokens is 0"):
        tiny_engine(draft="mtp", draft_tokens=0)


def test_the_width_that_brings_most_tokens_a_second():
    widths = Widths(verified_widths(5))
    sure, doubtful = np.full((2, 5), 9.0, np.float32), np.full((2, 5), -9.0, np.float32)
    active = np.array([True, False])
    for width, seconds in ((1, 1.0), (3, 1.5), (6, 2.0)):
        assert widths.choose(sure, active) == width  # not measured yet
        widths.took(width, seconds)
    assert widths.choose(sure, active) == 6
    assert widths.choose(doubtful, active) == 1
    # 1 + 0.73 + 0.53 tokens in 1.5 s, or 1 + 0.73 + 0.53 + 0.39 + 0.29 + 0.21 in 2.
    assert widths.choose(np.ones((2, 5), np.float32), active) == 6
    for _ in range(60):
        widths.took(6, 3.0)
    assert widths.choose(np.ones((2, 5), np.float32), active) == 3
    # The idle row's confidence does not count.
    mixed = np.concatenate([doubtful[:1], sure[:1]])
    assert widths.choose(mixed, active) == 1
    assert (verified_widths(1), verified_widths(2), verified_widths(7)) == (
        (1, 2),
        (1, 3),
        (1, 3, 8),
    )
