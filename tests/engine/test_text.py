"""Text in, text out: generate and stream, with the tokenizer beside the checkpoint."""

import dataclasses

import pytest

import v4jax
from tests.support.chats import byte_ids, chat_directory
from tests.support.tiny import tiny_model
from v4jax.checkpoints.load import save_official
from v4jax.engine.text import generate, stream
from v4jax.errors import InputError
from v4jax.infer import generate as generate_lib

PROMPT = "def f("
SIZES = {"max_new_tokens": 12, "max_length": 128}


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    model, params = tiny_model()
    directory = tmp_path_factory.mktemp("tiny") / "model"
    save_official(directory, model.config, params)
    chat_directory(directory)
    return v4jax.load(directory, min_repeats=2)


@pytest.fixture(scope="module")
def plain(loaded):
    # No penalty keeps a small model from saying a token again and again.
    return generate(*loaded, PROMPT, temperature=1.0, seed=4, stop_ids=(), **SIZES)


DRAWN = {"temperature": 1.0, "seed": 4, "stop_ids": ()}


def test_texts_are_their_ids(loaded, plain):
    ids = generate_lib.generate(*loaded, [byte_ids(PROMPT)], **DRAWN, **SIZES)
    assert plain.tokens == ids.tokens and ids.text is None
    assert plain.text == [v4jax.Tokenizer(loaded[0].source).decode(ids.tokens[0])]
    assert generate(*loaded, byte_ids(PROMPT), **DRAWN, **SIZES).tokens == ids.tokens
    assert v4jax.generate is generate and v4jax.stream is stream


def test_several_texts(loaded, plain):
    both = generate(*loaded, [PROMPT, "x"], logprobs=1, **DRAWN, **SIZES)
    assert both.tokens[0] == plain.tokens[0] and both.text[0] == plain.text[0]
    assert [len(each) for each in both.logprobs] == [12, 12]
    assert [each.token for each in both.logprobs[0]] == both.tokens[0]


def test_a_stop_text(loaded, plain):
    stop = plain.text[0][2:4]
    cut = generate(*loaded, PROMPT, stop=stop, **DRAWN, **SIZES)
    assert cut.text == [plain.text[0].partition(stop)[0]] and cut.finish_reason == ["stop"]


def test_penalties(loaded):
    apart = generate(*loaded, PROMPT, frequency=100.0, **SIZES)
    assert len(set(apart.tokens[0])) == len(apart.tokens[0])
    biased = generate(*loaded, PROMPT, bias={65: 100.0}, **SIZES)
    assert biased.tokens == [[65] * 12]


def test_a_stream_is_the_same(loaded, plain):
    options = {name: value for name, value in SIZES.items() if name != "max_length"} | DRAWN
    pieces = list(stream(*loaded, PROMPT, max_length=128, **options))
    assert len(pieces) > 1 and "".join(pieces) == plain.text[0]
    assert list(stream(*loaded, byte_ids(PROMPT), max_length=128, **options)) == plain.tokens[0]
    started = stream(*loaded, PROMPT, max_length=128, **options)
    next(started)
    started.close()


def test_texts_end_where_the_checkpoint_says(loaded, plain):
    model, params = loaded
    ends = dataclasses.replace(model.config, eos_token_id=plain.tokens[0][3])
    other = model.clone(config=ends)
    settings = {name: value for name, value in DRAWN.items() if name != "stop_ids"}
    stopped = generate(other, params, PROMPT, **settings, **SIZES)
    assert stopped.tokens == [plain.tokens[0][:3]] and stopped.finish_reason == ["stop"]
    ids = generate(other, params, byte_ids(PROMPT), **settings, **SIZES)
    assert ids.tokens == plain.tokens  # ids go on, as before


def test_mistakes(loaded):
    model, params = loaded
    with pytest.raises(InputError, match="some prompts are texts"):
        generate(model, params, ["a", [1]])
    with pytest.raises(InputError, match="not loaded from files"):
        generate(model.clone(source=None), params, "a")
    with pytest.raises(InputError, match="frequency is nan"):
        generate(model, params, "a", frequency=float("nan"), **SIZES)
    with pytest.raises(InputError, match="presence is"):
        stream(model, params, "a", presence=1e9, max_length=128)
    with pytest.raises(InputError, match="prompt 0 is empty"):
        generate(model, params, "", **SIZES)
