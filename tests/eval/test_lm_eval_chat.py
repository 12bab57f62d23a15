"""Chats that lm-eval writes: the ids of the chat format, also where an answer goes on."""

import json
from pathlib import Path

import pytest

from tests.support.servers import chat_nano
from v4jax.chat.format import ChatFormat
from v4jax.errors import InputError
from v4jax.infer.tokenizer import Tokenizer

pytest.importorskip("lm_eval", reason="lm-eval is not installed: the extra lm-eval has it")
pytestmark = pytest.mark.filterwarnings("ignore")
HISTORY = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "One and one?"},
    {"role": "assistant", "content": "Two."},
    {"role": "user", "content": "And two?\n"},
]


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    directory = Path(chat_nano(tmp_path_factory.mktemp("chat")))
    path = directory / "config.json"
    (bos,) = Tokenizer(directory).encode("<｜begin▁of▁sentence｜>", special_tokens=True)
    path.write_text(json.dumps(json.loads(path.read_text()) | {"bos_token_id": bos}))
    return directory


@pytest.fixture(scope="module")
def model(directory):
    from v4jax.eval.lm_eval import V4Jax

    model = V4Jax(str(directory), max_length=256)
    yield model
    model.close()


@pytest.fixture
def ids(directory):
    """The ids of a chat, as `v4jax serve` would read it."""
    chat = ChatFormat(directory, "m")

    def read(messages):
        body = {"model": "m", "messages": messages, "thinking": {"type": "disabled"}}
        return chat.read(body).tokens

    return read


def test_a_chat_has_the_formats_ids(model, ids):
    text = model.apply_chat_template(HISTORY)
    assert text.startswith("<｜begin▁of▁sentence｜>") and text.endswith("<｜Assistant｜></think>")
    assert model.tok_encode(text) == ids(HISTORY)
    assert model.tok_encode(text, add_special_tokens=True) == ids(HISTORY)
    begun = [*HISTORY, {"role": "assistant", "content": "The sum"}]
    assert model.apply_chat_template(begun, add_generation_prompt=False) == text + "The sum"
    assert len(model.tok_encode("<｜User｜>")) > 1  # a text is a text


def test_requests_have_the_chat_in_front(model, ids, monkeypatch):
    from lm_eval.api.instance import Instance

    seen = []
    monkeypatch.setattr(model, "_score", lambda pairs, _: seen.extend(pairs) or [(0.0, True)])
    text = model.apply_chat_template(HISTORY)
    request = Instance("loglikelihood", doc={}, arguments=(text, "Four."), idx=0)
    model.loglikelihood([request], True)
    ((context, continuation),) = seen
    assert context == ids(HISTORY)
    assert model._tokenizer.decode(continuation) == "Four."

    asked = []

    class Result:
        text, error = "Four.", None

    monkeypatch.setattr(model, "_run", lambda requests, _: asked.extend(requests) or [Result])
    given = {"until": ["\n\n"], "max_gen_toks": 8}
    request = Instance("generate_until", doc={}, arguments=(text, given), idx=0)
    assert model.generate_until([request], True) == ["Four."]
    assert list(asked[0].tokens) == ids(HISTORY)
    (end,) = model._tokenizer.encode("<｜end▁of▁sentence｜>", special_tokens=True)
    assert end in asked[0].stop_ids


def test_what_lm_eval_notes(model):
    assert model.chat_template(False) is None
    assert "thinking off" in model.chat_template(True)


def test_a_model_that_cannot_chat_says_so():
    from v4jax.eval.lm_eval import V4Jax

    model = V4Jax("nano", max_length=64)
    with pytest.raises(InputError, match="lacks the special tokens of a V4 chat"):
        model.apply_chat_template(HISTORY)
    model.close()
