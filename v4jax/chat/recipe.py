"""The one module that knows deepseek-recipe: requests to conversations to ids, and ids to events.

The package is DeepSeek's own (MIT, no dependencies, no network). Its minor version is pinned in the
extra `chat`, since names changed between 0.1 and 0.2. Nothing of its types leaves this module but
as opaque values, so that another version is one file's work.
"""

import json
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from v4jax.chat.errors import ChatError, refusal
from v4jax.engine.request import TokenLogprob
from v4jax.errors import InputError
from v4jax.extras import require

APIS = ("chat", "responses", "messages")
EXTRA = "chat"


class Specials(NamedTuple):
    """The spellings of the special tokens that a V4 conversation is made of."""

    bos: str
    eos: str
    user: str
    assistant: str
    thinking_start: str
    thinking_end: str
    dsml: str


class ServerEvent(NamedTuple):
    """One server-sent event: its name, None where the API names none, and its data.

    The data is a JSON text, or `[DONE]`.
    """

    event: str | None
    data: str

    def encode(self) -> bytes:
        """The message as it is sent."""
        name = "" if self.event is None else f"event: {self.event}\n"
        return f"{name}data: {self.data}\n\n".encode()


class Call(NamedTuple):
    """A tool call. arguments: the JSON text as the model or the client wrote it."""

    id: str
    name: str
    arguments: str


class Said(NamedTuple):
    """What an assistant said in one turn."""

    reasoning: str
    content: str
    calls: tuple[Call, ...]


class Turn(NamedTuple):
    """A request that the package has read.

    Attributes:
      api: which of `APIS`. converted: the package's own object.
      generator: makes the package's generator of events, from an id.
      settings: what the request says of sampling; see `read`.
      said: what the assistant said in each of its turns so far.
      continues: whether the answer goes on with the last of them.
      tools: the schema of each tool's arguments.
      required: whether the answer has to be a tool call, whose beginning the prompt has then.
      stop: texts that end the content.
      thinking: whether the answer begins with reasoning. stream: whether events are asked for.
      constraint: kind and text of what the answer has to obey, or None.
    """

    api: str
    converted: Any
    generator: Callable[[str], Any]
    settings: dict[str, Any]
    said: tuple[Said, ...]
    continues: bool
    tools: dict[str, Any]
    required: bool
    stop: tuple[str, ...]
    thinking: bool
    stream: bool
    constraint: tuple[str, str] | None


def _package():
    require("deepseek_recipe", EXTRA, "a chat")
    import deepseek_recipe

    return deepseek_recipe


def specials() -> Specials:
    """The special tokens' spellings."""
    token = _package().SpecialToken
    return Specials(
        bos=token.Bos.default_str(),
        eos=token.Eos.default_str(),
        user=token.User.default_str(),
        assistant=token.Assistant.default_str(),
        thinking_start=token.ThinkingStart.default_str(),
        thinking_end=token.ThinkingEnd.default_str(),
        dsml=token.Dsml.default_str(),
    )


class Recipe:
    """The package, with one tokenizer and one served name.

    Args:
      tokenizer_json: the text of a tokenizer.json. served_name: the model's name in requests.
    """

    def __init__(self, tokenizer_json: str, served_name: str):
        self._recipe = _package()
        self._name = served_name
        self._tokenizer = self._recipe.Tokenizer.from_str(tokenizer_json)
        self._encoding = self._recipe.DeepseekV4Encoding().with_tokenizer(self._tokenizer)
        versions = {served_name: self._recipe.ModelVersion.DeepseekV4Pro}
        self._options = self._recipe.ConversionOptions().with_model_versions_by_name(versions)

    def read(self, api: str, body: dict[str, Any]) -> Turn:
        """A request's body, whose keys `body.checked` has looked at.

        Raises:
          ChatError: what the package refuses.
        """
        kind = self._kinds[api][0]
        # As text: the package's own reader bounds depth, ranges and repeated keys.
        request = _guarded(api, kind, json.dumps(body))
        extras = {}
        if api == "responses":
            extras["with_echo"] = request.echo()
            extras["with_namespace_tool_map"] = _guarded(
                api, request.namespace_tool_map, self._options
            )
        converted = _guarded(api, request.convert, self._options)

        def generator(request_id):
            made = kind.chunk_generator(converted, request_id, self._name)
            for name, value in extras.items():
                made = getattr(made, name)(value)
            return made

        return _turn(api, converted, generator)

    def encode(self, turn: Turn) -> list[int]:
        """The ids of the conversation, up to where the answer begins."""
        return _guarded(turn.api, self._encoding.encode, turn.converted.conversation)

    def max_new_tokens(self, turn: Turn, prompt_tokens: int, max_length: int) -> int:
        """How many tokens the answer may have: what is asked for, or all that are left.

        Raises:
          ChatError: prompt and answer are more than `max_length` together.
        """
        resolve = turn.converted.resolve_max_tokens
        return _guarded(turn.api, resolve, prompt_tokens, max_length)

    def events(self, turn: Turn, request_id: str) -> "Events":
        """What makes events of the answer's tokens."""
        processor = self._recipe.StreamProcessor(
            turn.generator(request_id), turn.converted.parsing_options, self._tokenizer
        )
        response = self._kinds[turn.api][1]
        return Events(self._recipe, processor, response, request_id, self._name)

    def said(self, turn: Turn, tokens: Sequence[int], ids: Sequence[str]) -> Said:
        """What an answer's tokens say, the arguments of calls as the model wrote them.

        ids: of its calls, as the events had them.
        """
        chat, response = self._kinds["chat"]
        processor = self._recipe.StreamProcessor(
            chat.chunk_generator(turn.converted, "", self._name),
            turn.converted.parsing_options,
            self._tokenizer,
        )
        events = Events(self._recipe, processor, response, "", self._name)
        events.begin(0, 0)
        events.push(tokens, ())
        events.finish("length")
        message = events.whole()["choices"][0]["message"]
        functions = [call["function"] for call in message.get("tool_calls") or ()]
        calls = [
            Call(call_id, function["name"], function["arguments"])
            for call_id, function in zip(ids, functions, strict=False)
        ]
        return Said(
            message.get("reasoning_content") or "", message.get("content") or "", tuple(calls)
        )

    @property
    def _kinds(self):
        recipe = self._recipe
        return {
            "chat": (recipe.ChatCompletionRequest, recipe.ChatCompletionResponse),
            "responses": (recipe.ResponsesRequest, recipe.ResponsesResponse),
            "messages": (recipe.MessagesRequest, recipe.MessagesResponse),
        }


class Events:
    """The events of one answer, and the whole that they make."""

    def __init__(self, recipe, processor, response, request_id, name):
        self._recipe, self._processor, self._response = recipe, processor, response
        self._id, self._name = request_id, name
        self._whole: Any = None

    @property
    def finished(self) -> bool:
        """Whether a stop text was found, or `finish` was called."""
        return self._processor.finished

    def begin(self, prompt_tokens: int, cached_tokens: int) -> list[ServerEvent]:
        """The first events: how long the prompt is, and how much of it was not read again."""
        self._whole = self._response(
            self._id, self._name, int(time.time()), prompt_tokens, cached_tokens
        )
        usage = self._recipe.PromptUsage(
            prompt_tokens=prompt_tokens, prompt_cache_hit_tokens=cached_tokens
        )
        return self._push(self._recipe.InferenceChunk.ready(prompt_usage=usage))

    def push(self, tokens: Sequence[int], logprobs: Sequence[TokenLogprob]) -> list[ServerEvent]:
        """The events of further tokens; log-probabilities for each of them, or for none."""
        scores = [(each.logprob, list(each.top)) for each in logprobs] or None
        return self._push(self._recipe.InferenceChunk.tokens(list(tokens), scores))

    def finish(self, finish: str) -> list[ServerEvent]:
        """The last events. finish: "stop" or "length"."""
        reasons = self._recipe.InferenceFinishReason
        reason = reasons.Stop if finish == "stop" else reasons.Length
        events = []
        if not self._processor.finished:
            events = self._push(self._recipe.InferenceChunk.finish(reason))
        return events + self._taken(self._processor.finish())

    def close(self) -> None:
        """Ends an answer that did not come to its end."""
        self._processor.close()

    def whole(self) -> dict[str, Any]:
        """The answer as one object."""
        return json.loads(self._whole.to_json())

    def done(self) -> list[ServerEvent]:
        """What ends the stream of this API behind all events."""
        data = self._response.sse_done_data()
        return [] if data is None else [ServerEvent(None, data)]

    def _push(self, chunk):
        return self._taken(self._processor.push(chunk))

    def _taken(self, chunks):
        events = []
        for chunk in chunks:  # accumulating consumes a chunk
            events.append(ServerEvent(self._response.sse_event_name(chunk), chunk.to_json()))
            self._whole.accumulate(chunk)
        return events


def _turn(api, converted, generator) -> Turn:
    conversation, options = converted.conversation, converted.inference_options
    parsing, wanted = converted.parsing_options, options.output_constraint
    messages = conversation.messages
    stage = parsing.thinking_initial_stage
    return Turn(
        api=api,
        converted=converted,
        generator=generator,
        settings={
            "temperature": options.temperature,
            "top_p": options.top_p,
            "seed": options.seed,
            "logprobs": (options.top_logprobs or 0) if options.logprobs else None,
        },
        said=tuple(_said(message) for message in messages if message.role == "assistant"),
        continues=bool(messages) and messages[-1].prefix,
        tools={tool.name: tool.parameters for tool in conversation.tools},
        required=conversation.tool_choice == "required",
        stop=tuple(parsing.stop_sequences),
        thinking=stage is not None and stage.starts_in_reasoning(),
        stream=converted.stream,
        constraint=None if wanted is None else (wanted.kind, wanted.schema),
    )


def _said(message) -> Said:
    calls = tuple(Call(each.id, each.name, each.arguments) for each in message.tool_calls or ())
    return Said(message.reasoning_content or "", message.content, calls)


def _guarded(api, function, *arguments):
    """The function's value; what it refuses as a `ChatError`."""
    try:
        return function(*arguments)
    except _package().ConversionError as error:
        raise ChatError(error.status_code, json.loads(error.body)) from None
    except (InputError, ChatError):
        raise
    except ValueError as error:
        raise refusal(api, str(error)[:300]) from None
    except BaseException as error:  # a panic of the package is no Exception
        if isinstance(error, KeyboardInterrupt | SystemExit | MemoryError):
            raise
        raise refusal(api, f"the request cannot be read ({type(error).__name__})") from None
