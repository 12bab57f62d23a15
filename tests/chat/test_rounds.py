"""A chat on an engine with random weights: a required call, its result, and what was kept."""

import json

import pytest

from tests.support.chats import EOS, body, chat_directory, user
from tests.support.tiny import replaced, tiny_model
from v4jax.chat.format import ChatFormat
from v4jax.engine.engine import Engine
from v4jax.engine.prefix_cache import PrefixCache

LENGTH = 3072
OFF = {"thinking": {"type": "disabled"}}
TOOL = {
    "type": "function",
    "function": {
        "name": "roll",
        "parameters": {
            "type": "object",
            "properties": {
                "die": {"type": "string", "enum": ["red", "blue"]},
                "times": {"type": "integer", "minimum": 1, "maximum": 9},
            },
            "required": ["die", "times"],
        },
    },
}


@pytest.fixture(scope="module")
def chat(tmp_path_factory):
    return ChatFormat(chat_directory(tmp_path_factory.mktemp("chat")), "m", max_length=LENGTH)


@pytest.fixture(scope="module")
def engine(chat):
    model, params = tiny_model()
    ending = replaced(model.config, eos_token_id=EOS)  # 1, the default, is a byte here
    return Engine(
        model.clone(config=ending),
        params,
        slots=2,
        max_length=LENGTH,
        prefill_chunk=512,
        draft=None,
        prefix_cache=PrefixCache(),
        tokenizer=chat.tokenizer,
    )


def answered(chat, engine, request):
    """The answer as the server makes it."""
    conversation = chat.read(request)
    answer, stream = conversation.answer("id"), engine.submit(conversation.request())
    started = False
    for event in stream:
        if not started:
            answer.begin(stream.cached_tokens)
            started = True
        answer.push(event.tokens, event.logprobs)
        if answer.done:
            stream.cancel()
        answer.finish(event.finish, event.error) if event.finish else None
    return conversation, answer


def test_a_required_call_and_its_result(chat, engine):
    pytest.importorskip("llguidance")
    asked = {"tool_choice": "required", "parallel_tool_calls": False} | OFF
    question = user("x" * 200)
    first, answer = answered(chat, engine, body(question, tools=[TOOL], **asked))
    assert answer.problems == [] and answer.finish_reason == "tool_calls"
    message = answer.whole()["choices"][0]["message"]
    (call,) = message["tool_calls"]
    arguments = json.loads(call["function"]["arguments"])
    assert arguments["die"] in ("red", "blue") and 1 <= arguments["times"] <= 9
    # The client writes the arguments in its own way.
    call["function"]["arguments"] = json.dumps(dict(reversed(arguments.items())), indent=2)
    result = {"role": "tool", "tool_call_id": call["id"], "content": "5"}
    request = body(question, message, result, tools=[TOOL], max_tokens=3, temperature=0, **OFF)
    second, answer = answered(chat, engine, request)
    sampled = len(first.tokens) + answer_tokens(second, first)
    hit = answer.whole()["usage"]["prompt_cache_hit_tokens"]
    assert hit % 128 == 0 and sampled - 128 <= hit <= sampled
    assert second.tokens[: len(first.tokens)] == first.tokens


def answer_tokens(second, first):
    """How many tokens the first answer had: up to the end token behind it."""
    return second.tokens.index(EOS, len(first.tokens)) - len(first.tokens)


def test_a_format_and_log_probabilities(chat, engine):
    pytest.importorskip("llguidance")
    form = {"type": "regex", "regex": "[a-c]{5}"}
    request = body(user("x"), response_format=form, logprobs=True, top_logprobs=2, **OFF)
    _, answer = answered(chat, engine, request)
    whole = answer.whole()["choices"][0]
    assert len(whole["message"]["content"]) == 5 and set(whole["message"]["content"]) <= set("abc")
    assert [len(each["top_logprobs"]) for each in whole["logprobs"]["content"]] == [2] * 5
    assert whole["finish_reason"] == "stop"


def test_penalties_and_a_stop_text(chat, engine):
    bias = {str(token): -100 for token in range(331) if token not in (64, 65)}
    request = body(user("x"), max_tokens=30, logit_bias=bias, frequency_penalty=1.0, seed=5, **OFF)
    _, answer = answered(chat, engine, request)
    content = answer.whole()["choices"][0]["message"]["content"]
    assert len(content) == 30 and len(set(content)) == 2
    _, cut = answered(chat, engine, request | {"stop": content[3:5]})
    at = content.index(content[3:5])
    assert cut.whole()["choices"][0]["message"]["content"] == content[:at]
    assert cut.finish_reason == "stop" and cut.done
