"""Runs on the same samples: by how much they differ, and whether by more than chance."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from v4jax.errors import InputError
from v4jax.eval.intervals import paired
from v4jax.eval.records import Key, key_of, read_records, read_run
from v4jax.eval.summary import summarize

SAME = ("suite", "seed", "tasks", "format")  # what makes samples the same
COLUMNS = ("run", "task", "tokens", "n", "first", "this", "difference", "95 %", "p")


def read(directories: Sequence[str]) -> tuple[dict[str, list], dict[str, dict]]:
    """Records and summaries of runs by name.

    Raises:
      InputError: fewer than two, or samples that are not the same.
    """
    if len(directories) < 2:
        raise InputError(
            f"there is {len(directories)} directory to compare; expected two or more that "
            "v4jax eval has written"
        )
    names = _names(directories)
    identities = {n: read_run(d) for n, d in zip(names, directories, strict=True)}
    first, *others = names
    for name in others:
        for what in SAME:
            a, b = identities[first].get(what), identities[name].get(what)
            if a != b:
                raise InputError(
                    f"{name} has another {what} ({json.dumps(b)}) than {first} ({json.dumps(a)}), "
                    "so their samples are not the same; compare runs of one suite and seed"
                )
    runs = {n: read_records(d) for n, d in zip(names, directories, strict=True)}
    return runs, {name: summarize(identities[name], runs[name]) for name in names}


def _names(directories):
    short = [Path(each).name or str(each) for each in directories]
    names = short if len(set(short)) == len(short) else [str(each) for each in directories]
    return [f"{n} ({i})" if names.count(n) > 1 else n for i, n in enumerate(names, 1)]


def compared(runs: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[dict[str, Any]]:
    """Per run but the first, task and length, and over "all": the pairs' difference.

    Returns:
      {"run", "task", "length", "first", "this", "n", "mean", "low", "high", "p"} each.
    """
    (_, first), *others = runs.items()
    known = _scores(first)
    found = []
    for name, records in others:
        scores = _scores(records)
        both = sorted(known.keys() & scores.keys())
        groups: dict[tuple[str, int], list[Key]] = {}
        for each in both:
            groups.setdefault(each[:2], []).append(each)
        if len(groups) > 1:
            groups["all", 0] = both
        for (task, length), keys in groups.items():
            a, b = ([of[each] for each in keys] for of in (known, scores))
            means = {"first": sum(a) / len(a), "this": sum(b) / len(b)}
            found.append({"run": name, "task": task, "length": length, **means, **paired(a, b)})
    return found


def _scores(records):
    return {key_of(each): each["score"] for each in records if each.get("score") is not None}


def as_rows(found: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """The differences as a person reads them, under `COLUMNS`."""
    return [
        [
            each["run"],
            each["task"],
            f"{each['length']:,}" if each["length"] else "-",
            str(each["n"]),
            *(f"{each[name]:.3f}" for name in ("first", "this")),
            f"{each['mean']:+.3f}",
            f"{each['low']:+.3f} to {each['high']:+.3f}",
            f"{each['p']:.4f}",
        ]
        for each in found
    ]
