"""What a caller asks of the engine, and what comes back: plain values, no arrays of a device."""

import dataclasses
import numbers
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from v4jax.config import ModelConfig
from v4jax.engine import adjust
from v4jax.errors import InputError
from v4jax.infer import sampling as sampling_lib
from v4jax.infer.arguments import read_prompt, read_stop_ids, whole_number
from v4jax.infer.sampling import Sampling

TOP_LOGPROBS = 20  # the most alternatives that one token's log-probabilities name
STOP_STRINGS = 16
FINISHES = ("stop", "length", "cancelled", "error")


@dataclasses.dataclass(frozen=True)
class Request:
    """One prompt and how to continue it.

    Attributes:
      tokens: ids of the prompt.
      max_new_tokens: at most so many are made; 0 only scores the prompt.
      temperature, top_k, top_p, min_p: as of `v4jax.generate`.
      seed: 0 to 2^32 - 1. New token n is drawn with `fold_in(fold_in(key(seed), row), n)`, on
        nothing else: not on the slot, not on other requests. None: the engine's seed, and as row
        how many requests came before.
      stop_ids: ids that end the answer; none is part of it.
      stop: texts that end the answer, wherever token borders lie; none is part of it.
      logprobs: None, or how many of the likeliest tokens to name beside each new token's own
        log-probability, 0 to 20. They are of the model's distribution, before any filter.
      prompt_logprobs: the same for the tokens of the prompt, but the first.
      constraint: what the answer has to obey, such as a `constraint.Grammar`, or None.
      priority: requests with a larger number leave the queue first.
      salt: tells tenants apart whose stored prefixes must not be shared.
      request_id: the caller's own name for it.
      row: which of the seed's draws these are; `Engine.generate` numbers its prompts by it.
      repetition, presence, frequency, bias: what is done to the logits before a token is chosen;
        see `adjust`. bias: a number by token id, or None.
      keep_at: numbers of tokens after which the prompt is worth storing, such as where its last
        user turn begins; see `PrefixCache`.
    """

    tokens: Sequence[int] | np.ndarray
    max_new_tokens: int = 64
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int | None = None
    stop_ids: Any = ()
    stop: Sequence[str] = ()
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    constraint: Any = None
    priority: int = 0
    salt: str = ""
    request_id: str | None = None
    row: int = 0
    keep_at: Sequence[int] = ()
    repetition: float | int = 1.0
    presence: float | int = 0.0
    frequency: float | int = 0.0
    bias: Mapping[int, float | int] | None = None


class TokenLogprob(NamedTuple):
    """A token's log-probability, natural, and the likeliest tokens at its place with theirs."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


class Event(NamedTuple):
    """A piece of an answer.

    Attributes:
      tokens: new ids; none is ever taken back.
      text: their text, where the engine has a tokenizer; pieces join to the text of the whole.
      logprobs: one a token, where asked for.
      finish: None, or one of `FINISHES` in the last event.
      error: with "error", one sentence.
      drafted: which of the tokens a draft proposed, by their place among them.
    """

    tokens: tuple[int, ...] = ()
    text: str = ""
    logprobs: tuple[TokenLogprob, ...] = ()
    finish: str | None = None
    error: str | None = None
    drafted: tuple[int, ...] = ()

    def joined(self, rest: "Event") -> "Event":
        """This event and the one behind it as one."""
        return Event(
            self.tokens + rest.tokens,
            self.text + rest.text,
            self.logprobs + rest.logprobs,
            rest.finish,
            rest.error,
            self.drafted + tuple(len(self.tokens) + place for place in rest.drafted),
        )


@dataclasses.dataclass
class Result:
    """The whole answer.

    Attributes:
      tokens, text, logprobs, finish, error: what the events hold together.
      prompt_logprobs: None for the first token of the prompt, then one a token; where asked for.
      prompt_tokens, cached_tokens: length of the prompt, and how much of it was not read again.
      drafted, accepted: tokens that a draft proposed, and those that the model took.
      queue_seconds, first_token_seconds, seconds: from `submit` to a slot, to the first token and
        to the end; None for what never came.
    """

    prompt_tokens: int
    tokens: list[int] = dataclasses.field(default_factory=list)
    text: str = ""
    logprobs: list[TokenLogprob] = dataclasses.field(default_factory=list)
    prompt_logprobs: list[TokenLogprob | None] | None = None
    finish: str | None = None
    error: str | None = None
    cached_tokens: int = 0
    drafted: int = 0
    accepted: int = 0
    queue_seconds: float | None = None
    first_token_seconds: float | None = None
    seconds: float | None = None


class Checked(NamedTuple):
    """A request whose values are in range, as the engine uses them."""

    tokens: np.ndarray
    max_new_tokens: int
    sampling: Sampling
    seed: int | None
    row: int
    stop_ids: frozenset[int]
    stop: tuple[str, ...]
    logprobs: int | None
    prompt_logprobs: int | None
    constraint: Any
    priority: int
    salt: str
    keep_at: tuple[int, ...]
    adjustment: adjust.Adjustment | None


def check(request: Request, config: ModelConfig, max_length: int, has_text: bool) -> Checked:
    """The request's values as plain ones.

    Args:
      max_length: tokens that a slot holds. has_text: whether the engine has a tokenizer.

    Raises:
      InputError: a value out of range, or more tokens than a slot holds.
    """
    tokens = read_prompt(0, request.tokens, config.vocab_size)
    scores = request.prompt_logprobs is not None
    new = whole_number("max_new_tokens", request.max_new_tokens, 0 if scores else 1)
    if len(tokens) + new > max_length:
        raise InputError(
            f"the prompt has {len(tokens)} tokens and max_new_tokens is {new}, {len(tokens) + new} "
            f"together; expected at most the engine's max_length, {max_length}: shorten the prompt "
            "or make the engine with a larger max_length"
        )
    seed = request.seed
    return Checked(
        tokens=tokens,
        max_new_tokens=new,
        sampling=sampling_lib.check(
            Sampling(request.temperature, request.top_k, request.top_p, request.min_p)
        ),
        seed=None if seed is None else whole_number("seed", seed, 0, 2**32 - 1),
        row=whole_number("row", request.row, 0, 2**31 - 1),
        stop_ids=read_stop_ids(request.stop_ids, config.vocab_size),
        stop=_stop_strings(request.stop, has_text),
        logprobs=_count("logprobs", request.logprobs),
        prompt_logprobs=_count("prompt_logprobs", request.prompt_logprobs),
        constraint=request.constraint,
        priority=_priority(request.priority),
        salt=_text("salt", request.salt),
        keep_at=tuple(whole_number("keep_at", n, 0) for n in request.keep_at),
        adjustment=adjust.check(
            request.repetition,
            request.presence,
            request.frequency,
            request.bias,
            config.vocab_size,
        ),
    )


def _count(name, value):
    return None if value is None else whole_number(name, value, 0, TOP_LOGPROBS)


def _priority(value):
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise InputError(f"priority is {value!r}; expected a whole number")
    return int(value)


def _text(name, value):
    if not isinstance(value, str):
        raise InputError(f"{name} has type {type(value).__name__}; expected text")
    return value


def _stop_strings(stop, has_text):
    stops = (stop,) if isinstance(stop, str) else tuple(stop)
    if len(stops) > STOP_STRINGS:
        raise InputError(f"stop has {len(stops)} texts; expected at most {STOP_STRINGS}")
    for text in stops:
        if not _text("a stop text", text):
            raise InputError("a stop text is empty; expected at least one character")
    if stops and not has_text:
        raise InputError(
            "stop has texts and the engine no tokenizer; make it with Engine(..., tokenizer=...), "
            "or give ids in stop_ids"
        )
    return stops
