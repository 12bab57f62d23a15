"""Prompts as chats with a checkpoint in this process: no thinking, the answer's beginning given."""

import itertools
import os
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from v4jax.chat.answer import Answer as ChatAnswer
from v4jax.chat.conversation import Conversation
from v4jax.chat.errors import ChatError
from v4jax.chat.format import ChatFormat
from v4jax.datasets import chat_tokens
from v4jax.engine.request import Request
from v4jax.errors import InputError
from v4jax.eval.sample import Prompt
from v4jax.infer.tokenizer import Tokenizer

_LIMIT = 2**30  # tokens: the engine knows its own, and prompts are measured before they are cut
_SPECIALS = (chat_tokens.USER, chat_tokens.ASSISTANT, chat_tokens.THINK_END, chat_tokens.DSML)


def can_chat(tokenizer: Tokenizer) -> bool:
    """Whether a tokenizer has the special tokens that a chat is made of."""
    return all(tokenizer.special_id(name) is not None for name in _SPECIALS)


class Asked(NamedTuple):
    """A question as the engine takes it.

    Attributes:
      request: its tokens end with the beginning of the answer. answer: reads what is made.
    """

    request: Request
    answer: ChatAnswer


class Chats:
    """A checkpoint's chat format, for prompts of tasks.

    Args:
      directory: of the checkpoint. name: what the model is called.

    Raises:
      InputError: its tokenizer has no chat tokens, or the extra `chat` is not installed.
    """

    def __init__(self, directory: str | os.PathLike, name: str):
        self._format = ChatFormat(directory, name, max_length=_LIMIT)
        self._name = name
        self._count = itertools.count()

    def measure(self, prompt: Prompt) -> int:
        """Tokens of a prompt with the chat's own; of an answer alone, those of its text."""
        if prompt.messages[-1]["role"] == "assistant":
            return len(self._ids(prompt.text))
        return len(self.tokens(prompt))

    def tokens(self, prompt: Prompt) -> list[int]:
        """Ids of a prompt, up to where its answer goes on.

        Raises:
          InputError: what is no chat.
        """
        return [*self._read(prompt).tokens, *self._ids(prompt.prefix)]

    def text(self, tokens: Sequence[int]) -> str:
        """What ids spell, special tokens among them."""
        return self._format.tokenizer.decode(tokens, special_tokens=True)

    @property
    def stop_ids(self) -> frozenset[int]:
        """Ids that end an answer."""
        return self._format.stop_ids

    def ask(
        self,
        prompt: Prompt,
        max_new_tokens: int,
        stop: Sequence[str] = (),
        temperature: float = 0.0,
        seed: int = 0,
        shared: int = 0,
    ) -> Asked:
        """What is to be submitted for a prompt; arguments as of `Target.ask`.

        Raises:
          InputError: what is no chat, such as tools that cannot be.
        """
        settings: dict[str, Any] = {
            "max_tokens": max_new_tokens,
            "temperature": temperature,
            "seed": seed,
        }
        if stop:
            settings["stop"] = list(stop)
        if prompt.schema is not None:
            form = {"name": "answer", "schema": dict(prompt.schema)}
            settings["response_format"] = {"type": "json_schema", "json_schema": form}
        conversation = self._read(prompt, settings)
        tokens = [*conversation.tokens, *self._ids(prompt.prefix)]
        keep = set(conversation.keep_at) | self._shared(prompt, tokens, shared)
        request = conversation.request(keep_at=tuple(sorted(keep)))
        request = Request(**{**vars(request), "tokens": tokens})
        return Asked(request, conversation.answer(f"eval-{next(self._count)}"))

    def _read(self, prompt, settings: dict[str, Any] | None = None) -> Conversation:
        body: dict[str, Any] = {
            "model": self._name,
            "messages": [dict(each) for each in prompt.messages],
            "thinking": {"type": "disabled"},
            **(settings or {}),
        }
        if prompt.tools:
            body["tools"] = [dict(each) for each in prompt.tools]
        try:
            return self._format.read(body)
        except ChatError as error:
            raise InputError(f"a prompt is no chat: {error}") from None

    def _ids(self, text):
        """Ids of a text that stands within others."""
        encode = self._format.tokenizer.encode
        return encode(text)[len(encode("")) :] if text else []

    def _shared(self, prompt, tokens, shared) -> set[int]:
        """How many tokens a prompt of one turn has in common with others; else none."""
        if not shared or len(prompt.messages) != 1:
            return set()
        (message,) = prompt.messages
        cut = Prompt(({**message, "content": message["content"][:shared]},), tools=prompt.tools)
        both = zip(tokens, self._read(cut).tokens, strict=False)
        count = next((i for i, (a, b) in enumerate(both) if a != b), 0)
        return {count} if count else set()


def calls_of(whole: dict[str, Any]) -> list[dict[str, str]]:
    """The calls of an answer as `sample.Answer` has them."""
    message = whole["choices"][0]["message"]
    return [
        {
            "id": call["id"],
            "name": call["function"]["name"],
            "arguments": call["function"]["arguments"],
        }
        for call in message.get("tool_calls") or ()
    ]


def text_of(whole: dict[str, Any]) -> str:
    """The content of an answer."""
    return whole["choices"][0]["message"].get("content") or ""


def pushed(answer: ChatAnswer, tokens: Iterable[int]) -> bool:
    """Whether an answer has come to its end with these tokens, by a text that stops it."""
    answer.push(tuple(tokens))
    return answer.done
