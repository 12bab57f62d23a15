"""Requests to ids and settings: what is mapped, what is refused, what fuzzing must not break."""

import json
import re

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.support.chats import (
    ASSISTANT,
    DSML,
    END_THINK,
    EOS,
    SPECIALS,
    THINK,
    USER,
    WEATHER,
    body,
    byte_ids,
    calls,
    chat_directory,
    dsml,
    encoded,
    user,
)
from v4jax.chat.errors import ChatError
from v4jax.chat.format import ChatFormat
from v4jax.engine.choice import ALL
from v4jax.errors import InputError

OFF = {"thinking": {"type": "disabled"}}


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return chat_directory(tmp_path_factory.mktemp("chat"))


@pytest.fixture(scope="module")
def chat(directory):
    return ChatFormat(directory, "m", max_length=4096)


def refused(chat, request, api="chat"):
    with pytest.raises(ChatError) as caught:
        chat.read(request, api)
    error = caught.value
    assert 400 <= error.status < 500
    assert error.body["error"]["message"]
    assert ("type" in error.body) == (api == "messages")
    json.dumps(error.body)
    return error


def test_a_checkpoint_without_a_tokenizer_or_its_tokens(tmp_path):
    with pytest.raises(InputError, match="cannot chat.*completions.*alone"):
        ChatFormat(tmp_path, "m", max_length=100)
    chat_directory(tmp_path, [name for name in SPECIALS if name != "｜DSML｜"])
    with pytest.raises(InputError, match="lacks .*｜DSML｜.*cannot chat.*completions alone"):
        ChatFormat(tmp_path, "m", max_length=100)


def test_odd_settings(directory):
    with pytest.raises(InputError, match="profile is 'v5'"):
        ChatFormat(directory, "m", "v5", max_length=100)
    with pytest.raises(InputError, match="config.json"):
        ChatFormat(directory, "m")


def test_what_the_engine_gets(chat):
    request = body(user("Hi"), temperature=0.25, top_p=0.5, seed=2**40 + 7, max_tokens=5, **OFF)
    conversation = chat.read(request | {"logprobs": True, "top_logprobs": 3, "stop": "x"})
    made = conversation.request(salt="s", request_id="r")
    assert list(made.tokens) == conversation.tokens
    assert (made.max_new_tokens, made.temperature, made.top_p) == (5, 0.25, 0.5)
    assert made.seed == 7 ^ (2**40 >> 32) and made.logprobs == 3
    assert made.stop == () and conversation.stop == ("x",)  # the answer finds it in the content
    assert made.stop_ids == {EOS} and made.salt == "s" and made.keep_at == ()


def test_the_same_by_other_names(chat):
    plain = chat.read(body(user("Hi"), max_tokens=9, **OFF))
    named = {"max_completion_tokens": 9, "chat_template_kwargs": {"thinking": False}}
    other = chat.read(body(user("Hi"), **named, user="u", store=True, n=1, verbosity=None))
    assert other.tokens == plain.tokens and other.max_new_tokens == 9
    assert not other.thinking and chat.read(body(user("Hi"))).thinking


def test_thinking_decides_the_temperature(chat):
    conversation = chat.read(body(user("Hi"), temperature=0.1, top_p=0.2))
    assert (conversation.temperature, conversation.top_p) == (1.0, 1.0)


def test_an_answer_may_fill_the_context(chat):
    conversation = chat.read(body(user("Hi"), **OFF))
    assert conversation.max_new_tokens == 4096 - len(conversation.tokens)
    assert "maximum context" in refused(chat, body(user("x" * 5000))).body["error"]["message"]
    refused(chat, body(user("Hi"), max_tokens=4095))


def test_where_a_prompt_is_worth_storing(chat):
    conversation = chat.read(
        body(user("a" * 500), {"role": "assistant", "content": "b"}, user("c"))
    )
    place = max(i for i, token in enumerate(conversation.tokens) if token == USER)
    assert conversation.keep_at == (place // 128 * 128,)
    assert conversation.keep_at[0] >= 384


@pytest.mark.parametrize(
    "more, says",
    [
        ({"n": 2}, "n value"),
        ({"foo": 1}, "foo"),
        ({"functions": []}, "functions"),
        ({"chat_template_kwargs": {"tone": 1}}, "chat_template_kwargs.tone"),
        ({"chat_template_kwargs": 3}, "chat_template_kwargs"),
        ({"tool_choice": "required"}, "no tools"),
        ({"tool_choice": "required", "tools": [WEATHER]}, "Thinking"),
        (
            {"tool_choice": {"type": "function", "function": {"name": "x"}}, "tools": [WEATHER]},
            "names a tool",
        ),
        ({"tools": [WEATHER], "parallel_tool_calls": False}, "parallel_tool_calls"),
        ({"messages": [user([{"type": "image_url", "image_url": {"url": "x"}}])]}, "image_url"),
        ({"messages": [{"role": "developer", "content": "x"}]}, "use system"),
        ({"seed": -1}, "seed|u64"),
        ({"temperature": float("nan")}, "NaN"),
        ({"response_format": {"type": "json_object"}}, "json"),
        ({"logit_bias": [1]}, "logit_bias"),
        ({"min_p": 2}, "min_p"),
        ({"modalities": ["audio"]}, "modalities"),
    ],
)
def test_what_cannot_be_obeyed_is_refused(chat, more, says):
    message = refused(chat, body(user("Hi")) | more).body["error"]["message"]
    assert re.search(says, message)


@pytest.mark.parametrize(
    "api, more",
    [
        ("responses", {"input": "x", "previous_response_id": "r"}),
        ("responses", {"input": "x", "include": ["message.output_text.logprobs"]}),
        ("responses", {"input": [user([{"type": "input_image", "image_url": "x"}])]}),
        ("messages", {"max_tokens": 5, "messages": [user("x")], "tool_choice": {"type": "any"}}),
        (
            "messages",
            {"max_tokens": 5, "messages": [user([{"type": "image", "source": {}}])]},
        ),
    ],
)
def test_other_apis_refuse_too(chat, api, more):
    refused(chat, {"model": "m"} | more, api)


def test_another_model_is_not_found(chat):
    error = refused(chat, {"model": "other", "messages": []})
    assert error.status == 404 and error.body["error"]["code"] == "model_not_found"
    assert refused(chat, {"messages": []}).status == 400


@pytest.mark.parametrize("raw", [b"", b"{", b"[]", b"\xff", b"null", b'{"a":1,"a":2}', "[" * 9999])
def test_bodies_that_are_none(chat, raw):
    for api in ("chat", "responses", "messages"):
        assert refused(chat, raw, api).status == 400


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=20)
    | st.sampled_from(["user", "assistant", "tool", "function", "text", "required", "m", "type"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                [
                    "role",
                    "content",
                    "type",
                    "text",
                    "name",
                    "function",
                    "parameters",
                    "tool_calls",
                    "id",
                ]
            )
            | st.text(max_size=5),
            inner,
            max_size=4,
        )
    ),
    max_leaves=12,
)
KEYS = st.sampled_from(
    [
        *("messages", "tools", "tool_choice", "max_tokens", "temperature", "top_p", "seed", "stop"),
        *("stream", "stream_options", "response_format", "thinking", "reasoning_effort", "input"),
        *("logit_bias", "top_k", "chat_template_kwargs", "reasoning", "output_config", "text"),
        *("presence_penalty", "logprobs", "top_logprobs", "n", "system", "parallel_tool_calls"),
    ]
)


@given(
    st.sampled_from(["chat", "responses", "messages"]),
    st.dictionaries(KEYS, VALUES, max_size=4),
    st.booleans(),
)
@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
def test_nothing_else_is_raised(chat, api, values, sound):
    base = {"model": "m", "max_tokens": 9, "messages": [user("json")], "input": "json"}
    base.pop("input" if api != "responses" else "messages")
    if api == "responses":
        base.pop("max_tokens")
    for profile in ("v4-ga", "v4-preview"):
        chat.profile = profile
        try:
            chat.read((base if sound else {"model": "m"}) | values, api)
        except ChatError as error:
            assert 400 <= error.status < 500
            json.dumps(error.body)
    chat.profile = "v4-ga"


def bits(mask):
    return {
        32 * word + bit for word, value in enumerate(mask) for bit in range(32) if value >> bit & 1
    }


def test_a_format_begins_behind_the_reasoning(chat):
    pytest.importorskip("llguidance")
    conversation = chat.read(body(user("x json"), response_format={"type": "json_object"}))
    matcher = conversation.constraint.matcher(chat.tokenizer, None)
    free = set(range(len(matcher.allowed()) * 32)) - {EOS}
    brace = byte_ids("{")[0]
    assert bits(matcher.allowed()) == free
    masks = matcher.walk([*byte_ids("no{"), END_THINK, brace, brace])
    assert [bits(mask) == free for mask in masks] == [True] * 4 + [False] * 2
    assert len(matcher.walk([5, EOS, 5])) == 2
    for token in [*byte_ids("no{"), END_THINK]:
        assert not matcher.done()
        matcher.advance(token)
    assert brace in bits(matcher.allowed()) and ALL not in matcher.allowed()
    for token in byte_ids('{"a": 1}'):
        matcher.advance(token)
    assert EOS in bits(matcher.allowed())


def test_a_required_call_is_one(chat):
    pytest.importorskip("llguidance")
    request = body(user("x"), tools=[WEATHER], tool_choice="required", **OFF)

    def legal(said, **more):
        matcher = chat.read(request | more).constraint.matcher(chat.tokenizer, None)
        return len(matcher.walk([*encoded(said), EOS])) - 1 == len(encoded(said)) + 1

    end = "\n</｜DSML｜tool_calls>"
    call = dsml("get_weather", city="Bo</b>nn\n", days=2)
    assert legal(call + end) and legal(call + "\n" + dsml("get_weather", city="") + end)
    assert not legal("I cannot.")
    assert not legal(dsml("get_weather", days=2) + end)  # city is required
    assert not legal(dsml("get_weather", city="Bonn", days=0) + end)
    assert not legal(dsml("get_time", city="Bonn") + end)
    assert not legal(call + "\n" + call + end, parallel_tool_calls=False)
    tokens = chat.read(request).tokens
    assert tokens[-len(byte_ids("tool_calls>\n")) - 1] == DSML


def test_a_grammar_that_cannot_be_used(chat):
    pytest.importorskip("llguidance")
    schema = {"type": "object", "properties": {"a": {"type": "nothing"}}}
    wanted = {"type": "json_schema", "json_schema": {"name": "n", "schema": schema}}
    assert refused(chat, body(user("x"), response_format=wanted)).status == 400


def test_a_turn_that_comes_back_keeps_its_tokens(directory):
    chat = ChatFormat(directory, "m", max_length=1 << 16)
    tools = [WEATHER]
    first = chat.read(body(user("x"), tools=tools), tenant="t")
    answer = first.answer("id")
    # As no renderer writes it: the arguments in another order, a line at the end.
    sampled = encoded("hm</think>Well" + calls(dsml("get_weather", days=2, city="Bonn")) + "\n")
    answer.push([*sampled, EOS])
    assert not answer.done and answer.finish("stop") and not answer.finish("stop")
    message = answer.whole()["choices"][0]["message"]
    call = message["tool_calls"][0]
    arguments = json.loads(call["function"]["arguments"])
    call["function"]["arguments"] = json.dumps(arguments, indent=1, sort_keys=True)
    result = {"role": "tool", "tool_call_id": call["id"], "content": "rain"}

    def again(changed, tenant="t", **more):
        return chat.read(
            body(user("x"), changed, result, tools=tools, **more), tenant=tenant
        ).tokens

    expected = [*first.tokens, *sampled, EOS]
    assert again(message)[: len(expected)] == expected
    assert again(message)[-2:] == [ASSISTANT, THINK]
    rendered = again(message, tenant="other")
    assert rendered[: len(expected)] != expected
    assert again(message | {"content": "Hm"}) != again(message)
    assert again(message | {"reasoning_content": ""})[: len(expected)] != expected
    assert again(message, **OFF)[: len(expected)] != expected
    chat.kept.forget("t")
    assert again(message) == rendered
