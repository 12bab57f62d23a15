"""How experiments/011_nano_chat judges what a model says: right answers are right, others not."""

import importlib
from pathlib import Path

import numpy as np
import pytest

from v4jax.checkpoints import load as checkpoint
from v4jax.datasets import chat_tokens, tokenize
from v4jax.datasets.chat_rows import Renderer
from v4jax.datasets.conversations import Call, Message, draw
from v4jax.files.tokenizer_json import read_tokenizer

pytest.importorskip("deepseek_recipe")
EXPERIMENT = Path(__file__).resolve().parents[2] / "experiments" / "011_nano_chat"
RENAMED = {tokenize.BOS: chat_tokens.BOS, tokenize.EOS: chat_tokens.EOS}


@pytest.fixture(scope="module")
def play():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(EXPERIMENT))
        yield importlib.import_module("play")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """Of nano, with the chat's tokens; its path."""
    found = read_tokenizer(f"{checkpoint.locate('nano')}/tokenizer.json", "")
    if found.token_to_id(chat_tokens.USER) is None:
        found = chat_tokens.with_chat_tokens(found, 2112, RENAMED)
    path = tmp_path_factory.mktemp("chat") / "tokenizer.json"
    path.write_text(found.to_str())
    return path


@pytest.fixture(scope="module")
def parser(play, tokenizer):
    return play.Parser(str(tokenizer))


@pytest.fixture(scope="module")
def renderer(tokenizer):
    return Renderer(read_tokenizer(tokenizer, ""))


def replies(renderer, talk):
    """Of each answer of a conversation its place and its ids, without the end token."""
    for place, message in enumerate(talk.messages):
        if message.role == "assistant":
            here = talk._replace(messages=talk.messages[: place + 1])
            ids = renderer.whole(here)[0][len(renderer.prompt(talk, place)) :].tolist()
            assert ids[-1] == 1
            yield place, ids[:-1]


def test_what_is_written_is_read_as_it_was_meant(play, parser, renderer):
    """Calls, thoughts and answers come back, and count as exact."""
    rng = np.random.default_rng(0)
    for number in range(12):
        talk = draw(rng, True, 6000, thinking=bool(number % 2))
        for place, ids in replies(renderer, talk):
            before, expected = list(talk.messages[:place]), talk.messages[place]
            message, valid = parser.read(talk, before, ids)
            assert message == expected
            assert valid is (None if expected.call is None else True)
            assert play.Said(expected, message, valid, True, len(ids)).exact


@pytest.mark.parametrize(
    ("call", "valid"),
    [
        (Call("add", {"a": 1, "b": 2}), True),
        (Call("add", {"a": 1, "b": 3}), True),
        (Call("add", {"a": "1", "b": 2}), False),
        (Call("add", {"a": 1}), False),
        (Call("add", {"a": 1, "b": 2, "c": 3}), False),
        (Call("mul", {"a": 1, "b": 2}), False),
    ],
)
def test_a_call_is_valid_by_its_schema_and_exact_by_its_values(play, parser, renderer, call, valid):
    asked = Message("user", "Add 1 and 2.")
    rng = np.random.default_rng(0)
    talk = draw(rng, True, 3000, kinds=("look",), tools=("add",), thinking=False, rule="")
    expected = Message("assistant", "", "", Call("add", {"a": 1, "b": 2}))
    answer = expected._replace(call=call)
    ((_, ids),) = replies(renderer, talk._replace(messages=(asked, answer)))
    message, found = parser.read(talk, [asked], ids)
    assert found is valid
    said = play.Said(expected, message, found, True, len(ids))
    assert said.exact is (call == expected.call)


def test_a_call_that_is_cut_off_is_not_valid(play, parser, renderer):
    asked = Message("user", "Add 1 and 2.")
    rng = np.random.default_rng(0)
    talk = draw(rng, True, 3000, kinds=("look",), tools=("add",), thinking=False, rule="")
    answer = Message("assistant", "", "", Call("add", {"a": 1, "b": 2}))
    ((_, ids),) = replies(renderer, talk._replace(messages=(asked, answer)))
    for length in range(len(ids)):
        message, valid = parser.read(talk, [asked], ids[:length])
        assert not play.Said(answer, message, valid, False, length).exact
