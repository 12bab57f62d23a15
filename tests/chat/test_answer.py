"""Tokens to events, in three APIs: pieces of any size join to the same whole."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.chats import (
    END_THINK,
    EOS,
    WEATHER,
    body,
    byte_ids,
    calls,
    chat_directory,
    dsml,
    encoded,
    user,
)
from v4jax.chat.arguments import problem
from v4jax.chat.format import ChatFormat
from v4jax.chat.recipe import Call
from v4jax.engine.request import TokenLogprob

OFF = {"thinking": {"type": "disabled"}}
CALLED = calls(dsml("get_weather", city="Bonn", days=2), dsml("get_weather", city="Köln"))
REQUESTS = {
    "chat": body(user("x"), tools=[WEATHER], stream=True),
    "responses": {
        "model": "m",
        "input": "x",
        "tools": [{"type": "function"} | WEATHER["function"]],
    },
    "messages": {
        "model": "m",
        "max_tokens": 900,
        "messages": [user("x")],
        "tools": [
            {"name": "get_weather", "input_schema": WEATHER["function"]["parameters"]},
        ],
    },
}


@pytest.fixture(scope="module")
def chat(tmp_path_factory):
    directory = chat_directory(tmp_path_factory.mktemp("chat"))
    return ChatFormat(directory, "m", max_length=1 << 14)


def answered(chat, request, text, finish="stop", api="chat", sizes=None, **more):
    """An answer that has come, and its events."""
    answer = chat.read(request | more, api).answer("id")
    tokens = text if isinstance(text, list) else encoded(text)
    events = answer.begin(1)
    sizes = list(sizes or [len(tokens)])
    while tokens:
        size = sizes.pop(0) if len(sizes) > 1 else sizes[0]
        events += answer.push(tokens[:size])
        tokens = tokens[size:]
    events += answer.finish(finish)
    return answer, events


def message(answer):
    return answer.whole()["choices"][0]["message"]


def joined(events):
    """What the chunks of Chat Completions say together."""
    said = {"reasoning_content": "", "content": "", "arguments": []}
    for event in events[:-1]:
        for choice in json.loads(event.data)["choices"]:
            for key in ("reasoning_content", "content"):
                said[key] += choice["delta"].get(key) or ""
            for call in choice["delta"].get("tool_calls", ()):
                if call["index"] == len(said["arguments"]):
                    said["arguments"].append("")
                said["arguments"][call["index"]] += call["function"]["arguments"]
    return said


@given(st.lists(st.integers(1, 30), min_size=1, max_size=20))
@settings(max_examples=25, deadline=None)
def test_pieces_of_any_size_join(chat, sizes):
    text = "Grüße 世界</think>Well, <b> 🦊" + CALLED
    whole = message(answered(chat, REQUESTS["chat"], text)[0])
    answer, events = answered(chat, REQUESTS["chat"], text, sizes=sizes)
    assert events[-1].data == "[DONE]" and events[-1].encode() == b"data: [DONE]\n\n"
    assert whole["reasoning_content"] == "Grüße 世界" and whole["content"] == "Well, <b> 🦊"
    said = joined(events)
    arguments = [call["function"]["arguments"] for call in whole["tool_calls"]]
    assert arguments == ['{"city": "Bonn", "days": 2}', '{"city": "Köln"}']
    assert said == {
        "reasoning_content": whole["reasoning_content"],
        "content": whole["content"],
        "arguments": arguments,
    }
    assert answer.finish_reason == "tool_calls" and not answer.problems
    assert answer.tool_names == ("get_weather", "get_weather")


def test_every_api_says_the_same(chat):
    text = "hm</think>Hi" + CALLED
    chat_answer, _ = answered(chat, REQUESTS["chat"], text)
    answer, events = answered(chat, REQUESTS["responses"], text, api="responses")
    assert [event.event for event in events[:2]] == ["response.created", "response.in_progress"]
    assert events[-1].event == "response.completed"
    assert events[-1].encode().startswith(b"event: response.completed\ndata: {")
    assert [item["type"] for item in answer.whole()["output"]] == [
        *("reasoning", "message", "function_call", "function_call"),
    ]
    other, events = answered(chat, REQUESTS["messages"], text, api="messages")
    assert events[0].event == "message_start" and events[-1].event == "message_stop"
    assert other.whole()["stop_reason"] == "tool_use" == other.finish_reason
    for each in (answer, other):
        assert each.tool_names == chat_answer.tool_names
        assert each.output_tokens == chat_answer.output_tokens == len(encoded(text))


def test_end_tokens_are_no_text(chat):
    answer, events = answered(chat, REQUESTS["chat"], [*encoded("a</think>b"), EOS, *byte_ids("c")])
    assert message(answer)["content"] == "b" and answer.finish_reason == "stop"
    assert answer.output_tokens == 3


def test_a_stop_text_ends_the_content_alone(chat):
    answer, events = answered(chat, body(user("x")), "xSTOPy</think>a STOPb", stop="STOP")
    assert answer.done and message(answer)["content"] == "a "
    assert message(answer)["reasoning_content"] == "xSTOPy"
    assert answer.push(byte_ids("more")) == [] and answer.finish("stop") == []
    assert answer.finish_reason == "stop"


def test_log_probabilities(chat):
    request = body(user("x"), logprobs=True, top_logprobs=1)
    conversation = chat.read(request)
    answer, tokens = conversation.answer("id"), encoded("a</think>bc")
    scores = [TokenLogprob(token, -0.5, ((token, -0.5),)) for token in tokens]
    answer.push([*tokens, EOS], [*scores, TokenLogprob(EOS, -0.1)])
    answer.finish("stop")
    found = answer.whole()["choices"][0]["logprobs"]
    assert [each["token"] for each in found["content"]] == ["b", "c"]
    assert [each["token"] for each in found["reasoning_content"]] == ["a"]
    assert found["content"][0]["top_logprobs"][0]["logprob"] == -0.5


@pytest.mark.parametrize("asked", [False, True])
def test_counts_come_where_they_are_asked_for(chat, asked):
    options = {"stream": True} | ({"stream_options": {"include_usage": True}} if asked else {})
    answer, events = answered(chat, body(user("x")), "a</think>b", **options)
    usages = [json.loads(event.data).get("usage") for event in events[:-1]]
    assert [usage is not None for usage in usages] == [False] * (len(usages) - 1) + [asked]
    assert (json.loads(events[-2].data)["choices"] == []) == asked
    usage = answer.whole()["usage"]
    assert usage["prompt_cache_hit_tokens"] == 1 and usage["completion_tokens"] == 3
    assert usage["completion_tokens_details"]["reasoning_tokens"] == answer.reasoning_tokens == 1


@pytest.mark.parametrize("size", [1, 2, 9])
@pytest.mark.parametrize("api", REQUESTS)
def test_counts_are_of_tokens_and_not_of_their_text(chat, api, size):
    """And a character that an answer's end cuts takes no whole ones with it."""
    thought, said = [*byte_ids("é")[1:], *byte_ids("ab")], byte_ids("cdé")[:-1]
    request = REQUESTS[api] | {"stream_options": {"include_usage": True}} if api == "chat" else {}
    for tokens, reasoning in ((thought, 3), ([*thought, END_THINK, *said], 3)):
        answer, events = answered(
            chat, request or REQUESTS[api], list(tokens), "length", api, [size]
        )
        whole = answer.whole()
        text = json.dumps(whole, ensure_ascii=False)
        assert "ab" in text and ("cd" in text or len(tokens) == 3)
        usages = [whole["usage"], *(found for each in events if (found := usage_of(each)))]
        for usage in (usages[0], usages[-1]):
            count = usage.get("completion_tokens", usage.get("output_tokens"))
            assert count == answer.output_tokens == len(tokens)
            for name in ("completion_tokens_details", "output_tokens_details"):
                assert usage.get(name, {"reasoning_tokens": 3})["reasoning_tokens"] == reasoning
            prompt = usage.get("prompt_tokens", usage.get("input_tokens"))
            assert usage.get("total_tokens", prompt + count) == prompt + count
        assert answer.reasoning_tokens == reasoning


def usage_of(event):
    """The counts in an event, or None."""
    values = {} if event.data == "[DONE]" else json.loads(event.data)
    return values.get("response", values).get("usage")


@pytest.mark.parametrize("api", REQUESTS)
@pytest.mark.parametrize("finish", ["stop", "length"])
def test_a_cut_call_is_reported_not_mended(chat, api, finish):
    cut = "a</think>" + CALLED[: CALLED.index("onn")]
    answer, events = answered(chat, REQUESTS[api], cut, finish, api)
    (found,) = answer.problems
    assert found.name == "get_weather" and "JSON" in found.message
    whole = answer.whole()
    holder = whole["choices"][0] if api == "chat" else whole
    assert holder["tool_call_errors"] == [found._asdict()]
    assert sum("tool_call_errors" in event.data for event in events) == 1
    if api == "chat":
        call = message(answer)["tool_calls"][0]
        assert call["function"]["arguments"] == '{"city": "B' and call["id"] == found.id
        assert answer.finish_reason == ("length" if finish == "length" else "tool_calls")


def test_an_answer_that_fails_or_is_cancelled(chat):
    for api, request in REQUESTS.items():
        answer = chat.read(request, api).answer("id")
        answer.push(byte_ids("a"))
        (event,) = answer.finish("error", "the logits are not finite")
        assert "not finite" in event.data and (event.event == "error") == (api != "chat")
        assert answer.finish_reason == "error" and answer.push([1]) == []
        with pytest.raises(RuntimeError):
            answer.whole()
        other = chat.read(request, api).answer("id")
        assert other.finish("cancelled") == [] and other.done


def test_an_empty_answer(chat):
    for api, request in REQUESTS.items():
        answer = chat.read(request, api).answer("id")
        assert answer.finish("length") and answer.output_tokens == 0


TREE = {"$defs": {"n": {"anyOf": [{"$ref": "#/$defs/n"}, {"$ref": "#/$defs/n"}]}}}


@pytest.mark.parametrize(
    "schema, arguments, says",
    [
        ({"required": ["a"]}, "{}", "'a' is a required property"),
        ({"properties": {"a": {"type": "integer"}}}, '{"a": "1"}', 'arguments["a"]'),
        ({"properties": {"a": {"enum": [1]}}}, '{"a": 1}', None),
        ({"properties": {"a": {"pattern": "^(a+)+$"}}}, '{"a": "' + "a" * 40 + 'b"}', None),
        ({"patternProperties": {"^(a+)+$": {}}, "additionalProperties": False}, '{"x": 1}', None),
        ({"additionalProperties": False}, '{"x": 1}', "x"),
        (TREE | {"$ref": "#/$defs/n"}, "{}", "too deep"),
        ({"$ref": "http://127.0.0.1:9/schema.json"}, "{}", "cannot be read"),
        ({"type": "nothing"}, "{}", "cannot be read"),
        ({"required": 5}, "{}", "cannot be read"),
        (None, "{}", None),
        ({}, "[]", "no JSON object"),
        ({}, '{"a": NaN}', "JSON"),
        ({}, '{"a": 1, "a": 2}', "twice"),
        ({}, "", "JSON"),
    ],
)
def test_arguments_against_their_schema(schema, arguments, says):
    found = problem(Call("i", "f", arguments), {"f": schema})
    assert found is None if says is None else says in found.message
    assert problem(Call("i", "g", arguments), {"f": schema}).message.startswith("there is no tool")
