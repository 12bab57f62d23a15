"""An answer on its way out: the engine's tokens to the events of an API, and to one whole object.

For one thread at a time. Every call gives the events that are to be sent now.
"""

import json
from collections.abc import Callable, Sequence
from typing import Any

from v4jax.chat.arguments import Problem, problem
from v4jax.chat.errors import error_body
from v4jax.chat.recipe import Recipe, Said, ServerEvent, Turn
from v4jax.engine.request import TokenLogprob

PROBLEMS = "tool_call_errors"  # our own key of an answer whose calls do not fit their schemas
# How each API calls the counts of tokens.
_OUTPUT = {
    "chat": "completion_tokens",
    "responses": "output_tokens",
    "messages": "output_tokens",
}
_PROMPT = {"chat": "prompt_tokens", "responses": "input_tokens", "messages": "input_tokens"}


class Answer:
    """The answer to one request.

    Args:
      recipe, turn: what was asked. request_id: the answer's id.
      prompt: ids of the prompt; header: the place in it behind which the answer's turn begins.
      stop_ids: ids that end the answer, and are no part of it.
      thinking_end: id that ends the reasoning with which the answer begins; None: there is none.
      include_usage: whether a stream of Chat Completions ends with the counts of tokens.
      keep: called with what a turn with calls said, the token before it and its tokens.

    Attributes:
      done: no further token is wanted: the engine's request can be cancelled.
      problems: calls whose arguments do not fit their schema.
      finish_reason: why it ended, in the API's word; None before.
      output_tokens, reasoning_tokens: how many there were. tool_names: of the calls.
    """

    def __init__(
        self,
        recipe: Recipe,
        turn: Turn,
        request_id: str,
        *,
        prompt: Sequence[int],
        header: int,
        stop_ids: frozenset[int],
        thinking_end: int | None,
        include_usage: bool,
        keep: Callable[[Said, int, list[int]], None],
    ):
        self._recipe, self._turn, self._prompt, self._header = recipe, turn, prompt, header
        self._stop_ids, self._include_usage, self._keep = stop_ids, include_usage, keep
        self._thinking_end = thinking_end
        self._events = recipe.events(turn, request_id)
        self._tokens: list[int] = []
        self._whole: dict[str, Any] | None = None
        self._began = False
        self.done = False
        self.problems: list[Problem] = []
        self.finish_reason: str | None = None
        self.output_tokens = self.reasoning_tokens = 0
        self.tool_names: tuple[str, ...] = ()

    def begin(self, cached_tokens: int = 0) -> list[ServerEvent]:
        """The first events. cached_tokens: of the prompt, that were not read again."""
        self._began = True
        return self._events.begin(len(self._prompt), cached_tokens)

    def push(
        self, tokens: Sequence[int], logprobs: Sequence[TokenLogprob] = ()
    ) -> list[ServerEvent]:
        """The events of further tokens, as an event of the engine has them."""
        if self.done:
            return []
        started = [] if self._began else self.begin()
        count = next((i for i, token in enumerate(tokens) if token in self._stop_ids), len(tokens))
        if not count:
            return started
        events = []
        # One by one: the package holds back all that comes together with a part of a character.
        for place in range(count):
            self._tokens.append(tokens[place])
            events += self._events.push([tokens[place]], logprobs[place : place + 1])
            if self._events.finished:
                break
        if self._events.finished:  # a stop text
            events = self._ended("stop", events)
        return started + events

    def finish(self, finish: str, error: str | None = None) -> list[ServerEvent]:
        """The last events.

        Args:
          finish: as of the engine's last event. error: its sentence, with "error".
        """
        if self.done:
            return []
        if finish in ("stop", "length"):
            started = [] if self._began else self.begin()
            return started + self._ended(finish, [])
        self.done, self.finish_reason = True, finish
        self._events.close()
        return [] if finish == "cancelled" else [_failure(self._turn.api, error or finish)]

    def whole(self) -> dict[str, Any]:
        """The answer as one object, once it has ended with "stop" or "length"."""
        if self._whole is None:
            raise RuntimeError("the answer has not come to its end")
        return self._whole

    def _ended(self, finish, events):
        """The events, and those behind them up to the last."""
        self.done = True
        events = events + self._events.finish(finish)
        whole = self._whole = self._events.whole()
        self.finish_reason = _finish_reason(whole)
        self.output_tokens, self.reasoning_tokens = len(self._tokens), self._reasoning()
        self._count(whole)
        if self._turn.tools and (ids := _call_ids(whole)):
            said = self._recipe.said(self._turn, self._tokens, ids)
            self.tool_names = tuple(call.name for call in said.calls)
            found = (problem(call, self._turn.tools) for call in said.calls)
            self.problems = [each for each in found if each is not None]
            if finish == "stop" and not self.problems and not self._turn.continues:
                begin = self._header + 1
                turn = [*self._prompt[begin:], *self._tokens]
                self._keep(said, self._prompt[self._header], turn)
        reports = [each._asdict() for each in self.problems]
        if reports:
            _report(whole, reports)
        return self._last(events, reports) + self._events.done()

    def _reasoning(self):
        """How many tokens came before the end of the reasoning."""
        if self._thinking_end is None:
            return 0
        ends = (i for i, token in enumerate(self._tokens) if token == self._thinking_end)
        return next(ends, len(self._tokens))

    def _count(self, values):
        """Sets the counts of an answer or an event: the package counts the tokens of its text."""
        usage = values.get("usage") or {}
        output, prompt = _OUTPUT[self._turn.api], _PROMPT[self._turn.api]
        if output in usage:
            usage[output] = self.output_tokens
            if "total_tokens" in usage:
                usage["total_tokens"] = usage[prompt] + self.output_tokens
            if details := usage.get(f"{output}_details"):
                details["reasoning_tokens"] = self.reasoning_tokens

    def _last(self, events, reports):
        """The last events as this API's clients expect them, with a report of calls."""
        if self._turn.api == "chat":
            *events, last = events
            return [*events, *self._last_chunks(json.loads(last.data), reports)]
        return [self._shaped(event, reports) for event in events]

    def _shaped(self, event, reports):
        if event.event not in ("response.completed", "response.incomplete", "message_delta"):
            return event
        values = json.loads(event.data)
        inner = values.get("response", values)
        self._count(inner)
        if reports:
            _report(inner, reports)
        return ServerEvent(event.event, _text(values))

    def _last_chunks(self, chunk, reports):
        """The counts come in a chunk of their own, and only where they are asked for."""
        self._count(chunk)
        usage = chunk.pop("usage", None)  # no chunk has it where the counts are not asked for
        if reports and chunk["choices"][0]["finish_reason"] is not None:
            _report(chunk, reports)
        chunks = [chunk]
        if self._include_usage:
            chunk["usage"] = None
            head = {key: value for key, value in chunk.items() if key not in ("choices", "usage")}
            chunks.append(head | {"choices": [], "usage": usage})
        return [ServerEvent(None, _text(each)) for each in chunks]


def _finish_reason(whole):
    """Why an answer ended, in the API's word."""
    if "choices" in whole:
        return whole["choices"][0]["finish_reason"]
    return whole.get("stop_reason") or whole.get("status")


def _call_ids(whole) -> list[str]:
    """The ids of an answer's calls, in the form of each API."""
    if "choices" in whole:
        return [call["id"] for call in whole["choices"][0]["message"].get("tool_calls") or ()]
    if "output" in whole:
        return [item["call_id"] for item in whole["output"] if item["type"] == "function_call"]
    return [block["id"] for block in whole["content"] if block["type"] == "tool_use"]


def _report(values, reports):
    """Puts the report where the answer's other results are."""
    holder = values["choices"][0] if values.get("choices") else values
    holder[PROBLEMS] = reports


def _failure(api, message) -> ServerEvent:
    kind = "api_error" if api == "messages" else "server_error"
    values = error_body(api, message, kind=kind)
    if api == "responses":
        values = {"type": "error", "code": kind, "message": message, "param": None}
    return ServerEvent(None if api == "chat" else "error", _text(values))


def _text(values):
    return json.dumps(values, ensure_ascii=False, separators=(",", ":"))
