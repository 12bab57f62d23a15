"""What a run's records say: per task and length the mean with its interval, and what it took."""

import collections
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from v4jax.eval.cost import Prices, priced
from v4jax.eval.intervals import mean_interval, pass_hat
from v4jax.files.atomic import write_atomically
from v4jax.files.writing import writing
from v4jax.tables import table

SUMMARY = "summary.json"
_TOTALS = ("prompt_tokens", "cached_tokens", "output_tokens", "seconds")
_NOT_AVERAGED = {"score", "sample", "seed", "length", "depth", "item", "trial", "place", "calls"}
_NOT_AVERAGED |= {"mod_4", "mod_128", "concurrency", "away"}
Record = Mapping[str, Any]


def summarize(run: Record, records: Iterable[Record], prices: Prices | None = None) -> dict:
    """A run's summary; see docs/evaluate.md.

    Returns:
      "run": whose it is. "results": a list of {"task", "length", "n", "mean", "low", "high", ...},
      in order of task and length; of tools also "pass_k", of costs "cost". "prompt_tokens",
      "cached_tokens", "output_tokens", "seconds": of all.
    """
    groups: dict[tuple[str, int], list[Record]] = collections.defaultdict(list)
    for record in records:
        groups[record["task"], record["length"]].append(record)
    every = [record for group in groups.values() for record in group]
    return {
        "run": dict(run),
        "results": [
            _result(*key, groups[key], prices or Prices()) for key in sorted(groups, key=_order)
        ],
        **{name: sum(_number(each, name) for each in every) for name in _TOTALS},
    }


def _order(key):
    """By task, where chain_3 comes before chain_10, and length."""
    task, length = key
    head, _, number = task.rpartition("_")
    return (head, int(number), length) if number.isdigit() else (task, 0, length)


def _result(task, length, records, prices):
    of = scored(records)
    result = {"task": task, "length": length}
    result |= mean_interval([each["score"] for each in of]) if of else {"n": len(records)}
    names = {name for each in records for name, value in each.items() if _is_number(value)}
    for name in sorted(names - _NOT_AVERAGED):
        values = [each[name] for each in records if _is_number(each.get(name))]
        result[f"mean_{name}"] = sum(values) / len(values)
    if any("trial" in each for each in of):
        result["pass_k"] = pass_k(of)
    if any("attempts" in each for each in of):
        result["cost"] = priced(of, prices)
    return result


def scored(records: Iterable[Record]) -> list[Record]:
    return [each for each in records if each.get("score") is not None]


def pass_k(records: Sequence[Record]) -> dict[str, dict[str, Any]]:
    """pass^k for each k up to the trials of an item: the mean over items, with its interval."""
    items: dict[int, list[float]] = collections.defaultdict(list)
    for each in records:
        items[each["item"]].append(each["score"])
    most = max(len(trials) for trials in items.values())
    found = {}
    for k in range(1, most + 1):
        values = [pass_hat(sum(s >= 1 for s in t), len(t), k) for t in items.values()]
        found[str(k)] = mean_interval([value for value in values if value is not None])
    return found


def cost_of(summary: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The costs in a summary, each with its task and length."""
    return [
        {"task": each["task"], "length": each["length"], **each["cost"]}
        for each in summary["results"]
        if "cost" in each
    ]


def _is_number(value):
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _number(record, name):
    value = record.get(name)
    return value if _is_number(value) else 0


def write_summary(directory: Path, summary: Mapping[str, Any]) -> None:
    path = directory / SUMMARY
    with writing(path):
        write_atomically(path, (json.dumps(summary, indent=1) + "\n").encode())


COLUMNS = ("task", "tokens", "n", "mean", "95 % from", "to", "s each")


def as_rows(summary: Mapping[str, Any]) -> list[list[str]]:
    """The results as a person reads them, under `COLUMNS`."""
    return [
        [
            each["task"],
            f"{each['length']:,}" if each["length"] else "-",
            str(each["n"]),
            *(_share(each.get(name)) for name in ("mean", "low", "high")),
            _seconds(each.get("mean_seconds")),
        ]
        for each in summary["results"]
    ]


def as_table(summary: Mapping[str, Any]) -> str:
    return table(COLUMNS, as_rows(summary))


def sentences(summary: Mapping[str, Any]) -> list[str]:
    """What a reader wants to know first, a line for each kind of test that was run."""
    results = summary["results"]
    kinds = (_long_context, _tools, _costs, _latency, _controls)
    said = [sentence for kind in kinds for sentence in kind(results)]
    total, cached = summary["prompt_tokens"], summary["cached_tokens"]
    if total:
        said.append(
            f"Prefix cache: {cached:,} of {total:,} prompt tokens ({cached / total:.0%}) were "
            "not read again."
        )
    return said


def _long_context(results):
    questions = [
        each for each in results if each["length"] and "mean" in each and "cost" not in each
    ]
    if not questions:
        return
    longest = max(each["length"] for each in questions)
    at = [each["mean"] for each in questions if each["length"] == longest]
    below = [each["length"] for each in questions if each["mean"] < 0.95]
    held = [n for n in {each["length"] for each in questions} if not below or n < min(below)]
    good = f"every task is at 95 % or more up to {max(held):,}" if held else "no length is at 95 %"
    yield f"Long context: {np.mean(at):.1%} on average at {longest:,} tokens; {good}."


def _tools(results):
    chains = [each for each in results if each["task"].startswith("chain_")]
    if chains:
        chains.sort(key=lambda each: int(each["task"].split("_")[1]))
        told = ", ".join(
            f"{each['task'].split('_')[1]} calls {each['mean']:.0%}" for each in chains
        )
        yield f"Tool calls: whole chains right: {told}."


def _costs(results):
    costs = [each["cost"] for each in results if "cost" in each]
    if costs:
        solved, tasks = sum(c["solved"] for c in costs), sum(c["tasks"] for c in costs)
        cost = sum(c["cost"] for c in costs)
        per = f"{cost / solved:.3g} each" if solved else "at a cost without end"
        yield f"Cost: {solved} of {tasks} tasks solved, {per}."


def _latency(results):
    alone = [each for each in results if each["task"] == "cold_x1"]
    if alone:
        longest = max(alone, key=lambda each: each["length"])
        between = longest.get("mean_between_median")
        more = f", then {1e3 * between:.1f} ms a token" if between else ""
        yield (
            f"Latency: the first token of {longest['length']:,} comes after "
            f"{longest['mean_first_token_seconds']:.2f} s{more}."
        )


def _controls(results):
    heads = ("access_", "logging_", "retention_", "errors_", "tenants_", "deletion_")
    checks = [each for each in results if each["task"].startswith(heads)]
    if checks:
        passed = [each for each in checks if each.get("mean") == 1]
        failed = [each["task"] for each in checks if each.get("mean") == 0]
        unchecked = len(checks) - len(passed) - len(failed)
        said = f"; failed: {', '.join(failed)}" if failed else ""
        yield (
            f"Data controls: {len(passed)} of {len(checks)} checks passed, {unchecked} were not "
            f"made{said}."
        )


def _share(value):
    return "-" if value is None else f"{value:.3f}"


def _seconds(value):
    return "-" if value is None else f"{value:.2f}"
