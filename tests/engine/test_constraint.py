"""Answers that obey a grammar: masks inside the compiled choice, with drafts and without."""

import json
import re

import numpy as np
import pytest

import v4jax
from tests.support.engines import prompt_of, tiny_engine
from v4jax.engine.constraint import Grammar, fitted
from v4jax.engine.request import Request
from v4jax.errors import InputError

GAMMA = 3


class Rising:
    """Permits tokens larger than the last one, by a step of at most 40; nothing behind 300."""

    def matcher(self, tokenizer, eos):
        return RisingMatcher(0)


class RisingMatcher:
    def __init__(self, last):
        self.last = last

    def allowed(self):
        bits = np.zeros(11 * 32, bool)
        bits[self.last + 1 : self.last + 41] = self.last <= 300
        return np.packbits(bits, bitorder="little").view("<u4")

    def advance(self, token):
        assert self.last < token <= self.last + 40
        self.last = token

    def walk(self, drafts):
        here, masks = RisingMatcher(self.last), [self.allowed()]
        for token in drafts:
            if not here.last < token <= here.last + 40 or here.last > 300:
                break
            here.advance(token)
            masks.append(here.allowed())
        return masks

    def done(self):
        return False


@pytest.fixture(scope="module")
def engines():
    return tiny_engine()[0], tiny_engine(draft="mtp", draft_tokens=GAMMA)[0]


@pytest.mark.parametrize("settings", [{}, {"temperature": 1.5, "seed": 8, "top_p": 0.8}])
def test_every_choice_obeys_and_drafts_change_nothing(engines, settings):
    plain, drafting = engines
    requests = [
        Request(prompt_of(n), max_new_tokens=60, constraint=constraint, **settings)
        for n, constraint in ((30, Rising()), (31, None), (5, Rising()))
    ]
    results = [[engine.submit(each) for each in requests] for engine in (plain, drafting)]
    results = [[stream.result() for stream in streams] for streams in results]
    for alone, drafted in zip(*results, strict=True):
        assert alone.tokens == drafted.tokens
    for result in (results[0][0], results[0][2]):
        assert result.finish == "error"
        assert "permits no token" in result.error
        assert result.tokens[-1] > 300
        steps = np.diff([0, *result.tokens])
        assert ((steps > 0) & (steps <= 40)).all()
    assert results[0][1].finish == "length"


def test_a_model_of_fewer_tokens_than_the_mask():
    mask = np.array([1, 2, 3], np.uint32)
    np.testing.assert_array_equal(fitted(mask, 2), [1, 2])
    np.testing.assert_array_equal(fitted(mask, 4), [1, 2, 3, 0])


def follow(matcher, draw):
    """Tokens that the matcher permits, until it is done or only the end may come."""
    tokens = []
    while not matcher.done() and len(tokens) < 200:
        bits = np.unpackbits(matcher.allowed().view(np.uint8), bitorder="little")
        legal = np.flatnonzero(bits)
        assert len(matcher.walk([int(legal[0])])) == 2
        token = int(draw(legal))
        if token == 0:
            break
        matcher.advance(token)
        tokens.append(token)
    return tokens


@pytest.fixture(scope="module")
def tokenizer():
    pytest.importorskip("llguidance")
    return v4jax.Tokenizer("nano")


def test_a_regular_expression(tokenizer):
    matcher = Grammar("regex", "[a-f]{3}-[0-9]+").matcher(tokenizer, 0)
    rng = np.random.default_rng(0)
    text = tokenizer.decode(follow(matcher, lambda legal: rng.choice(legal)))
    assert re.fullmatch("[a-f]{3}-[0-9]*", text)


def test_a_json_schema(tokenizer):
    schema = {
        "type": "object",
        "properties": {"n": {"type": "integer"}, "ok": {"type": "boolean"}},
        "required": ["n", "ok"],
        "additionalProperties": False,
    }
    matcher = Grammar("json_schema", schema).matcher(tokenizer, 0)
    # The shortest: the lowest id that is a digit or a letter may go on for ever.
    text = tokenizer.decode(
        follow(
            matcher,
            lambda legal: min(legal, key=lambda i: (i != 0, "}" not in tokenizer.decode([i]), i)),
        )
    )
    assert set(json.loads(text)) == {"n", "ok"}


@pytest.mark.parametrize(
    ("grammar", "message"),
    [
        (Grammar("xml", "a"), "of kind 'xml'; expected one of"),
        (Grammar("regex", "("), "cannot be used"),
        (Grammar("json_schema", "{"), "cannot be used"),
        (Grammar("json_schema", {"type": "nothing"}), "cannot be used"),
    ],
)
def test_grammars_that_cannot_be_used(tokenizer, grammar, message):
    with pytest.raises(InputError, match=message):
        grammar.matcher(tokenizer, 0)


def test_what_a_grammar_needs(tokenizer):
    with pytest.raises(InputError, match="the engine no tokenizer"):
        Grammar("regex", "a").matcher(None, 0)
    with pytest.raises(InputError, match="no end token"):
        Grammar("regex", "a").matcher(tokenizer, None)
