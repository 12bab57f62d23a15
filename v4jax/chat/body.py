"""The keys of a request's body: which are taken, which are translated, which are refused.

deepseek-recipe ignores what it does not know. A key that would change the answer must not be
ignored: it is mapped to the engine, or the request is refused.
"""

import json
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from v4jax.chat.errors import refusal
from v4jax.errors import InputError
from v4jax.files.json_reader import parse_json, word

_SAMPLING = ("presence_penalty", "frequency_penalty", "repetition_penalty", "logit_bias")
_FILTERS = ("top_k", "min_p")

TAKEN = {
    "chat": {
        *("model", "messages", "max_tokens", "temperature", "top_p", "seed", "stop", "stream"),
        *("stream_options", "logprobs", "top_logprobs", "response_format", "tools", "tool_choice"),
        *("thinking", "reasoning_effort", "n"),
    },
    "responses": {
        *("model", "input", "instructions", "max_output_tokens", "temperature", "top_p", "stream"),
        *("top_logprobs", "reasoning", "text", "tools", "tool_choice"),
    },
    "messages": {
        *("model", "messages", "system", "max_tokens", "temperature", "top_p", "stop_sequences"),
        *("stream", "tools", "tool_choice", "thinking", "output_config"),
    },
}
MAPPED = {
    "chat": {*_SAMPLING, *_FILTERS, "max_completion_tokens", "chat_template_kwargs"},
    "responses": set(),
    "messages": {"top_k"},
}
# These say who asks, where to keep things, or what to pay: no answer depends on them.
IGNORED = {
    *("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key"),
    *("prompt_cache_retention", "prediction"),
}
# Keys that may say what happens anyway.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "modalities": (["text"],),
    "verbosity": ("medium",),
    "truncation": ("disabled",),
    "background": (False,),
    "include": ([], ["reasoning.encrypted_content"]),
    "parallel_tool_calls": (True,),
    "mcp_servers": ([],),
}
_IMAGES = {
    *("image", "image_url", "input_image", "file", "input_file", "document", "input_audio"),
    *("audio", "video", "video_url"),
}
# In v4-preview high has no text and max the one that v4-ga has for high.
_PREVIEW_EFFORTS = {
    **dict.fromkeys((None, "minimal", "low", "medium", "high"), "low"),
    **dict.fromkeys(("xhigh", "ultra", "max"), "high"),
}


class Body(NamedTuple):
    """A body that deepseek-recipe may read, and what it would not see.

    Attributes:
      values: its keys. sampling: fields of the engine's request.
      must_call: names of the tools of which one has to be called; empty if none has to.
      one_call: whether no more than one may be.
      include_usage: whether a stream ends with the counts of tokens.
    """

    values: dict[str, Any]
    sampling: dict[str, Any]
    must_call: tuple[str, ...] = ()
    one_call: bool = False
    include_usage: bool = False


def read_body(api: str, body: bytes | str | dict[str, Any]) -> dict[str, Any]:
    """The body as an object; with a key that is null as without it.

    Raises:
      ChatError: it is none.
    """
    try:
        text = json.dumps(body) if isinstance(body, dict) else body
        values = parse_json(text, "the body")
    except (InputError, TypeError, ValueError, RecursionError) as error:
        raise refusal(api, str(error)[:300]) from None
    if not isinstance(values, dict):
        raise refusal(api, "the body is no JSON object; expected one")
    return {key: value for key, value in values.items() if value is not None}


def checked(api: str, values: dict[str, Any], served_name: str, profile: str) -> Body:
    """Takes apart what deepseek-recipe reads and what it would ignore.

    Raises:
      ChatError: another model, a key that is not known or cannot be obeyed, an image.
    """
    _check_model(api, values, served_name)
    one_call = _one_call(api, values)
    taken = _known(api, values)
    _refuse_images(api, taken)
    _refuse_developers(api, taken)
    if api == "chat":
        _translate(values, taken)
    if profile == "v4-preview":
        _lower_effort(api, taken)
    must_call = _must_call(api, taken)
    if one_call and not must_call and taken.get("tools"):
        key = "disable_parallel_tool_use" if api == "messages" else "parallel_tool_calls"
        raise refusal(
            api, f"{key} can be obeyed only where tool_choice requires a call; leave it out", key
        )
    return Body(taken, _sampling(api, values), must_call, one_call, _include_usage(taken))


def _check_model(api, values, served_name):
    name = values.get("model")
    if not isinstance(name, str):
        raise refusal(api, "the body has no model; expected its name", "model")
    if name != served_name:
        message = f"there is no model {word(name, 60)}; expected {served_name}"
        raise refusal(api, message, "model", 404, "model_not_found")


def _known(api, values):
    """The keys that deepseek-recipe reads."""
    for key, value in values.items():
        if key in TAKEN[api] or key in MAPPED[api] or key in IGNORED:
            continue
        if key == "stream_options" or value in NEUTRAL.get(key, ()):
            continue
        if key == "parallel_tool_calls" and value is False:
            continue
        if key in NEUTRAL:
            expected = " or ".join(json.dumps(each) for each in NEUTRAL[key])
            raise refusal(api, f"{key} can only be {expected} here; leave it out", key)
        raise refusal(api, f"{word(key, 60)} is not known here; leave it out", word(key, 60))
    return {key: value for key, value in values.items() if key in TAKEN[api]}


def _parts(api, values) -> Iterator[Any]:
    """Every part of every content."""
    items = values.get("input" if api == "responses" else "messages")
    for item in items if isinstance(items, list) else ():
        if not isinstance(item, dict):
            continue
        for key in ("content", "output"):
            for part in item[key] if isinstance(item.get(key), list) else ():
                yield part
                inner = part.get("content") if isinstance(part, dict) else None
                yield from inner if isinstance(inner, list) else ()


def _refuse_images(api, values):
    for part in _parts(api, values):
        kind = part.get("type") if isinstance(part, dict) else None
        if isinstance(kind, str) and kind in _IMAGES:
            raise refusal(api, f"a content has a part of type {kind}; the model reads text alone")


def _refuse_developers(api, values):
    messages = values.get("messages")
    for i, message in enumerate(messages if isinstance(messages, list) else ()):
        if isinstance(message, dict) and message.get("role") == "developer":
            param = f"messages[{i}].role"
            raise refusal(api, f"{param} is developer, which V4 does not have; use system", param)


def _translate(values, taken):
    """Other names for what deepseek-recipe knows."""
    if "max_completion_tokens" in values:
        taken["max_tokens"] = values["max_completion_tokens"]
    template = values.get("chat_template_kwargs", {})
    if not isinstance(template, Mapping):
        raise refusal("chat", "chat_template_kwargs is no object", "chat_template_kwargs")
    for key, value in template.items():
        if key in ("thinking", "enable_thinking") and isinstance(value, bool):
            taken.setdefault("thinking", {"type": "enabled" if value else "disabled"})
        elif key == "reasoning_effort":
            taken.setdefault("reasoning_effort", value)
        else:
            name = f"chat_template_kwargs.{word(key, 60)}"
            raise refusal("chat", f"{name} is not known here; leave it out", name)


def _lower_effort(api, taken):
    """The effort whose text v4-ga has where v4-preview has the same."""
    holder, key = taken, "reasoning_effort"
    if api != "chat":
        outer, key = ("reasoning", "effort") if api == "responses" else ("output_config", "effort")
        holder = taken[outer] = taken.get(outer, {})
        if not isinstance(holder, dict):
            return  # the reader refuses it
    effort = holder.get(key)
    if (effort is None or isinstance(effort, str)) and effort in _PREVIEW_EFFORTS:
        holder[key] = _PREVIEW_EFFORTS[effort]


def _must_call(api, taken) -> tuple[str, ...]:
    """Names of the tools of which one has to be called."""
    choice, tools = taken.get("tool_choice"), taken.get("tools")
    tools = tools if isinstance(tools, list) else ()  # the reader refuses anything else
    names = tuple(_name(tool) for tool in tools if isinstance(tool, dict))
    kind = choice.get("type") if isinstance(choice, dict) else choice
    named = isinstance(choice, dict) and kind in ("any", "function", "tool")
    if kind != "required" and not named:
        return ()
    if not names:
        raise refusal(api, "tool_choice requires a call and there are no tools", "tool_choice")
    if kind == "any":  # which deepseek-recipe takes for auto
        if len(names) > 1:
            message = "tool_choice any works with one tool; name the tool, or leave it out"
            raise refusal(api, message, "tool_choice")
        taken["tool_choice"] = {"type": "tool", "name": names[0]}
    if kind in ("required", "any"):
        return names
    if (name := _name(choice)) not in names:
        raise refusal(api, "tool_choice names a tool that is not there", "tool_choice")
    return (name,)


def _name(tool):
    """Of a tool, or of the tool that is chosen, in each API's form."""
    inner = tool.get("function")
    name = inner.get("name") if isinstance(inner, dict) else tool.get("name")
    return name if isinstance(name, str) else ""


def _one_call(api, values):
    if api != "messages":
        return values.get("parallel_tool_calls") is False
    choice = values.get("tool_choice")
    return isinstance(choice, dict) and choice.get("disable_parallel_tool_use") is True


def _sampling(api, values):
    """Fields of the engine's request; the engine checks their ranges."""
    names = {
        "presence_penalty": "presence",
        "frequency_penalty": "frequency",
        "repetition_penalty": "repetition",
    }
    found = {new: values[old] for old, new in names.items() if old in values}
    found |= {key: values[key] for key in _FILTERS if key in values}
    bias = values.get("logit_bias")
    if bias is not None:
        try:
            found["bias"] = {int(token): value for token, value in bias.items()}
        except (AttributeError, ValueError):
            message = "logit_bias is no object of token ids and numbers"
            raise refusal(api, message, "logit_bias") from None
    return found


def _include_usage(taken):
    options = taken.get("stream_options")
    return isinstance(options, dict) and options.get("include_usage") is True
