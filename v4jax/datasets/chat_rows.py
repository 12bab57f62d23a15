"""Conversations as ids: rendered by the package that serves them, targets where the assistant is.

deepseek-recipe writes the V4 chat format from a `Conversation`; what is a target follows from the
special tokens that it marks, so a text that spells such a token is no target.
"""

import json
import re
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import tokenizers

from v4jax.datasets import chat_tokens as special
from v4jax.datasets.conversations import Conversation, Message, Tool, draw
from v4jax.datasets.rows import Row, TextRows
from v4jax.datasets.tokenize import Tokens
from v4jax.errors import InputError
from v4jax.extras import require
from v4jax.files.tokenizer_json import of_text

VALUE = 8.0  # what a token of a value counts as a target; other words of the assistant count 1
CHARACTERS = 3.0  # of a conversation per token, about
HELD_OUT_CONVERSATIONS = 128


class Segment(NamedTuple):
    """Part of a rendered conversation: plain text, or the spelling of one special token."""

    text: str
    special: bool


class Renderer:
    """Conversations to ids and back to the package's types, with one tokenizer.

    Raises:
      InputError: deepseek-recipe is not there, or the tokenizer has no chat tokens.
    """

    def __init__(self, tokenizer: tokenizers.Tokenizer):
        require("deepseek_recipe", "chat", "rendering conversations")
        needed = (special.BOS, special.EOS, *special.MARKERS)
        missing = [name for name in needed if tokenizer.token_to_id(name) is None]
        if missing:
            raise InputError(
                f"the tokenizer lacks the chat token {missing[0]!r}; expected a tokenizer of the "
                "V4 chat format: take another checkpoint's"
            )
        self._tokenizer, self._of_text = tokenizer, of_text(tokenizer)
        # A token that is copied nowhere in training is not copied later either.
        self.words = tuple(sorted(filter(_is_word, tokenizer.get_vocab())))

    def prompt(self, conversation: Conversation, messages: int | None = None) -> list[int]:
        """Ids of the first so many messages, ready for the assistant's next."""
        segments = _rendered(conversation, conversation.messages[:messages])
        return [number for part in segments for number in self._encoded(part)[0]]

    def whole(self, conversation: Conversation) -> tuple[np.ndarray, np.ndarray]:
        """Ids of a conversation that ends with the assistant, and what each counts as a target."""
        segments = _segments(conversation)
        values = _pattern(conversation.values)
        ids, counts, speaking, begins = [], [], False, False
        before = ""
        for part in segments:
            numbers, offsets = self._encoded(part)
            ids += numbers
            if not speaking:
                counts += [0.0] * len(numbers)
                # Whether the assistant thinks is the request's choice: no target.
                speaking = begins = part.special and before == special.ASSISTANT
            else:
                counts += _counts(part.text, offsets, values, begins)
                begins = part.special and part.text == special.THINK_END
                speaking = not (part.special and part.text == special.EOS)
            before = part.text if part.special else ""
        return np.array(ids, np.int32), np.array(counts, np.float32)

    def _encoded(self, part):
        if part.special:
            return [self._tokenizer.token_to_id(part.text)], [(0, len(part.text))]
        found = self._of_text.encode(part.text, add_special_tokens=False)
        return found.ids, found.offsets


def _is_word(token):
    return len(token) > 1 and token.isascii() and token.isalpha() and token.islower()


def _counts(text, offsets, values, begins):
    """Of each token of what the assistant says: more where it is a value, or the first one."""
    spans = [] if values is None else [match.span() for match in values.finditer(text)]
    found = [
        VALUE if any(start < end_ and start_ < end for start_, end_ in spans) else 1.0
        for start, end in offsets
    ]
    if begins and found:
        found[0] = VALUE  # whether it calls, and how an answer begins
    return found


def _pattern(values):
    if not values:
        return None
    longest = sorted(values, key=len, reverse=True)
    return re.compile(r"(?<!\w)(?:" + "|".join(map(re.escape, longest)) + r")(?!\w)")


def _segments(conversation: Conversation) -> list[Segment]:
    """All of a conversation, the last message too, which the package would read as history."""
    *before, last = conversation.messages
    if conversation.tools or not conversation.thinking:  # its history keeps all that was said
        rendered = _rendered(conversation, conversation.messages)
        return rendered[:-2]  # without the begin of a further answer
    ends = Segment(special.THINK_END, True), Segment(special.EOS, True)
    said = [Segment(last.reasoning, False), ends[0], Segment(last.content, False), ends[1]]
    return _rendered(conversation, before) + [part for part in said if part.text]


def _rendered(conversation, messages):
    """The package's rendering, cut where special tokens begin and end."""
    from deepseek_recipe import DeepseekV4Encoding

    found = DeepseekV4Encoding().render_conversation(as_recipe(conversation, messages))
    segments, at = [], 0
    for start, end in found.special_ranges:
        segments.append(Segment(found.prompt[at:start], False))
        segments.append(Segment(found.prompt[start:end], True))
        at = end
    segments.append(Segment(found.prompt[at:], False))
    return [part for part in segments if part.text]


def as_recipe(conversation: Conversation, messages=None):
    """A `deepseek_recipe.Conversation`; of other messages than its own where some are given."""
    import deepseek_recipe as recipe

    given = conversation.messages if messages is None else messages
    return recipe.Conversation(
        [_message(recipe, message, number) for number, message in enumerate(given)],
        thinking_mode=conversation.thinking,
        tools=[_tool(recipe, tool) for tool in conversation.tools],
        reasoning_effort=conversation.effort,
    )


def _tool(recipe, tool: Tool):
    return recipe.ToolDefinition(tool.name, tool.description, tool.schema())


def _message(recipe, message: Message, number: int):
    """A message; a tool answers the call right before it, whose id is its place."""
    match message.role:
        case "system":
            return recipe.SystemMessage(message.content)
        case "user":
            return recipe.UserMessage(message.content)
        case "tool":
            return recipe.ToolMessage(message.content, str(number - 1))
    calls = None
    if message.call is not None:
        arguments = json.dumps(message.call.arguments)
        calls = [recipe.ToolCall(str(number), message.call.name, arguments)]
    return recipe.AssistantMessage(message.content, message.reasoning or None, calls)


class ChatRows:
    """Rows of conversations end to end, made as they are read, and in part rows of text.

    Which conversations a row has follows from seed, stage and its number alone. The last one is cut
    where the row ends.
    """

    def __init__(self, renderer: Renderer, seed: int, text: TextRows | None, share: float):
        self.renderer, self.seed, self.text, self.share = renderer, seed, text, share

    def mixed_with(self, text: TextRows) -> "ChatRows":
        """The same conversations with other texts between them."""
        return ChatRows(self.renderer, self.seed, text, self.share)

    def check(self, length: int, ahead: int) -> None:
        """Refuses what the text to mix in cannot give."""
        if self.text is not None:
            self.text.check(length, ahead)

    def row(self, number: int, stage: int, length: int, ahead: int) -> Row:
        """Row `number` of a stage: `length` tokens and the `ahead` behind them."""
        rng = np.random.default_rng([self.seed, stage, number])
        if self.text is not None and rng.random() >= self.share:
            return self.text.row(number, stage, length, ahead)
        tokens = packed(stream(self.renderer, rng, False, length), length + ahead)
        places = np.arange(length + ahead)
        documents = np.searchsorted(tokens.starts, places, side="right")
        return Row(tokens.ids, documents.astype(np.int32), tokens.counts)


def stream(
    renderer: Renderer, rng: np.random.Generator, held_out: bool, room: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Conversations without end, each of about `room` tokens at most."""
    while True:
        words = renderer.words
        yield renderer.whole(draw(rng, held_out, int(room * CHARACTERS), words=words))


def packed(conversations: Iterator[tuple[np.ndarray, np.ndarray]], size: int) -> Tokens:
    """So many tokens of conversations end to end, the last one cut."""
    ids, counts, starts, at = [], [], [], 0
    while at < size:
        more, weights = next(conversations)
        ids.append(more[: size - at])
        counts.append(weights[: size - at])
        starts.append(at)
        at += ids[-1].size
    return Tokens(np.concatenate(ids), np.array(starts, np.int64), np.concatenate(counts))


def held_out_tokens(renderer: Renderer, seed: int, room: int = 1024) -> Tokens:
    """Conversations about held-out values, for the evaluation of a run."""
    rng = np.random.default_rng([seed, 1_000_000])
    many = stream(renderer, rng, True, room)
    whole = [next(many) for _ in range(HELD_OUT_CONVERSATIONS)]
    return packed(iter(whole), sum(ids.size for ids, _ in whole))
