"""A run of two tiers as a summary, a table, sentences, one HTML file and a PNG."""

import collections
import io
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from v4jax import extras
from v4jax.errors import InputError
from v4jax.eval import policies
from v4jax.eval.html_page import embedded, html_table, listed, write_page
from v4jax.eval.policies import REVIEWER, WORKER, TierPrices
from v4jax.eval.report import HTML, PNG
from v4jax.eval.summary import write_summary
from v4jax.files.atomic import write_atomically
from v4jax.files.writing import writing
from v4jax.tables import table

COLUMNS = (
    *("task", "tokens", "policy", "n", "solved", "95 % from", "to", "reviewed", "by reviewer"),
    *("attempts", "cost each", "from", "to", "tokens each"),
)
_QUOTES = ("said", "exact", "invented", "refused")
Summary = Mapping[str, Any]


def summarize(
    run: Mapping[str, Any],
    records: Sequence[Mapping[str, Any]],
    lines: Iterable[Mapping[str, Any]],
    shares: Sequence[int],
    rule: str,
    prices: TierPrices,
) -> dict[str, Any]:
    """The summary; see docs/tiers.md.

    Args:
      lines: of the ledger.
    """
    verdicts: collections.Counter = collections.Counter()
    quotes: collections.Counter = collections.Counter()
    steps = errors = 0
    for line in lines:
        steps, errors = steps + 1, errors + ("error" in line)
        if line["verdict"]:
            verdicts[f"{line['role']}: {line['verdict']}"] += 1
        counts = line.get("quotes") or {}
        quotes.update({name: counts.get(name, 0) for name in _QUOTES})
        quotes["kept"] += len(counts.get("kept", ()))
    return {
        "run": dict(run),
        "rule": rule,
        "cost_in": prices.unit,
        "policies": policies.compared(records, shares, rule, prices, run["seed"]),
        "steps": steps,
        "errors": errors,
        "verdicts": dict(sorted(verdicts.items())),
        "quotes": dict(sorted(quotes.items())),
    }


def as_rows(summary: Summary) -> list[list[str]]:
    """The policies as a person reads them, under `COLUMNS`."""
    return [
        [
            each["task"],
            f"{each['length']:,}" if each["length"] else "-",
            each["policy"],
            str(each["n"]),
            *(f"{each[name]:.1%}" for name in ("mean", "low", "high", "reviewed", "own")),
            f"{each['attempts_per_task']:.2f}",
            *(_cost(each[name]) for name in ("cost_per_task", "cost_low", "cost_high")),
            _tokens(each["tokens_per_solved"]),
        ]
        for each in summary["policies"]
    ]


def as_table(summary: Summary) -> str:
    return table(COLUMNS, as_rows(summary), left=3)


def sentences(summary: Summary) -> list[str]:
    """What a reader wants to know first."""
    said = []
    for (task, length), rows in _by_group(summary).items():
        best, cheap = _best(rows), _cheapest(rows)
        where = f"{task}{f' at {length:,} tokens' if length else ''}"
        if cheap is None:
            said.append(f"{where}: no policy solved any of {rows[0]['n']} tasks.")
            continue
        said.append(
            f"{where}: most were solved by {best['policy']} ({best['mean']:.1%}, "
            f"{_cost(best['cost_per_task'])} each); a completed task costs least with "
            f"{cheap['policy']} ({_cost(cheap['cost_per_task'])}, {cheap['mean']:.1%} solved)."
        )
    quotes = summary["quotes"]
    if quotes.get("said"):
        said.append(
            f"Quotes: {quotes['kept']:,} of {quotes['said']:,} were in the text, "
            f"{quotes['exact']:,} where they were said to be; {quotes['invented']:,} were invented."
        )
    if summary["errors"]:
        said.append(f"{summary['errors']} of {summary['steps']} steps raised an error.")
    return said


def write(directory: Path, summary: Summary) -> str | None:
    """Writes the summary, the HTML file and the PNG; a sentence where there is no picture."""
    write_summary(directory, summary)
    image, note = picture(summary)
    if image is not None:
        with writing(directory / PNG):
            write_atomically(directory / PNG, image)
    counts = {**summary["verdicts"], **{f"quotes {k}": v for k, v in summary["quotes"].items()}}
    rule = {
        "confidence": "Drafts with the lowest confidence are reviewed first.",
        "hash": "Which drafts are reviewed is decided by a hash.",
    }[summary["rule"]]
    parts = [
        listed(sentences(summary)),
        embedded(image, note),
        html_table(COLUMNS, as_rows(summary)),
        listed([rule, f"Costs are in {_unit(summary)}; 95 % intervals by bootstrap over tasks."]),
        html_table(("steps", ""), [[name, str(n)] for name, n in counts.items()]),
        html_table(("run", ""), [[k, str(v)[:300]] for k, v in summary["run"].items()]),
    ]
    write_page(directory / HTML, "Two tiers: " + _names(summary["run"]), parts)
    return note


def picture(summary: Summary) -> tuple[bytes | None, str | None]:
    """The PNG, or why there is none."""
    try:
        extras.require("matplotlib", "plot", "a report's picture")
    except InputError as error:
        return None, str(error)
    groups = _by_group(summary)
    return (draw(groups, _unit(summary)), None) if groups else (None, None)


def draw(groups: Mapping[tuple[str, int], Sequence[Mapping[str, Any]]], unit: str) -> bytes:
    """Cost per completed task against tasks solved, a panel for each task and length."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    columns = min(2, len(groups))
    lines = -(-len(groups) // columns)
    figure, axes = plt.subplots(
        lines, columns, figsize=(7 * columns, 4.5 * lines), layout="constrained", squeeze=False
    )
    for ((task, length), rows), axis in zip(groups.items(), axes.flat, strict=False):
        _panel(axis, rows)
        at = f", {length:,} tokens" if length else ""
        axis.set(title=f"{task}{at}", xlabel="tasks solved, %", ylabel=f"cost each, {unit}")
    for axis in axes.flat[len(groups) :]:
        axis.set_visible(False)
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=100)
    plt.close(figure)
    return content.getvalue()


def _panel(axis, rows):
    """Shares joined by a line, each tier alone as a mark; what solved nothing has no cost."""
    priced = [row for row in rows if row["cost_per_task"] is not None]
    shares = [row for row in priced if row["share"] is not None]
    _points(axis, shares, "o-", "C0", "worker, so many drafts reviewed")
    for row in shares:
        axis.annotate(
            f"{row['share']} %",
            (100 * row["mean"], row["cost_per_task"]),
            textcoords="offset points",
            xytext=(5, 5),
            fontsize=7,
        )
    for policy, mark, colour in ((WORKER, "s", "C1"), (REVIEWER, "^", "C2")):
        _points(axis, [row for row in priced if row["policy"] == policy], mark, colour, policy)
    for row in rows:
        if row["cost_per_task"] is None:
            axis.plot([], [], " ", label=f"{row['policy']}: none solved")
    axis.set_xlim(-4, 110)
    axis.set_ylim(bottom=0)
    axis.grid(alpha=0.3)
    if rows:
        axis.legend(fontsize=7)


def _points(axis, rows, style, colour, label):
    """Policies with both 95 % intervals; of a cost without an upper end only the lower one."""
    if not rows:
        return
    x, y, bars = [], [], []
    for row in rows:
        solved, cost = 100 * row["mean"], row["cost_per_task"]
        ends = [cost if row[name] is None else row[name] for name in ("cost_low", "cost_high")]
        x, y = [*x, solved], [*y, cost]
        bars.append(
            [solved - 100 * row["low"], 100 * row["high"] - solved, cost - ends[0], ends[1] - cost]
        )
    left, right, down, up = ([max(each, 0) for each in side] for side in zip(*bars, strict=True))
    axis.errorbar(
        x,
        y,
        xerr=[left, right],
        yerr=[down, up],
        fmt=style,
        color=colour,
        elinewidth=0.7,
        capsize=2,
        label=label,
    )


def _by_group(summary):
    groups: dict = collections.defaultdict(list)
    for row in summary["policies"]:
        groups[row["task"], row["length"]].append(row)
    return groups


def _best(rows):
    """Most solved; of equals the cheapest."""
    return min(rows, key=lambda row: (-row["mean"], _or_infinite(row["cost_per_task"])))


def _cheapest(rows):
    priced = [row for row in rows if row["cost_per_task"] is not None]
    return min(priced, key=lambda row: (row["cost_per_task"], -row["mean"]), default=None)


def _or_infinite(cost):
    return float("inf") if cost is None else cost


def _unit(summary):
    return "seconds" if summary["cost_in"] == "seconds" else "the unit of the prices"


def _names(run):
    return f"{run['worker'].get('model', '')} and {run['reviewer'].get('model', '')}"


def _cost(value):
    return "without end" if value is None else f"{value:,.3g}"


def _tokens(value):
    return "without end" if value is None else f"{value:,.0f}"
