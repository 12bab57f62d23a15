"""Pictures of a run: depth by length, accuracy, latency, cost against success, chains of calls."""

import collections
import io
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from v4jax.eval.summary import cost_of, scored

Records = Sequence[Mapping[str, Any]]
DEPTHS = 10  # rows of the heat map


def draw(runs: Mapping[str, Records], summaries: Mapping[str, Mapping[str, Any]]) -> bytes | None:
    """One PNG with a panel for whatever the runs have; None where there is nothing to draw.

    Args:
      runs: name -> records. The heat map and the costs are of the first one.
    """
    panels = [panel for panel in _PANELS if panel.has(runs)]
    if not panels:
        return None
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    columns = min(2, len(panels))
    rows = -(-len(panels) // columns)
    figure, axes = plt.subplots(
        rows, columns, figsize=(7 * columns, 4 * rows), layout="constrained", squeeze=False
    )
    for panel, axis in zip(panels, axes.flat, strict=False):
        panel.draw(figure, axis, runs, summaries)
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=100)
    plt.close(figure)
    return content.getvalue()


class _Panel:
    """A picture and whether there are records for it."""

    def __init__(self, of: Callable[[Mapping[str, Any]], bool], draw):
        self._of, self.draw = of, draw

    def has(self, runs: Mapping[str, Records]) -> bool:
        return any(self._of(record) for records in runs.values() for record in records)


def _has_depth(record):
    return record.get("depth") is not None and _is_question(record)


def _is_question(record):
    return record.get("score") is not None and record["length"] > 0 and "attempts" not in record


def _is_load(record):
    return "concurrency" in record


def _is_chain(record):
    return record.get("calls", 0) > 1


def _heat_map(figure, axis, runs, summaries):
    records = [each for each in next(iter(runs.values())) if _has_depth(each)]
    lengths = sorted({each["length"] for each in records})
    cells = collections.defaultdict(list)
    for each in records:
        row = min(int(each["depth"] * DEPTHS), DEPTHS - 1)
        cells[row, lengths.index(each["length"])].append(each["score"])
    grid = np.full((DEPTHS, len(lengths)), np.nan)
    for place, scores in cells.items():
        grid[place] = 100 * np.mean(scores)
    image = axis.imshow(grid, aspect="auto", vmin=0, vmax=100, cmap="RdYlGn")
    figure.colorbar(image, ax=axis, label="score, %")
    axis.set_xticks(range(len(lengths)), [f"{n:,}" for n in lengths])
    axis.set_yticks(range(DEPTHS), [f"{(i + 0.5) / DEPTHS:.0%}" for i in range(DEPTHS)])
    axis.set(title="Score by depth and length", xlabel="tokens", ylabel="depth of the needle")


def _accuracy(figure, axis, runs, summaries):
    several = len(runs) > 1
    for name, summary in summaries.items():
        lines = collections.defaultdict(list)
        for each in summary["results"]:
            if each["length"] > 0 and "mean" in each and "mean_attempts" not in each:
                lines[each["task"]].append(each)
        for task, points in lines.items():
            mean = np.array([[p["mean"], p["low"], p["high"]] for p in points]) * 100
            label = f"{task}, {name}" if several else task
            axis.errorbar(
                [p["length"] for p in points],
                mean[:, 0],
                yerr=np.maximum([mean[:, 0] - mean[:, 1], mean[:, 2] - mean[:, 0]], 0),
                marker="o",
                capsize=3,
                label=label,
            )
    _by_length(axis, summaries)
    axis.set(title="Score by length (bars: 95 %)", xlabel="tokens", ylabel="score, %")
    axis.set_ylim(-4, 104)
    axis.legend(fontsize=7, ncols=2)


def _by_length(axis, summaries):
    lengths = sorted({p["length"] for s in summaries.values() for p in s["results"]} - {0})
    axis.set_xscale("log")
    axis.set_xticks(lengths, [f"{n:,}" for n in lengths])
    axis.minorticks_off()
    axis.grid(alpha=0.3)


def _latency(field: str, title: str, log: bool):
    def draw(figure, axis, runs, summaries):
        for name, records in runs.items():
            lines = collections.defaultdict(list)
            for each in records:
                if _is_load(each) and each.get(field) is not None:
                    lines[each["task"]].append((each["length"], 1e3 * each[field]))
            for task, points in sorted(lines.items()):
                x, y = zip(*sorted(points), strict=True)
                style = "--" if task.startswith("warm") else "-"
                text = f"{task}, {name}" if len(runs) > 1 else task
                axis.plot(x, y, style, marker="o", label=text)
        _by_length(axis, summaries)
        axis.set(title=title, xlabel="tokens of prompt and answer", ylabel="milliseconds")
        if log:
            axis.set_yscale("log")
        else:
            axis.set_ylim(bottom=0)
        axis.legend(fontsize=7, ncols=2)

    return draw


def _cost(figure, axis, runs, summaries):
    for name, summary in summaries.items():
        for each in cost_of(summary):
            shown = each["cost_per_task"]
            label = f"{each['task']} {each['length']:,}" + (f", {name}" if len(runs) > 1 else "")
            if shown is None:
                axis.plot(0, 0, "x", label=f"{label}: none solved, cost without end")
            else:
                axis.plot(100 * each["success"], shown, "o", label=label)
    axis.set(title="Cost per completed task", xlabel="tasks solved, %", ylabel="cost")
    axis.set_xlim(-4, 104)
    axis.set_ylim(bottom=0)
    axis.grid(alpha=0.3)
    axis.legend(fontsize=7)


def _chains(figure, axis, runs, summaries):
    for name, records in runs.items():
        chains = [each for each in records if _is_chain(each)]
        points = collections.defaultdict(list)
        for each in chains:
            points[each["calls"]].append((each["score"], each["steps_done"]))
        x = sorted(points)
        whole, steps = (
            100 * np.array([np.mean([p[i] for p in points[c]]) for c in x]) for i in (0, 1)
        )
        suffix = f", {name}" if len(runs) > 1 else ""
        axis.plot(x, whole, marker="o", label=f"whole chains right{suffix}")
        axis.plot(x, steps, "--", marker="x", label=f"steps done{suffix}")
        axis.set_xticks(x, [str(calls) for calls in x])
    axis.set(title="Chains of tool calls", xlabel="calls", ylabel="%")
    axis.set_ylim(-4, 104)
    axis.grid(alpha=0.3)
    axis.legend(fontsize=7)


_PANELS = (
    _Panel(_has_depth, _heat_map),
    _Panel(_is_question, _accuracy),
    _Panel(_is_load, _latency("first_token_seconds", "Time to the first token", log=True)),
    _Panel(_is_load, _latency("between_median", "Time between tokens, median", log=False)),
    _Panel(lambda record: "attempts" in record, _cost),
    _Panel(_is_chain, _chains),
)


def has_questions(records: Records) -> bool:
    return any(_is_question(each) for each in scored(records))
