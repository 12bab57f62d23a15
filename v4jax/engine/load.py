"""A described load on an engine, and how it was served."""

import dataclasses
import math
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from v4jax.engine.engine import Engine
from v4jax.engine.request import Request
from v4jax.engine.stream import Stream
from v4jax.errors import InputError


@dataclasses.dataclass(frozen=True)
class Load:
    """Requests of random tokens.

    Attributes:
      requests: how many. concurrency: how many are under way at any time; 0 goes by the rate.
      rate: arrivals a second, at random times (Poisson).
      prompt_tokens, new_tokens: lengths of every prompt and answer.
      shared: share of every prompt that is the same in all, 0 to 1.
      temperature, seed: of the answers; of prompts and arrivals too.
    """

    requests: int = 64
    concurrency: int = 8
    rate: float = 0.0
    prompt_tokens: int = 512
    new_tokens: int = 128
    shared: float = 0.0
    temperature: float = 0.0
    seed: int = 0

    def __post_init__(self):
        for name in ("requests", "prompt_tokens", "new_tokens"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}; expected 1 or more")
        for name in ("concurrency", "rate"):
            if not 0 <= getattr(self, name) < math.inf:
                raise InputError(f"{name} is {getattr(self, name)}; expected 0 or more")
        if not 0 <= self.shared <= 1:
            raise InputError(f"shared is {self.shared}; expected a share, 0 to 1")
        if (self.concurrency > 0) == (self.rate > 0):
            raise InputError(
                f"concurrency is {self.concurrency} and rate {self.rate}; expected one of them to "
                "be positive: so many requests at a time, or so many arrivals a second"
            )

    def prompts(self, vocab_size: int) -> list[list[int]]:
        """The prompts' token ids."""
        rng = np.random.default_rng(self.seed)
        same = round(self.shared * self.prompt_tokens)
        head = rng.integers(0, vocab_size, same)
        return [
            [*head.tolist(), *rng.integers(0, vocab_size, self.prompt_tokens - same).tolist()]
            for _ in range(self.requests)
        ]

    def arrivals(self) -> np.ndarray:
        """Seconds from the start at which each request comes; all zeros by concurrency."""
        if not self.rate:
            return np.zeros(self.requests)
        gaps = np.random.default_rng([self.seed, 1]).exponential(1 / self.rate, self.requests)
        return np.cumsum(gaps)


@dataclasses.dataclass
class _Watched:
    """One request's times: when it came, and each of its events with its number of tokens."""

    stream: Stream
    came: float
    events: list[tuple[float, int]] = dataclasses.field(default_factory=list)


def run(engine: Engine, load: Load, progress: Callable[[int], None] = lambda count: None) -> dict:
    """Serves the load and measures it.

    Args:
      progress: called with how many requests have ended, as they do.

    Returns:
      "tokens_per_second" of all answers; seconds as {"median", "p95", "p99"}: "first_token" from a
      request's arrival, "between_tokens" of one answer (a round of drafts brings several, which
      share its time); "acceptance" of drafts; "cached_tokens", of "prompt_tokens"; "seconds".
    """
    waiting = list(zip(load.prompts(engine.vocab_size), load.arrivals(), strict=True))
    before, began = engine.stats(), time.perf_counter()
    watched: list[_Watched] = []
    open_ = 0
    while waiting or open_:
        now = time.perf_counter() - began
        while waiting and _due(waiting[0][1], now, open_, load):
            prompt, came = waiting.pop(0)
            request = Request(
                prompt,
                max_new_tokens=load.new_tokens,
                temperature=load.temperature,
                seed=load.seed,
                row=len(watched),
            )
            came = came if load.rate else now
            watched.append(_Watched(engine.submit(request), came))
            open_ += 1
        if not engine.step() and not open_ and waiting:
            time.sleep(min(0.001, waiting[0][1]))
        ended = open_ - _watch(watched, began)
        open_ -= ended
        if ended:
            progress(ended)
    seconds = time.perf_counter() - began
    return _measured(watched, seconds, before, engine.stats(), load)


def _due(came, now, open_, load):
    return came <= now if load.rate else open_ < load.concurrency


def _watch(watched, began):
    """Notes the events that have come; how many requests are under way."""
    now, open_ = time.perf_counter() - began, 0
    for each in watched:
        for event in each.stream.ready():
            if event.tokens:
                each.events.append((now, len(event.tokens)))
            if event.error is not None:
                raise InputError(event.error)
        open_ += not each.stream.finished
    return open_


def _measured(watched, seconds, before, after, load) -> dict[str, Any]:
    def more(name):
        return after[name] - before[name]

    first = [each.events[0][0] - each.came for each in watched]
    between = [
        (now - then) / count
        for each in watched
        for (then, _), (now, count) in zip(each.events[:-1], each.events[1:], strict=True)
        for _ in range(count)
    ]
    drafted = more("drafted")
    return {
        "load": dataclasses.asdict(load),
        "seconds": seconds,
        "output_tokens": more("output_tokens"),
        "tokens_per_second": more("output_tokens") / seconds,
        "first_token": _quantiles(first),
        "between_tokens": _quantiles(between),
        "rounds": more("rounds"),
        "acceptance": more("accepted") / drafted if drafted else None,
        "prompt_tokens": load.requests * load.prompt_tokens,
        "cached_tokens": more("cached_tokens"),
        "compilations": more("compilations"),
        "times": {"first_token": first, "between_tokens": between},
    }


def _quantiles(values):
    if not values:
        return None
    median, p95, p99 = np.quantile(values, [0.5, 0.95, 0.99])
    return {"median": float(median), "p95": float(p95), "p99": float(p99)}
