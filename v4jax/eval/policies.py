"""Policies of two tiers from one run's records: who does what, how much is solved, what it costs.

A share of reviewed tasks needs no run of its own. Each task has the record of its draft and of what
became of it under review; a policy takes one of the two for each, and its cost is theirs.
"""

import collections
import dataclasses
import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from v4jax.errors import InputError
from v4jax.eval.cost import SOLVED, Prices, per_task
from v4jax.eval.intervals import mean_interval

RULES = ("confidence", "hash")
SHARES = (0, 25, 50, 75, 100)
ALL = "all"
WORKER, REVIEWER = "worker alone", "reviewer alone"
Record = Mapping[str, Any]
Group = tuple[str, int]  # task and length


@dataclasses.dataclass(frozen=True)
class TierPrices:
    """What each tier costs; without any price, seconds are the cost."""

    worker: Prices = Prices()
    reviewer: Prices = Prices()

    @property
    def unit(self) -> str:
        return "price" if self != TierPrices() else "seconds"

    def of(self, record: Record) -> float:
        """What a record's steps cost."""
        tiers = record["by_role"]
        if self.unit == "seconds":
            return float(tiers["worker"]["seconds"] + tiers["reviewer"]["seconds"])
        return self.worker.of(tiers["worker"]) + self.reviewer.of(tiers["reviewer"])


def check_shares(shares: Sequence[int]) -> None:
    """Raises `InputError` for shares that are none."""
    if not shares:
        raise InputError("shares is empty; expected per cents such as 0,25,50,75,100")
    for share in shares:
        if not 0 <= share <= 100:
            raise InputError(f"a share is {share}; expected 0 to 100 per cent")


def count(share: int, tasks: int) -> int:
    """So many of the tasks are reviewed at a share in per cent; halves up."""
    return math.floor(share * tasks / 100 + 0.5)


def order(drafts: Iterable[Record], rule: str, seed: int) -> list[int]:
    """Numbers of the samples of one task and length, the first to be reviewed first.

    "confidence": what can least be checked without a model comes first, equals by hash.
    "hash": by a hash of seed, task, length and number, which nothing else decides.
    """
    keyed = sorted(
        (each["confidence"] if rule == "confidence" else 0.0, _digest(seed, each), each["sample"])
        for each in drafts
    )
    return [sample for _, _, sample in keyed]


def _digest(seed, record):
    task = record["task"].rpartition("/")[0]
    named = json.dumps(["review", seed, task, record["length"], record["sample"]])
    return hashlib.sha256(named.encode()).hexdigest()


def to_review(records: Iterable[Record], shares: Sequence[int], rule: str, seed: int) -> set:
    """Keys (task, length, number) of the samples that the largest share has reviewed."""
    found = set()
    for (task, length), courses in _groups(records).items():
        drafts = courses["draft"]
        first = order(drafts.values(), rule, seed)[: count(max(shares), len(drafts))]
        found |= {(task, length, sample) for sample in first}
    return found


def _groups(records: Iterable[Record]) -> dict[Group, dict[str, dict[int, Record]]]:
    """Task and length -> course -> number -> record."""
    groups: dict = collections.defaultdict(lambda: collections.defaultdict(dict))
    for each in records:
        task, _, course = each["task"].rpartition("/")
        groups[task, each["length"]][course][each["sample"]] = each
    return groups


def compared(
    records: Iterable[Record],
    shares: Sequence[int],
    rule: str,
    prices: TierPrices,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """A row for each task, length and policy; then the same over all tasks.

    A policy is left out where a record that it needs is missing. All policies of a group are of the
    same samples: those that have been drafted, and done alone where any has.

    Returns:
      {"task", "length", "policy", "share" (None for a tier alone), "n", "mean", "low", "high" (of
      tasks solved), "reviewed", "own" (shares of tasks), "cost_per_task" with "cost_low" and
      "cost_high" (None: infinite), "attempts_per_task", "tokens_per_solved", "worker_tokens",
      "reviewer_tokens", "cached_tokens", "seconds"}.
    """
    pooled: dict = collections.defaultdict(list)
    rows, groups = [], _groups(records)
    for (task, length), courses in sorted(groups.items()):
        for policy, chosen in _policies(courses, shares, rule, seed).items():
            pooled[policy].append(chosen)
            rows.append(_row(task, length, policy, chosen, prices, seed))
    if len(groups) > 1:
        for policy, chosen in pooled.items():
            if len(chosen) == len(groups):
                rows.append(_row(ALL, 0, policy, sum(chosen, []), prices, seed))
    return rows


def _policies(courses, shares, rule, seed):
    """(name, share) -> a record of each sample."""
    samples = set(courses["draft"])
    for course in ("worker", "reviewer"):
        if courses[course]:
            samples &= set(courses[course])
    if not samples:
        return {}
    alone = courses["worker"] or courses["draft"]
    found = {(WORKER, None): [alone[i] for i in sorted(samples)]}
    first = order((courses["draft"][i] for i in samples), rule, seed)
    for share in sorted(set(shares)):
        chosen = set(first[: count(share, len(samples))])
        if chosen <= set(courses["reviewed"]):
            found[f"{share} % reviewed", share] = [
                courses["reviewed" if i in chosen else "draft"][i] for i in sorted(samples)
            ]
    if courses["reviewer"]:
        found[REVIEWER, None] = [courses["reviewer"][i] for i in sorted(samples)]
    return found


def _row(task, length, policy, chosen, prices, seed):
    name, share = policy
    solved = [each["score"] >= SOLVED for each in chosen]
    cost = per_task(
        [prices.of(each) for each in chosen],
        solved,
        [each["attempts"] for each in chosen],
        [each["prompt_tokens"] + each["output_tokens"] for each in chosen],
        seed,
    )
    tiers = {role: [each["by_role"][role] for each in chosen] for role in ("worker", "reviewer")}
    tokens = {
        f"{role}_tokens": sum(each["prompt_tokens"] + each["output_tokens"] for each in spent)
        for role, spent in tiers.items()
    }
    kept = ("solved", "cost", "cost_per_task", "attempts_per_task", "tokens_per_solved")
    return {
        "task": task,
        "length": length,
        "policy": name,
        "share": share,
        **mean_interval([float(each) for each in solved], seed),
        "reviewed": _share(chosen, lambda each: each["task"].endswith("/reviewed")),
        "own": _share(chosen, lambda each: each["by"] == "reviewer"),
        **{name: cost[name] for name in kept},
        "cost_low": cost["low"],
        "cost_high": cost["high"],
        **tokens,
        "cached_tokens": sum(each["cached_tokens"] for each in chosen),
        "seconds": round(sum(each["seconds"] for each in chosen), 6),
    }


def _share(records, of):
    return sum(bool(of(each)) for each in records) / len(records)
