"""Answers as they come: stop ids, stop texts across token borders, pieces that join."""

import hypothesis
import hypothesis.strategies as st
import pytest

from v4jax.engine.answer import Answer
from v4jax.engine.request import TokenLogprob
from v4jax.infer.tokenizer import TextStream, Tokenizer


class Bytes(Tokenizer):
    """A tokenizer whose tokens are bytes of UTF-8; those from 256 on are pairs of letters."""

    PAIRS = ("ab", "ba", "aa", "bb")

    def __init__(self):
        pass

    def decode(self, ids):
        raw = b"".join(self.PAIRS[i - 256].encode() if i >= 256 else bytes([i]) for i in ids)
        return raw.decode(errors="replace")


def run(tokens, stop=(), stop_ids=(), limit=1000):
    """The events of an answer, until it ends."""
    answer = Answer(frozenset(stop_ids), tuple(stop), limit, TextStream(Bytes()))
    events = []
    for token in tokens:
        event = answer.add(token, TokenLogprob(token, -1.0))
        if event is not None:
            events.append(event)
        if answer.finish:
            break
    else:
        events.append(answer.end("cancelled"))
    return events


def joined(events):
    tokens = [token for event in events for token in event.tokens]
    return tokens, "".join(event.text for event in events), events[-1].finish


def test_a_stop_id_is_not_part_of_the_answer():
    assert joined(run([97, 98, 7, 99], stop_ids=[7])) == ([97, 98], "ab", "stop")


def test_the_limit():
    assert joined(run([97, 98, 99], limit=2)) == ([97, 98], "ab", "length")


@pytest.mark.parametrize(
    ("tokens", "stop", "kept", "text"),
    [
        ([97, 98, 99], ["b"], [97], "a"),
        ([97, 256, 98], ["ba"], [97, 256, 98], "aabb"),  # never comes
        ([256, 257], ["bb"], [], "a"),  # begins inside a token, whose text before it is shown
        ([257, 256], ["aa"], [], "b"),
        ([99, 0xC3, 0xA9, 99], ["é"], [99], "c"),  # bytes of a character that stops
        ([0xC3, 0xA9, 99], ["c"], [0xC3, 0xA9], "é"),
        ([97, 98, 99], ["abd", "c"], [97, 98], "ab"),
        ([97, 98, 98], ["abbb"], [97, 98, 98], "abb"),  # only its beginning comes
        ([97, 98, 99], ["bc", "b"], [97], "a"),
    ],
)
def test_stop_texts(tokens, stop, kept, text):
    found, shown, _ = joined(run(tokens, stop))
    assert (found, shown) == (kept, text)


def test_what_may_become_a_stop_text_is_held_back():
    answer = Answer(frozenset(), ("abc",), 100, TextStream(Bytes()))
    assert answer.add(120).tokens == (120,)
    assert answer.add(97) is None
    assert answer.add(98, drafted=True) is None
    event = answer.add(100)
    assert (event.tokens, event.text) == ((97, 98, 100), "abd")
    assert event.drafted == (1,)


def test_without_a_tokenizer_tokens_come_at_once():
    answer = Answer(frozenset([3]), (), 100)
    assert answer.add(5).tokens == (5,)
    assert answer.add(3).finish == "stop"


@hypothesis.given(
    tokens=st.lists(st.sampled_from([97, 98, 256, 257, 258, 259, 0xC3, 0xA9, 99]), max_size=14),
    stop=st.lists(st.sampled_from(["ab", "aab", "bb", "bé", "c", "é", "abab"]), max_size=3),
)
@hypothesis.settings(max_examples=300, deadline=None)
def test_an_answer_is_the_text_before_the_first_stop(tokens, stop):
    events = run(tokens, stop)
    kept, text, finish = joined(events)
    whole = Bytes().decode(tokens)
    # The text grows token by token: the first token that completes a stop ends the answer.
    for count in range(1, len(tokens) + 1):
        so_far = Bytes().decode(tokens[:count]).rstrip("\N{REPLACEMENT CHARACTER}")
        places = [so_far.find(each) for each in stop if each in so_far]
        if places:
            assert finish == "stop"
            assert text == so_far[: min(places)]
            assert kept == tokens[: len(kept)]
            assert len(kept) <= count
            break
    else:
        assert (text, kept, finish) == (whole, tokens, "cancelled")
    assert sum(len(event.logprobs) for event in events) == len(kept)
