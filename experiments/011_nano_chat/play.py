"""Plays conversations with a model: it speaks where the assistant does, tools answer as written.

What the model said becomes its history, as a client would send it. The first call that is not the
one that was to come ends a conversation, since its result is not known.
"""

import dataclasses
import json
from typing import Any

import deepseek_recipe as recipe

from v4jax.datasets.chat_rows import Renderer, as_recipe
from v4jax.datasets.conversations import Call, Conversation, Message
from v4jax.engine.engine import Engine
from v4jax.engine.request import Request

ANSWER = 160  # tokens that an answer may have: a call takes some 70, with thoughts before it 90


@dataclasses.dataclass
class Said:
    """An answer of the model at one place of a conversation.

    Attributes:
      expected: what was to come. message: what came. valid: whether a call is one of the tools,
        with the arguments of its schema (None: it called nothing). ended: by its end token.
      tokens: how many it took.
    """

    expected: Message
    message: Message
    valid: bool | None
    ended: bool
    tokens: int

    @property
    def exact(self) -> bool:
        """Whether it called what was to be called, or answered what was to be answered."""
        if not self.ended:
            return False
        if self.expected.call is not None:
            return self.valid is True and self.message.call == self.expected.call
        return self.valid is None and self.message.content == self.expected.content


@dataclasses.dataclass
class Played:
    """A conversation, and what the model said in it."""

    conversation: Conversation
    messages: list[Message]
    said: list[Said]
    over: bool = False

    @property
    def exact(self) -> bool:
        return self.over and all(one.exact for one in self.said)


class Parser:
    """Ids of an answer to a message, by the package that the server uses."""

    def __init__(self, tokenizer_path: str):
        self._tokenizer = recipe.Tokenizer.from_file(tokenizer_path)

    def read(self, conversation: Conversation, before: list[Message], ids: list[int]):
        """The message, and whether its calls are valid (None without one)."""
        of = recipe.ConversationRequest(
            as_recipe(conversation, before), recipe.ModelVersion.DeepseekV4Pro
        )
        start = recipe.ThinkingInitialStage.ReasoningStart if conversation.thinking else None
        options = recipe.ParsingOptions(
            thinking_initial_stage=start, parse_tool_calls=bool(conversation.tools)
        )
        generator = recipe.ChatCompletionRequest.chunk_generator(of, "", "")
        stream = recipe.StreamProcessor(generator, options, self._tokenizer)
        answer = recipe.ChatCompletionResponse("", "", 0, 0, 0)
        pushed = [recipe.InferenceChunk.ready()]
        pushed += [recipe.InferenceChunk.tokens(ids)] if ids else []
        pushed += [recipe.InferenceChunk.finish(recipe.InferenceFinishReason.Stop)]
        for chunk in pushed:
            for piece in stream.push(chunk):
                answer.accumulate(piece)
        for piece in stream.finish():
            answer.accumulate(piece)
        message = json.loads(answer.to_json())["choices"][0]["message"]
        return _message(conversation, message)


def _message(conversation, found):
    calls = found.get("tool_calls") or []
    call, valid = None, None
    if calls:
        call, valid = _call(conversation, calls)
    content, thought = found.get("content") or "", found.get("reasoning_content") or ""
    return Message("assistant", content, thought, call), valid


def _call(conversation, calls):
    """One call that a tool of the conversation would take."""
    function = calls[0]["function"]
    try:
        arguments: Any = json.loads(function["arguments"])
    except json.JSONDecodeError:
        return None, False
    tools = {tool.name: tool for tool in conversation.tools}
    tool = tools.get(function["name"])
    if len(calls) != 1 or tool is None or not isinstance(arguments, dict):
        return None, False
    kinds = {"string": str, "integer": int}
    fits = arguments.keys() == tool.parameters.keys() and all(
        type(value) is kinds[tool.parameters[name]] for name, value in arguments.items()
    )
    return Call(tool.name, arguments), fits


def play(
    engine: Engine,
    renderer: Renderer,
    parser: Parser,
    conversations: list[Conversation],
    eos: int,
    temperature: float = 0.0,
) -> list[Played]:
    """Plays all of them side by side, a turn of each at a time."""
    games = [Played(c, [], []) for c in conversations]
    while True:
        asked = []
        for number, game in enumerate(games):
            _listen(game)
            if game.over or (game.said and not game.said[-1].exact and game.said[-1].expected.call):
                continue
            so_far = game.conversation._replace(messages=tuple(game.messages))
            request = Request(
                renderer.prompt(so_far),
                max_new_tokens=ANSWER,
                temperature=temperature,
                seed=0,
                row=1000 * number + len(game.said),
                stop_ids=eos,
            )
            asked.append((game, engine.submit(request)))
        if not asked:
            return games
        for game, stream in asked:
            _speak(game, stream.result(), parser)


def _listen(game):
    """Takes over what others say until the assistant is to speak, or the end."""
    written = game.conversation.messages
    while len(game.messages) < len(written) and written[len(game.messages)].role != "assistant":
        game.messages.append(written[len(game.messages)])
    game.over = len(game.messages) == len(written)


def _speak(game, result, parser):
    expected = game.conversation.messages[len(game.messages)]
    message, valid = parser.read(game.conversation, game.messages, list(result.tokens))
    ended = result.finish == "stop"
    if valid is not None:
        valid = valid and ended
    game.said.append(Said(expected, message, valid, ended, len(result.tokens)))
    game.messages.append(message)
