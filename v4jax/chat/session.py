"""A conversation that one person has with a model: history, tools, and answers piece by piece."""

import json
from collections.abc import Iterator
from typing import Any, NamedTuple

from v4jax.chat.answer import Answer
from v4jax.chat.errors import ChatError
from v4jax.chat.format import ChatFormat
from v4jax.errors import InputError

REASONING, CONTENT, NOTE = "reasoning", "content", "note"


class Piece(NamedTuple):
    """A part of what comes back. kind: reasoning, content, or a note about the answer."""

    kind: str
    text: str


class Session:
    """One conversation.

    Args:
      engine: an `Engine` that runs the model; its thread runs if `ask` may be interrupted.
      chat: the model's format.
      system: what the model is told first. effort: None, or as of `reasoning_effort`; "none"
        turns the reasoning off.
      sampling: fields of the engine's request that the person has set.

    Attributes:
      messages, tools: as Chat Completions has them.
    """

    def __init__(
        self,
        engine: Any,
        chat: ChatFormat,
        system: str | None = None,
        effort: str | None = None,
        **sampling: Any,
    ):
        self._engine, self._chat, self._sampling = engine, chat, sampling
        self.system, self.effort = system, effort
        self.messages: list[dict[str, Any]] = []
        self.tools: list[dict[str, Any]] = []
        self._count = 0

    def ask(self, text: str) -> Iterator[Piece]:
        """The answer to a message. Closing the iterator ends the answer, which stays as it is.

        Raises:
          InputError: a message that does not fit, which the conversation then does not have.
        """
        if self.open_calls():  # whose results will not come
            del self.messages[-1]["tool_calls"]
        yield from self._answer([{"role": "user", "content": text}])

    def give(self, results: list[str]) -> Iterator[Piece]:
        """The answer to the results of the tools that were called, in their order."""
        calls = zip(self.open_calls(), results, strict=True)
        yield from self._answer(
            [
                {"role": "tool", "tool_call_id": call["id"], "content": result}
                for call, result in calls
            ]
        )

    def open_calls(self) -> list[dict[str, Any]]:
        """The calls that wait for their results."""
        return list(self.messages[-1].get("tool_calls") or ()) if self.messages else []

    def forget(self) -> None:
        """Begins anew, with the same tools and system prompt."""
        self.messages.clear()

    def use_tools(self, tools: Any) -> None:
        """Takes a list of tools as Chat Completions has them.

        Raises:
          InputError: what is no such list.
        """
        if not isinstance(tools, list):
            raise InputError("the tools are no JSON list; expected tools as Chat Completions has")
        before, self.tools = self.tools, tools
        try:
            self._read([{"role": "user", "content": ""}])
        except InputError:
            self.tools = before
            raise

    def saved(self) -> str:
        """The conversation as JSON, which `messages` and `tools` of a request can be taken from."""
        start = [] if self.system is None else [{"role": "system", "content": self.system}]
        values = {"messages": start + self.messages, "tools": self.tools}
        return json.dumps(values, indent=2, ensure_ascii=False) + "\n"

    def _read(self, messages):
        start = [] if self.system is None else [{"role": "system", "content": self.system}]
        body = {
            "model": self._chat.served_name,
            "messages": start + self.messages + messages,
            "stream": True,
        }
        body |= {"tools": self.tools} if self.tools else {}
        body |= {"reasoning_effort": self.effort} if self.effort else {}
        try:
            return self._chat.read(body)
        except ChatError as error:
            raise InputError(str(error)) from None

    def _answer(self, messages):
        conversation = self._read(messages)
        sampling = dict(self._sampling)
        if "max_new_tokens" in sampling:
            most = conversation.max_new_tokens
            sampling["max_new_tokens"] = min(sampling["max_new_tokens"], most)
        stream = self._engine.submit(conversation.request(**sampling))
        self._count += 1
        answer = conversation.answer(f"chatcmpl-{self._count}")
        finish = "length"  # of an answer that is closed before its end
        try:
            for event in stream:
                yield from _pieces(answer.push(event.tokens))
                if answer.done:
                    break
                if event.finish == "error":
                    raise InputError(event.error or "the answer failed")
                finish = event.finish or finish
            finish = "stop" if answer.done else finish
            yield from _pieces(answer.finish(finish))
            yield from _notes(answer, finish)
        finally:
            stream.cancel()
            self._remember(messages, answer)

    def _remember(self, messages, answer):
        """The history has the question and what was said; calls that were cut off are left out."""
        if not answer.done:
            answer.finish("length")
            cut = True
        else:
            cut = answer.finish_reason == "length"
        message = answer.whole()["choices"][0]["message"]
        if cut:
            message.pop("tool_calls", None)
        for call in message.get("tool_calls") or ():
            call.pop("index", None)
        self.messages += [*messages, message]


def _pieces(events) -> Iterator[Piece]:
    """What a person sees of the chunks."""
    for event in events:
        chunk = {} if event.data == "[DONE]" else json.loads(event.data)
        for choice in chunk.get("choices", ()):
            delta = choice["delta"]
            if delta.get("reasoning_content"):
                yield Piece(REASONING, delta["reasoning_content"])
            if delta.get("content"):
                yield Piece(CONTENT, delta["content"])


def _notes(answer: Answer, finish: str) -> Iterator[Piece]:
    """What is said of an answer once it is there."""
    message = answer.whole()["choices"][0]["message"]
    wrong = {each.id: each.message for each in answer.problems}
    for call in message.get("tool_calls") or ():
        said = f"call {call['function']['name']} {call['function']['arguments']}"
        if call["id"] in wrong:
            said += f" ({wrong[call['id']]})"
        yield Piece(NOTE, said)
    if finish == "length":
        yield Piece(NOTE, "the answer was cut off at the limit of tokens")
