"""POST /v1/completions: prompts of text or ids, continued (inference.md, 6.2)."""

import dataclasses
import time
from collections.abc import AsyncIterator
from typing import Any

from v4jax.engine.request import STOP_STRINGS, TOP_LOGPROBS, Event, Request, Result, TokenLogprob
from v4jax.serve import sse
from v4jax.serve.body import unless_left
from v4jax.serve.call import Call, Streamed, checked_end
from v4jax.serve.detail import EVENT
from v4jax.serve.errors import Refused
from v4jax.serve.fields import Fields, check_text, wrong
from v4jax.serve.running import merged
from v4jax.serve.token_names import TokenNames

DEFAULT_TOKENS = 16
_LARGEST_SEED = 2**63 - 1


@dataclasses.dataclass
class Asked:
    """A body that was read.

    Attributes:
      prompts: ids. copies: answers to each. settings: further fields of the engine's request.
    """

    prompts: list[list[int]]
    copies: int
    new_tokens: int
    echo: bool
    stream: bool
    include_usage: bool
    logprobs: int | None
    settings: dict[str, Any]

    @property
    def runs(self) -> bool:
        """Whether the model has anything to do."""
        return self.new_tokens > 0 or (self.echo and self.logprobs is not None)


async def completions(call: Call) -> Any:
    """The handler; see `answered`."""
    fields = Fields(await call.json())
    asked = await call.serving.in_pool(read, fields, call)
    call.check_tokens(
        [each for each in asked.prompts for _ in range(asked.copies)], asked.new_tokens
    )
    if asked.runs:
        await call.submit(_requests(asked, call))
    if asked.stream:
        return Streamed(_streamed(call, asked))
    return await unless_left(call.request.receive, _whole(call, asked))


def read(fields: Fields, call: Call) -> Asked:
    """A body's fields, checked; takes time with the prompts' length."""
    served = call.serving.settings.name
    if fields.text("model", served) != served:
        raise Refused(
            404, f"there is no such model here; the one that is served is {served}",
            param="model", code="model_not_found",
        )  # fmt: skip
    special = fields.flag("add_special_tokens", True)
    prompts = _prompts(fields.take("prompt"), special, call.serving)
    copies = fields.whole("n", 1, 1, call.serving.settings.max_choices)
    if fields.whole("best_of", copies, 1, _LARGEST_SEED) != copies:
        raise wrong("best_of", "it to be left out, or the same as n")
    if copies * len(prompts) > call.serving.settings.max_choices:
        raise wrong("n", f"at most {call.serving.settings.max_choices} answers in one request")
    echo, stream = fields.flag("echo"), fields.flag("stream")
    logprobs = fields.whole("logprobs", None, 0, TOP_LOGPROBS)
    limit = call.serving.engine.max_length
    room = max(1, limit - max(map(len, prompts)))
    new = fields.whole("max_tokens", min(DEFAULT_TOKENS, room), 0 if echo else 1, 2**31 - 1)
    asked = Asked(
        prompts, copies, new, echo, stream, _include_usage(fields, stream), logprobs,
        _settings(fields, call.serving),
    )  # fmt: skip
    fields.nothing("suffix")
    fields.text("user")
    fields.end()
    return asked


def _settings(fields, serving):
    seed = fields.whole("seed", None, 0, _LARGEST_SEED)
    stop = fields.take("stop", [])
    stop = [stop] if isinstance(stop, str) else stop
    if not isinstance(stop, list) or len(stop) > STOP_STRINGS:
        raise wrong("stop", f"a text, or up to {STOP_STRINGS} of them")
    ids = fields.take("stop_token_ids", [])
    if not _is_ids(ids) or any(token >= serving.engine.vocab_size for token in ids):
        raise wrong("stop_token_ids", "a list of token ids")
    return {
        "temperature": fields.number("temperature", 1.0, 0.0, 100.0),
        "top_p": _positive(fields.number("top_p", 1.0, 0.0, 1.0)),
        "top_k": max(0, fields.whole("top_k", 0, -1, 2**31 - 1)),
        "min_p": fields.number("min_p", 0.0, 0.0, 1.0),
        "seed": None if seed is None else seed % 2**32,
        "stop": tuple(text for each in stop if (text := check_text("stop", each))),
        "stop_ids": serving.stop_ids | set(ids),
        "presence": fields.number("presence_penalty", 0.0, -2.0, 2.0),
        "frequency": fields.number("frequency_penalty", 0.0, -2.0, 2.0),
        "repetition": fields.number("repetition_penalty", 1.0, 0.01, 100.0),
        "bias": _bias(fields.take("logit_bias", {}), serving.engine.vocab_size),
    }


def _bias(given, vocab_size):
    """What is added to the logits of some tokens; JSON names them by their ids as texts."""
    expected = f"numbers from -100 to 100 by token id, 0 to {vocab_size - 1}"
    if not isinstance(given, dict):
        raise wrong("logit_bias", expected)
    found = {}
    for name, value in given.items():
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not (number and -100 <= value <= 100 and name.isascii() and name.isdigit()):
            raise wrong("logit_bias", expected)
        if len(name) > 9 or int(name) >= vocab_size:
            raise wrong("logit_bias", expected)
        found[int(name)] = float(value)
    return found or None


def _positive(top_p):
    if top_p == 0:
        raise wrong("top_p", "a number above 0, up to 1")
    return top_p


def _include_usage(fields, stream):
    options = fields.take("stream_options", {})
    if not isinstance(options, dict) or (options and not stream):
        raise wrong("stream_options", "an object, and stream true")
    inner = Fields(options)
    wanted = inner.flag("include_usage")
    inner.end()
    return wanted


def _prompts(prompt, special, serving) -> list[list[int]]:
    """The ids of every prompt."""
    if isinstance(prompt, str) or _is_ids(prompt):
        prompt = [prompt]
    if not isinstance(prompt, list) or not prompt:
        raise wrong(
            "prompt", "a text, a list of texts, a list of token ids or a list of such lists"
        )
    if len(prompt) > serving.settings.max_choices:
        raise wrong("prompt", f"at most {serving.settings.max_choices} prompts")
    if all(isinstance(each, str) for each in prompt):
        found = [serving.names.encode(check_text("prompt", each), special) for each in prompt]
    elif all(_is_ids(each) for each in prompt):
        found = prompt
    else:
        raise wrong("prompt", "texts alone, or lists of token ids alone")
    vocabulary = serving.engine.vocab_size
    for ids in found:
        if not ids:
            raise wrong("prompt", "at least one token in each")
        if max(ids) >= vocabulary:
            raise wrong("prompt", f"token ids from 0 to {vocabulary - 1}")
    return found


def _is_ids(value):
    """A list of whole numbers, none negative; an empty one counts."""
    return isinstance(value, list) and all(type(each) is int and each >= 0 for each in value)


def _requests(asked: Asked, call: Call) -> list[Request]:
    # Each list of alternatives has to have the best one.
    top = None if asked.logprobs is None else max(1, asked.logprobs)
    scores = top if asked.echo else None
    more = asked.settings | {"logprobs": top, "prompt_logprobs": scores, "salt": call.tenant}
    return [
        Request(ids, max_new_tokens=asked.new_tokens, row=copy, request_id=call.id, **more)
        for ids in asked.prompts
        for copy in range(asked.copies)
    ]


async def _whole(call, asked):
    """The response that is not streamed."""
    settings = call.serving.settings
    async for place, event in _events(call, asked):
        if event is not None:
            call.saw(place, event)
            if event.finish is not None:
                checked_end(event)
    results = _results(call, asked)
    choices = await call.serving.in_pool(
        lambda: [_choice(call, asked, place, result) for place, result in enumerate(results)]
    )
    call.finish = choices[0]["finish_reason"]
    call.answer = [result.text for result in results]
    return _head(call) | {
        "choices": choices,
        "usage": _usage(call, asked),
        "system_fingerprint": f"{settings.name}-{settings.profile}",
    }


def _events(call, asked) -> AsyncIterator[tuple[int, Event | None]]:
    settings = call.serving.settings
    return merged(call.answerings, settings.max_waiting_seconds, settings.keep_alive_seconds)


def _results(call, asked) -> list[Result]:
    if asked.runs:
        return [each.stream.so_far for each in call.answerings]
    return [Result(len(ids), finish="length") for ids in call.prompts]


def _choice(call, asked, place, result):
    """One element of `choices`."""
    prompt = _Prompt(call, asked, place, result.prompt_logprobs)
    told = None
    if asked.logprobs is not None:
        told = prompt.logprobs.told()
        _merge(told, prompt.logprobs.of(result.logprobs))
    return {
        "index": place,
        "text": prompt.text + result.text,
        "logprobs": told,
        "finish_reason": result.finish,
    }


class _Prompt:
    """What a choice begins with: the prompt where it is echoed."""

    def __init__(self, call, asked, place, scores):
        names, ids = call.serving.names, call.prompts[place]
        self.logprobs = _Logprobs(names, call.serving.tokenizer, asked.logprobs or 0)
        self.text = ""
        if asked.echo:
            self.text = call.serving.tokenizer.decode(ids)
            if asked.logprobs is not None and scores is not None:
                self.logprobs.echo(ids, scores)


class _Logprobs:
    """The object `logprobs`, made token by token; offsets count characters of the choice's text."""

    def __init__(self, names: TokenNames, tokenizer, count: int):
        self._names, self._count = names, max(1, count)
        self._text, self._offset = tokenizer.stream(), 0
        self._tokenizer, self._told = tokenizer, _empty()

    def told(self) -> dict[str, list]:
        """What was made since the last call."""
        told, self._told = self._told, _empty()
        return told

    def echo(self, ids, scores) -> None:
        """Takes the prompt in, whose first token has no log-probability."""
        for token, score in zip(ids, scores, strict=True):
            self._add(token, None if score is None else score)
        self._offset = len(self._tokenizer.decode(ids))
        self._text = self._tokenizer.stream()

    def of(self, scores: list[TokenLogprob]) -> dict[str, list]:
        """The same for tokens of the answer."""
        for score in scores:
            self._add(score.token, score)
        return self.told()

    def _add(self, token, score):
        told = self._told
        told["tokens"].append(self._names.name(token))
        told["text_offset"].append(self._offset)
        told["token_logprobs"].append(None if score is None else score.logprob)
        told["top_logprobs"].append(None if score is None else self._alternatives(score))
        self._offset += len(self._text.add(token))

    def _alternatives(self, score):
        """The likeliest tokens, of which the best one is the first, and the chosen one."""
        top = list(score.top[: self._count])
        if all(token != score.token for token, _ in top):
            top.append((score.token, score.logprob))
        return self._names.by_name(top)


def _empty() -> dict[str, list]:
    return {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}


def _merge(told, more):
    for name, values in more.items():
        told[name] += values


async def _streamed(call, asked):
    """The chunks of a streamed response."""
    prompts: dict[int, _Prompt] = {}
    call.answer = [""] * len(call.prompts)
    if not asked.runs:
        for place, result in enumerate(_results(call, asked)):
            yield sse.data(_head(call) | {"choices": [_choice(call, asked, place, result)]})
    async for place, event in _events(call, asked):
        if event is None:
            yield sse.QUIET
            continue
        call.saw(place, event)
        if event.finish is not None:
            checked_end(event)
        text, told = event.text, None
        if place not in prompts:
            scores = call.answerings[place].stream.so_far.prompt_logprobs
            prompts[place] = _Prompt(call, asked, place, scores)
            text = prompts[place].text + text
        if asked.logprobs is not None:
            told = prompts[place].logprobs.told()
            _merge(told, prompts[place].logprobs.of(list(event.logprobs)))
        call.answer[place] += event.text
        call.finish = event.finish
        if (more := call.detail(place)) is not None:
            yield sse.data(more, EVENT)
        choice = {"index": place, "text": text, "logprobs": told, "finish_reason": event.finish}
        yield sse.data(_head(call) | {"choices": [choice]})
    if asked.include_usage:
        yield sse.data(_head(call) | {"choices": [], "usage": _usage(call, asked)})


def _head(call):
    return {
        "id": f"cmpl-{call.id}",
        "object": "text_completion",
        "created": int(time.time()),
        "model": call.serving.settings.name,
    }


def _usage(call, asked):
    """Counts of tokens; a prompt with several answers counts once."""
    prompt = sum(map(len, asked.prompts))
    streams = [each.stream.so_far.cached_tokens for each in call.answerings]
    cached = sum(streams[:: asked.copies])
    return {
        "prompt_tokens": prompt,
        "completion_tokens": call.cost.output,
        "total_tokens": prompt + call.cost.output,
        "prompt_tokens_details": {"cached_tokens": cached},
        "completion_tokens_details": {"reasoning_tokens": 0},
        "prompt_cache_hit_tokens": cached,
        "prompt_cache_miss_tokens": prompt - cached,
    }
