"""A run as one HTML file that asks nothing of any other host, and as a PNG."""

import html
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from v4jax import extras
from v4jax.errors import InputError
from v4jax.eval import pictures
from v4jax.eval.html_page import embedded, html_table, listed, write_page
from v4jax.eval.summary import COLUMNS, as_rows, cost_of, sentences
from v4jax.files.atomic import write_atomically
from v4jax.files.writing import writing

HTML, PNG = "report.html", "report.png"
WORST = 20  # answers that are shown
_SHOWN = 300  # characters of an answer


def write(
    directory: Path, records: Sequence[Mapping[str, Any]], summary: Mapping[str, Any]
) -> str | None:
    """Writes both files; a sentence where the pictures could not be drawn."""
    image, note = picture({"run": records}, {"run": summary})
    if image is not None:
        with writing(directory / PNG):
            write_atomically(directory / PNG, image)
    run = summary["run"]
    title = f"{run.get('suite', 'evaluation')}: {run.get('model', '')}"
    parts = [
        listed(sentences(summary)),
        embedded(image, note),
        html_table(COLUMNS, as_rows(summary)),
        _costs(summary),
        _worst(records),
        html_table(("run", ""), [[name, _text(value)] for name, value in run.items()]),
    ]
    write_page(directory / HTML, title, parts)
    return note


def write_comparison(
    path: Path,
    runs: Mapping[str, Sequence[Mapping[str, Any]]],
    summaries: Mapping[str, Mapping[str, Any]],
    header: Sequence[str],
    rows: Sequence[Sequence[str]],
) -> str | None:
    """Writes the comparison of runs; a sentence where the pictures could not be drawn."""
    image, note = picture(runs, summaries)
    explained = (
        "Differences are those of a run to the first one, on the same samples. p: how often a "
        "difference as large comes about by chance (two-sided, pairs swapped at random)."
    )
    parts = [
        f"<p>{html.escape(explained)}</p>",
        html_table(header, rows),
        embedded(image, note),
        *(
            f"<h2>{html.escape(name)}</h2>{listed(sentences(each))}"
            for name, each in summaries.items()
        ),
    ]
    write_page(path, "Comparison of " + ", ".join(runs), parts)
    return note


def picture(runs, summaries) -> tuple[bytes | None, str | None]:
    """The PNG, or why there is none."""
    try:
        extras.require("matplotlib", "plot", "a report's picture")
    except InputError as error:
        return None, str(error)
    return pictures.draw(runs, summaries), None


def _costs(summary):
    rows = [
        [
            each["task"],
            f"{each['length']:,}",
            f"{each['solved']} of {each['tasks']}",
            _cost(each["cost_per_task"]),
            f"{_cost(each['low'])} to {_cost(each['high'])}",
            f"{each['attempts_per_task']:.2f}",
            _cost(each["tokens_per_solved"]),
        ]
        for each in cost_of(summary)
    ]
    header = ("task", "tokens", "solved", "cost each", "95 %", "attempts", "tokens each")
    return f"<h2>Cost per completed task</h2>{html_table(header, rows)}" if rows else ""


def _cost(value):
    return "without end" if value is None else f"{value:,.3g}"


def _worst(records):
    """Answers that were wrong, with what was expected; checks that were made."""
    wrong = [each for each in records if "answer" in each and (each.get("score") or 0) < 1]
    rows = [
        [
            f"{each['task']} {each['length'] or ''} #{each['sample']}",
            _text(each["expected"]),
            _text(each["answer"]),
        ]
        for each in sorted(wrong, key=lambda each: each.get("score") or 0)[:WORST]
    ]
    if not rows:
        return ""
    shown = html_table(("sample", "expected", "answer"), rows).replace("<td>", '<td class="text">')
    return f"<h2>Not right: {len(wrong)}, of which {len(rows)} are shown</h2>{shown}"


def _text(value):
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= _SHOWN else text[:_SHOWN] + " ..."
