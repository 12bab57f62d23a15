"""Cost per completed task: what all attempts took, divided by the tasks that were solved."""

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from v4jax.errors import InputError
from v4jax.eval.intervals import RESAMPLES
from v4jax.eval.sample import Task
from v4jax.eval.suite import Job, record_of

ATTEMPTS = 3
SOLVED = 1.0  # the score from which on a task counts as solved
_MILLION, _HOUR = 1e6, 3600.0


@dataclasses.dataclass(frozen=True)
class Prices:
    """What things cost, in any currency: of a million tokens, and of an accelerator's hour."""

    prompt: float = 0.0
    cached: float = 0.0
    output: float = 0.0
    hour: float = 0.0

    def __post_init__(self):
        for name, value in dataclasses.asdict(self).items():
            if not 0 <= value < math.inf:
                raise InputError(f"the price of {name} is {value}; expected 0 or more")

    def of(self, record: Mapping[str, Any]) -> float:
        """What a record's attempts cost."""
        cached = record["cached_tokens"]
        tokens = (record["prompt_tokens"] - cached) * self.prompt
        tokens += cached * self.cached + record["output_tokens"] * self.output
        return tokens / _MILLION + record["seconds"] * self.hour / _HOUR


def jobs(
    tasks: Sequence[Task], lengths: Sequence[int], samples: int, seed: int, attempts: int = ATTEMPTS
) -> list[Job]:
    """Samples of tasks, each tried until it is solved or so often."""
    return [
        Job(f"cost_{task.name}", length, number, _Tried(task, seed, number, length, attempts))
        for task in tasks
        for length in lengths
        for number in range(samples)
    ]


@dataclasses.dataclass(frozen=True)
class _Tried:
    task: Task
    seed: int
    number: int
    length: int
    attempts: int

    def __call__(self, target) -> dict[str, Any]:
        sample = self.task.make(self.seed, self.number, self.length, None, target.measure)
        total = dict.fromkeys(("prompt_tokens", "cached_tokens", "output_tokens", "seconds"), 0.0)
        for attempt in range(1, self.attempts + 1):
            answer = target.ask(
                sample.prompt,
                sample.budget,
                sample.stop,
                temperature=0.0 if attempt == 1 else 1.0,  # the first one again would be the same
                seed=self.number * 100 + attempt,
                shared=sample.shared,
            )
            for name in total:
                total[name] += getattr(answer, name)
            scores = self.task.score(sample, answer.text)
            if scores["score"] >= SOLVED:
                break
        counted: dict[str, Any] = {name: int(total[name]) for name in total if name != "seconds"}
        counted["seconds"] = round(total["seconds"], 6)
        solved = {"score": float(scores["score"] >= SOLVED), "attempts": attempt}
        return record_of(self.seed, sample, answer, scores) | counted | solved


def priced(records: Iterable[Mapping[str, Any]], prices: Prices, seed: int = 0) -> dict[str, Any]:
    """Cost per completed task with its 95 % bootstrap interval, beside the success rate.

    Returns:
      "cost_per_task": None where none was solved, since it is infinite then, with "low" and "high"
      (None: infinite); "success", "attempts_per_task", "tokens_per_solved" (None: infinite),
      "tasks", "solved", "cost".
    """
    records = list(records)
    return per_task(
        [prices.of(each) for each in records],
        [each["score"] >= SOLVED for each in records],
        [each.get("attempts", 1) for each in records],
        [each["prompt_tokens"] + each["output_tokens"] for each in records],
        seed,
    )


def per_task(
    costs: Sequence[float],
    solved: Sequence[bool],
    attempts: Sequence[int],
    tokens: Sequence[int],
    seed: int = 0,
) -> dict[str, Any]:
    """As `priced`, of a number for each task: cost, whether it was solved, attempts, tokens."""
    paid, count = np.array(costs, np.float64), sum(solved)
    low, high = _interval(paid, np.array(solved, np.float64), seed)
    return {
        "tasks": len(costs),
        "solved": int(count),
        "success": float(count / len(costs)) if len(costs) else None,
        "cost": float(paid.sum()),
        "cost_per_task": _ratio(paid.sum(), count),
        "low": low,
        "high": high,
        "attempts_per_task": sum(attempts) / max(len(costs), 1),
        "tokens_per_solved": _ratio(sum(tokens), count),
    }


def _interval(costs, solved, seed):
    if not len(costs):
        return None, None
    chosen = np.random.default_rng(seed).integers(0, len(costs), (RESAMPLES, len(costs)))
    count = solved[chosen].sum(1)
    ratio = np.where(count > 0, costs[chosen].sum(1) / np.maximum(count, 1), np.inf)
    # The nearest of the draws, since a mean of infinite ones says nothing.
    low, high = np.quantile(ratio, [0.025, 0.975], method="nearest")
    return (
        float(low) if math.isfinite(low) else None,
        float(high) if math.isfinite(high) else None,
    )


def _ratio(total, count):
    return float(total / count) if count else None
