"""What a run's records say: per task and length the mean with its interval, and what it took."""

import collections
import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from v4jax.eval.intervals import mean_interval
from v4jax.files.atomic import write_atomically
from v4jax.files.writing import writing
from v4jax.tables import table

SUMMARY = "summary.json"


def summarize(run: Mapping[str, Any], records: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """A run's summary; see docs/evaluate.md.

    Returns:
      "run": whose it is. "results": a list of {"task", "length", "n", "mean", "low", "high", ...},
      in order of task and length. "prompt_tokens", "cached_tokens", "output_tokens": of all.
    """
    groups: dict[tuple[str, int], list[Mapping[str, Any]]] = collections.defaultdict(list)
    for record in records:
        groups[record["task"], record["length"]].append(record)
    every = [record for group in groups.values() for record in group]
    return {
        "run": dict(run),
        "results": [_result(*key, groups[key]) for key in sorted(groups)],
        **{name: sum(_number(each, name) for each in every) for name in _TOTALS},
    }


_TOTALS = ("prompt_tokens", "cached_tokens", "output_tokens")


def _result(task, length, records):
    scored = [each for each in records if each.get("score") is not None]
    result = {"task": task, "length": length}
    result |= mean_interval([each["score"] for each in scored]) if scored else {"n": len(records)}
    for name in _numeric(records) - {"score", "sample", "seed", "length", "depth"}:
        values = [each[name] for each in records if _is_number(each.get(name))]
        result[f"mean_{name}"] = sum(values) / len(values)
    return result


def _numeric(records):
    names = {name for each in records for name, value in each.items() if _is_number(value)}
    return names


def _is_number(value):
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _number(record, name):
    value = record.get(name)
    return value if _is_number(value) else 0


def write_summary(directory: Path, summary: Mapping[str, Any]) -> None:
    path = directory / SUMMARY
    with writing(path):
        write_atomically(path, (json.dumps(summary, indent=1) + "\n").encode())


def as_table(summary: Mapping[str, Any]) -> str:
    """The results as a person reads them."""
    rows = [
        [
            each["task"],
            f"{each['length']:,}",
            str(each["n"]),
            *(_share(each.get(name)) for name in ("mean", "low", "high")),
            _seconds(each.get("mean_seconds")),
        ]
        for each in summary["results"]
    ]
    return table(["task", "tokens", "n", "mean", "95 % from", "to", "s each"], rows)


def _share(value):
    return "-" if value is None else f"{value:.3f}"


def _seconds(value):
    return "-" if value is None else f"{value:.2f}"
