"""Time per step by commit, ours and transformers, out of history.jsonl.

    python experiments/001_cpu_speed/plot.py

Draws speed.png here and measures nothing. Faint points are single runs; a line joins the medians of
each commit's runs. The number at a commit says how many times faster we are there (the median over
its runs, of which each has both sides).
"""

import json
import statistics
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

HERE = Path(__file__).parent
VOCABULARY = 4096
# (kind, tokens, title)
PANELS = (
    ("prefill", 1024, "Prefill of 1,024 tokens"),
    ("prefill", 4096, "Prefill of 4,096 tokens"),
    ("decode", 4096, "Decode step at 4,096 tokens"),
    ("training", 256, "Training step of 256 tokens"),
    ("training", 1024, "Training step of 1,024 tokens"),
    ("training", 4096, "Training step of 4,096 tokens"),
)
SIDES = {"ours": ("v4jax", "C0", "o"), "transformers": ("transformers", "C1", "s")}


def measurements(history):
    """(kind, tokens, commit, ours, theirs or None) of every run, in seconds, oldest first."""
    for line in history:
        # Two commits in turns on a busy machine, and both sides under another allocator: neither
        # compares with the other lines.
        if "before" in line["rows"][0] or line["command"].startswith("GLIBC_TUNABLES"):
            continue
        for row in line["rows"]:
            if "what" in row:
                yield (
                    row["what"],
                    row["length"],
                    line["commit"],
                    row["ours"],
                    row.get("transformers"),
                )
            elif row["vocab"] == VOCABULARY:
                theirs = row.get("transformers", {}).get("seconds")
                yield "training", row["length"], line["commit"], row["ours"]["seconds"], theirs


def draw(history):
    found = list(measurements(history))
    figure = Figure(figsize=(13, 7), layout="constrained")
    for panel, (kind, tokens, title) in zip(figure.subplots(2, 3).flat, PANELS, strict=True):
        runs = {}
        for _, _, commit, ours, theirs in (row for row in found if row[:2] == (kind, tokens)):
            runs.setdefault(commit, []).append((ours, theirs))
        _panel(panel, runs, "ms" if kind == "decode" else "s")
        panel.set_title(title)
    figure.axes[0].legend(frameon=False, fontsize=8, loc="center left")
    figure.suptitle(
        "Time by commit on two CPU cores, and how many times faster v4jax is", fontsize=12
    )
    figure.savefig(HERE / "speed.png", dpi=110)


def _panel(panel, runs, unit):
    """One measurement: a column per commit; `runs` maps a commit to its (ours, theirs)."""
    scale = {"ms": 1e3, "s": 1.0}[unit]
    columns = {commit: x for x, commit in enumerate(runs)}
    for side, (label, colour, marker) in enumerate(SIDES.values()):
        points = [
            (columns[commit], scale * run[side])
            for commit, of_commit in runs.items()
            for run in of_commit
            if run[side] is not None
        ]
        xs = sorted({x for x, _ in points})
        medians = [statistics.median(y for at, y in points if at == x) for x in xs]
        panel.plot(*zip(*points, strict=True), marker, color=colour, alpha=0.35, markersize=4)
        panel.plot(xs, medians, color=colour, marker=marker, markersize=3, label=label)
    for commit, of_commit in runs.items():
        ratios = [theirs / ours for ours, theirs in of_commit if theirs is not None]
        if ratios:
            top = max(scale * theirs for _, theirs in of_commit if theirs is not None)
            where = {"xytext": (0, 6), "textcoords": "offset points", "ha": "center"}
            ratio = statistics.median(ratios)
            text = f"{ratio:.1f}x" if ratio < 10 else f"{ratio:.0f}x"
            panel.annotate(text, (columns[commit], top), fontsize=8, **where)
    panel.set(ylabel=f"time, {unit}", yscale="log", xlabel="commit, oldest first")
    panel.yaxis.set_major_formatter(FuncFormatter(_ticks))
    panel.yaxis.set_minor_formatter(FuncFormatter(_ticks))
    panel.tick_params(axis="y", which="both", labelsize=8)
    panel.set_xticks(list(columns.values()), list(columns), rotation=45, fontsize=8)
    panel.margins(y=0.15)
    panel.grid(alpha=0.3, which="both")


def _ticks(value, _):
    """1, 2 and 5 of each power of ten, as plain numbers."""
    return f"{value:g}" if f"{value:e}"[0] in "125" else ""


def main():
    draw([json.loads(line) for line in (HERE / "history.jsonl").read_text().splitlines()])


if __name__ == "__main__":
    main()
