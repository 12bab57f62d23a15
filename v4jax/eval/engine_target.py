"""A checkpoint in this process as what is evaluated: its engine, tokenizer and prefix cache."""

import dataclasses
import hashlib
import importlib.util
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from v4jax.checkpoints.load import load, locate
from v4jax.checkpoints.source import read_announced
from v4jax.engine.constraint import Grammar
from v4jax.engine.engine import Engine
from v4jax.engine.prefix_cache import PrefixCache
from v4jax.engine.request import Request
from v4jax.errors import InputError
from v4jax.eval.in_chat import Asked, Chats, calls_of, can_chat, pushed, text_of
from v4jax.eval.sample import Answer, Prompt
from v4jax.infer.generation_config import end_ids
from v4jax.infer.tokenizer import Tokenizer

# Tokens of a chunk. Each is read in this width, so behind a stored prefix a CPU reads less for
# nothing with a small one; an accelerator needs a large one to be busy.
CPU_CHUNK, CHUNK = 512, 2048
_MEMORY = ("RESOURCE_EXHAUSTED", "Out of memory", "MemoryError")
# What its own training taught a packaged checkpoint to answer; see `sample.STYLES`.
STYLES = {"nano": "facts"}


class EngineTarget:
    """A checkpoint whose engine is made when the first question comes.

    Args:
      checkpoint: directory or name. max_length: tokens of the longest prompt with its answer.
      slots: questions that are answered together. style: see `STYLES`; None: what the model can,
        which is a chat where its tokenizer has the tokens for one.
      prefix_cache: whether prefixes that prompts share are read once.
      max_positions: that the model is to read, beyond what its config.json allows; None: no more.
      options: further ones of `Engine`, or of `v4jax.load`: dtype, numerics.

    Raises:
      InputError: no such checkpoint, no tokenizer, or a length beyond the model's.
    """

    def __init__(
        self,
        checkpoint: str,
        max_length: int,
        slots: int = 1,
        style: str | None = None,
        prefix_cache: bool = True,
        max_positions: int | None = None,
        dtype: str | None = None,
        numerics: str | None = None,
        draft: str | None = "auto",
        programs: str | None = None,
    ):
        directory = Path(locate(checkpoint))
        self.name = checkpoint if checkpoint in STYLES else directory.name
        self._checkpoint, self._slots, self._cached = checkpoint, slots, prefix_cache
        self._tokenizer = Tokenizer(directory)
        config = read_announced(directory).config
        most = max_positions or config.max_position_embeddings
        self.max_length: int | None = most
        if max_length > most:
            raise InputError(
                f"the longest prompt with its answer has {max_length} tokens, and {checkpoint} "
                f"reads at most {most}: give shorter --lengths, or --max_positions to "
                "try what it was not made for"
            )
        self._length = max_length
        usual = "chat" if can_chat(self._tokenizer) else "plain"
        self.style = style or STYLES.get(self.name, usual)
        self.chats = Chats(directory, self.name) if self.style == "chat" else None
        self._stop_ids = end_ids(directory, config)
        self._load: dict[str, Any] = {"dtype": dtype, "numerics": numerics}
        self._options: dict[str, Any] = {"draft": draft, "programs": programs}
        self.identity = {
            "model": self.name,
            "where": "engine",
            "style": self.style,
            "numerics": numerics or "default",
            "dtype": dtype or "default",
            "weights": _weights(directory),
            "max_positions": max_positions,
        }
        self._engine: Engine | None = None
        self._loaded: tuple | None = None

    def measure(self, prompt: Prompt) -> int:
        """Tokens of a prompt as the model reads it."""
        if self.chats is not None and not prompt.continues:
            return self.chats.measure(prompt)
        return len(self._tokenizer.encode(prompt.text))

    def ask(self, prompt, max_new_tokens, stop=(), temperature=0.0, seed=0, shared=0) -> Answer:
        """The model's answer in a chat, or its continuation of the prompt's text.

        Raises:
          InputError: a prompt that is too long, or no memory for it.
        """
        if self.chats is not None and not prompt.continues:
            asked = self.chats.ask(prompt, max_new_tokens, stop, temperature, seed, shared)
            return self._chatted(asked)
        if prompt.tools:
            raise InputError(
                f"the suite gives tools, and {self.name} is asked in style {self.style}; expected "
                "--style chat, and a checkpoint that can chat"
            )
        text = prompt.text
        tokens = self._tokenizer.encode(text)
        keep = (len(self._tokenizer.encode(text[:shared])),) if shared else ()
        form = self._form(prompt.schema)
        return self.ask_tokens(tokens, max_new_tokens, stop, temperature, seed, keep, form=form)

    def _form(self, schema):
        """The constraint of a schema; None without one, and without the extra `grammar`."""
        known = schema is not None and importlib.util.find_spec("llguidance") is not None
        return Grammar("json_schema", schema) if known else None

    def ask_tokens(
        self,
        tokens,
        max_new_tokens,
        stop=(),
        temperature=0.0,
        seed=0,
        keep=(),
        ends=True,
        salt="",
        form=None,
    ) -> Answer:
        """As `ask`, of ids.

        Args:
          ends: whether the model's own end token ends the answer. form: a `Grammar` for it.
        """
        request = Request(
            tokens,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            seed=seed,
            stop=stop,
            stop_ids=self._stop_ids if ends else (),
            keep_at=keep,
            salt=salt,
            constraint=form,
        )
        return self._answered(request)

    def likeliest(self, tokens: Sequence[int]) -> list[bool]:
        """Whether each token but the first is the likeliest behind those before it."""
        request = Request(tokens, max_new_tokens=0, prompt_logprobs=1)
        try:
            result = self.engine.submit(request).result()
        except (MemoryError, RuntimeError) as error:
            raise self._no_memory(str(error), error) from error
        if result.error is not None:
            raise self._no_memory(result.error)
        places = (result.prompt_logprobs or [])[1:]
        return [each is not None and each.token == each.top[0][0] for each in places]

    def _chatted(self, asked: Asked) -> Answer:
        """A turn of a chat: its content, its calls."""
        chat = asked.answer
        found = self._answered(asked.request, lambda tokens: pushed(chat, tokens))
        chat.finish("length" if found.finish == "length" else "stop")
        whole = chat.whole()
        return dataclasses.replace(
            found,
            text=text_of(whole),
            calls=calls_of(whole),
            output_tokens=chat.output_tokens,
            finish=chat.finish_reason,
        )

    def _answered(self, request, until=lambda tokens: False) -> Answer:
        try:
            stream = self.engine.submit(request)
            times, result = _timed(stream, until)
        except (MemoryError, RuntimeError) as error:
            raise self._no_memory(str(error), error) from error
        if result.error is not None:
            raise self._no_memory(result.error)
        return Answer(
            text=result.text,
            prompt_tokens=result.prompt_tokens,
            cached_tokens=result.cached_tokens,
            output_tokens=len(result.tokens),
            seconds=result.seconds,
            first_token_seconds=result.first_token_seconds,
            times=times,
            finish=result.finish,
        )

    @property
    def engine(self) -> Engine:
        """The engine; loads the model when it is first asked for."""
        if self._engine is None:
            self._engine = Engine(
                *self.loaded,
                slots=self._slots,
                max_length=self._length,
                prefill_chunk=min(_chunk(), -(-self._length // 128) * 128),
                exact=True,  # so that records do not depend on what was read before
                prefix_cache=PrefixCache() if self._cached else None,
                tokenizer=self._tokenizer,
                **self._options,
            )
            self._engine.start()
        return self._engine

    @property
    def loaded(self) -> tuple[Any, Any]:
        """The model and its parameters."""
        if self._loaded is None:
            model, params = load(self._checkpoint, **self._load)
            config = dataclasses.replace(model.config, max_position_embeddings=self.max_length)
            self._loaded = model.clone(config=config), params
        return self._loaded

    def encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text)

    def decode(self, ids) -> str:
        return self._tokenizer.decode(ids)

    @property
    def vocab_size(self) -> int:
        return self._tokenizer.vocab_size

    def resize(self, slots: int) -> None:
        """Has so many questions answered together from now on, by another engine if need be."""
        if slots != self._slots:
            self.close()
            self._engine, self._slots = None, slots

    def warm_up(self) -> float:
        """Compiles all programs; the seconds that it took."""
        return self.engine.warm_up()

    def close(self) -> None:
        if self._engine is not None:
            self._engine.close()

    def _no_memory(self, said, error=None):
        if isinstance(error, MemoryError) or any(word in said for word in _MEMORY):
            return InputError(
                f"no memory was left for prompts of {self._length} tokens, {self._slots} at a "
                "time; the records are kept: run again with shorter --lengths or less "
                "--concurrency"
            )
        return InputError(f"the engine failed ({said[:300]}); the records are kept: run again")


def _chunk():
    return CPU_CHUNK if jax.default_backend() == "cpu" else CHUNK


def _timed(stream, until):
    """(seconds, tokens) of each event since now, and the result; cancelled where `until` holds."""
    began, times = time.perf_counter(), []
    for event in stream:
        if event.tokens:
            times.append((time.perf_counter() - began, len(event.tokens)))
        if until(event.tokens):
            stream.cancel()
            break
    return times, stream.result()


def _weights(directory) -> Any:
    """What tells one checkpoint from another of the same name: its files' names and sizes."""
    files = sorted(
        (path.name, path.stat().st_size) for path in directory.glob("*") if path.is_file()
    )
    return hashlib.sha256(json.dumps(files).encode()).hexdigest()[:16]
