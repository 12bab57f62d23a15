"""Latency under long prompts: the first token, and the time between tokens, by prompt and load."""

import concurrent.futures
import dataclasses
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from v4jax.eval.dice import Dice
from v4jax.eval.fit import TooShort
from v4jax.eval.suite import Job

CONCURRENCY = (1, 4, 16)
NEW_TOKENS = 32
STREAM_TOKENS = 192  # of the stream that another prompt interrupts
STREAM_PROMPT = 64


def jobs(seed: int, lengths: Sequence[int], concurrency: Sequence[int] = CONCURRENCY) -> list[Job]:
    """Each length at each concurrency, with a cold and a warm prefix; and a stream beside a prompt.

    A length counts prompt and answer.
    """
    found = []
    for many in concurrency:
        for length in lengths:
            for warm in (False, True):
                name = f"{'warm' if warm else 'cold'}_x{many}"
                found.append(Job(name, length, 0, _Load(seed, length, many, warm)))
    return found + [Job("while_reading", n, 0, _Beside(seed, n)) for n in lengths]


@dataclasses.dataclass(frozen=True)
class _Load:
    """So many requests at once."""

    seed: int
    length: int
    many: int
    warm: bool

    def __call__(self, target) -> dict[str, Any]:
        if self.length <= NEW_TOKENS:
            raise TooShort(f"latency: the length is {self.length}; expected {NEW_TOKENS + 1}")
        target.resize(self.many)
        target.warm_up()
        kind = "warm" if self.warm else "cold"
        prompts = [
            _prompt(target, self.length - NEW_TOKENS, "latency", self.seed, kind, self.many, i)
            for i in range(self.many)
        ]
        if self.warm:
            for prompt in prompts:
                target.ask_tokens(prompt, 1, ends=False)
        began = time.perf_counter()
        with concurrent.futures.ThreadPoolExecutor(self.many) as pool:
            answers = list(
                pool.map(lambda each: target.ask_tokens(each, NEW_TOKENS, ends=False), prompts)
            )
        seconds = time.perf_counter() - began
        between = [gap for answer in answers for gap in gaps(answer.times)]
        first = [each.first_token_seconds for each in answers if each.first_token_seconds]
        output = sum(each.output_tokens for each in answers)
        return {
            "seed": self.seed,
            "prompt_tokens": sum(each.prompt_tokens for each in answers),
            "cached_tokens": sum(each.cached_tokens for each in answers),
            "output_tokens": output,
            "seconds": seconds,
            "first_token_seconds": float(np.median(first)) if first else None,
            "tokens_per_second": output / seconds,
            "concurrency": self.many,
            "warm": self.warm,
            **quantiles("between", between),
        }


@dataclasses.dataclass(frozen=True)
class _Beside:
    """One stream, and a long prompt that is read beside it."""

    seed: int
    length: int

    def __call__(self, target) -> dict[str, Any]:
        target.resize(2)
        target.warm_up()
        short = _prompt(target, min(STREAM_PROMPT, self.length), "stream", self.seed, self.length)
        long = _prompt(target, self.length - 1, "beside", self.seed, self.length)
        more = max(1, min(STREAM_TOKENS, self.length - len(short)))
        began = time.perf_counter()
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            stream = pool.submit(target.ask_tokens, short, more, ends=False)
            time.sleep(0.1)  # the stream runs by then, or is about to
            since = time.perf_counter() - began
            read = target.ask_tokens(long, 1, ends=False)
            until = time.perf_counter() - began
            answer = stream.result()
        inside = [each for each in answer.times if since <= each[0] <= until]
        return {
            "seed": self.seed,
            "prompt_tokens": read.prompt_tokens,
            "cached_tokens": read.cached_tokens,
            "output_tokens": answer.output_tokens,
            "seconds": until,
            "first_token_seconds": read.first_token_seconds,
            "tokens_meanwhile": sum(count for _, count in inside),
            **quantiles("between", gaps(inside)),
        }


def gaps(times: Sequence[tuple[float, int]]) -> list[float]:
    """Seconds between one token and the next; tokens that come together share their time."""
    return [
        (now - then) / count
        for (then, _), (now, count) in zip(times[:-1], times[1:], strict=True)
        for _ in range(count)
    ]


def quantiles(name: str, values: Sequence[float]) -> dict[str, float | None]:
    """Median, 95 and 99 % of seconds."""
    if not len(values):
        return {f"{name}_{each}": None for each in ("median", "p95", "p99")}
    found = np.quantile(values, [0.5, 0.95, 0.99])
    return {
        f"{name}_{each}": float(value)
        for each, value in zip(("median", "p95", "p99"), found, strict=True)
    }


def _prompt(target, count, *names):
    """Random ids, so that no prompt begins as another does."""
    dice = Dice(*names)
    return [dice.below(target.vocab_size) for _ in range(max(count, 1))]
