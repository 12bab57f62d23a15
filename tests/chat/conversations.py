"""Twenty conversations whose ids are golden: name, profile, API, body.

golden.json holds their ids, runs of bytes as text and special tokens as numbers. It was written
once by deepseek-recipe 0.2.0 and read through; a version that renders otherwise fails the test.
"""

from tests.support.chats import WEATHER, body, user

OFF = {"thinking": {"type": "disabled"}}
LOW = {"reasoning_effort": "low"}
SYSTEM = {"role": "system", "content": "Answer in one word."}
CALL = {
    "role": "assistant",
    "content": "",
    "reasoning_content": "I look it up.",
    "tool_calls": [
        {
            "id": "call_1",
            "type": "function",
            "function": {"name": "get_weather", "arguments": '{"city": "Bonn", "days": 2}'},
        }
    ],
}
RESULT = {"role": "tool", "tool_call_id": "call_1", "content": '{"sky": "clear"}'}
TWO_CALLS = CALL | {
    "content": "Both, then.",
    "tool_calls": [
        *CALL["tool_calls"],
        {"id": "call_2", "type": "function", "function": {"name": "now", "arguments": "{}"}},
    ],
}
NOW = {"type": "function", "function": {"name": "now", "description": "The time"}}
CLEAR = {"role": "assistant", "content": "It is clear.", "reasoning_content": "It says clear."}
SCHEMA = {
    "type": "json_schema",
    "json_schema": {
        "name": "place",
        "schema": {"type": "object", "properties": {"name": {"type": "string"}}},
    },
}
TOOLS = [WEATHER]
MESSAGES_TOOL = {
    "name": "get_weather",
    "description": "Weather of a city",
    "input_schema": WEATHER["function"]["parameters"],
}

CONVERSATIONS = (
    ("plain", "v4-ga", "chat", body(user("Hello"), **OFF)),
    ("system", "v4-ga", "chat", body(SYSTEM, user("Grüße, 世界"), **OFF)),
    ("thinking", "v4-ga", "chat", body(user("Hello"))),
    ("low_effort", "v4-ga", "chat", body(user("Hello"), **LOW)),
    ("most_effort", "v4-ga", "chat", body(user("Hello"), reasoning_effort="max")),
    ("preview_thinking", "v4-preview", "chat", body(user("Hello"))),
    ("preview_most_effort", "v4-preview", "chat", body(user("Hello"), reasoning_effort="max")),
    ("preview_plain", "v4-preview", "chat", body(SYSTEM, user("Hello"), reasoning_effort="none")),
    ("special_names_typed", "v4-ga", "chat", body(user("a<｜Assistant｜></think>b"), **OFF)),
    ("several_turns", "v4-ga", "chat", body(user("Sky?"), CLEAR, user("Sure?"), **LOW)),
    ("several_turns_plain", "v4-ga", "chat", body(SYSTEM, user("Sky?"), CLEAR, user("?"), **OFF)),
    ("tools", "v4-ga", "chat", body(SYSTEM, user("Weather?"), tools=TOOLS, **LOW)),
    ("tools_preview", "v4-preview", "chat", body(user("Weather?"), tools=TOOLS)),
    (
        "tool_required",
        "v4-ga",
        "chat",
        body(user("Weather?"), tools=TOOLS, tool_choice="required", **OFF),
    ),
    ("tool_result", "v4-ga", "chat", body(user("Weather?"), CALL, RESULT, tools=TOOLS, **LOW)),
    (
        "two_tool_results",
        "v4-ga",
        "chat",
        body(
            user("Weather and time?"),
            TWO_CALLS,
            RESULT,
            {"role": "tool", "tool_call_id": "call_2", "content": "noon"},
            CLEAR,
            user("Thanks"),
            tools=[*TOOLS, NOW],
            **LOW,
        ),
    ),
    (
        "tool_result_plain",
        "v4-preview",
        "chat",
        body(user("Weather?"), CALL, RESULT, tools=TOOLS, reasoning_effort="none"),
    ),
    ("json_schema", "v4-ga", "chat", body(user("Where?"), response_format=SCHEMA, **OFF)),
    (
        "responses",
        "v4-ga",
        "responses",
        {
            "model": "m",
            "instructions": "Be brief.",
            "input": "Hello",
            "reasoning": {"effort": "low"},
        },
    ),
    (
        "messages",
        "v4-preview",
        "messages",
        {
            "model": "m",
            "max_tokens": 50,
            "system": "Be brief.",
            "messages": [
                user("Weather?"),
                {
                    "role": "assistant",
                    "content": [
                        {"type": "thinking", "thinking": "Look.", "signature": "s"},
                        {
                            "type": "tool_use",
                            "id": "t",
                            "name": "get_weather",
                            "input": {"days": 1},
                        },
                    ],
                },
                user([{"type": "tool_result", "tool_use_id": "t", "content": "rain"}]),
            ],
            "tools": [MESSAGES_TOOL],
        },
    ),
)
