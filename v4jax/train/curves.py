"""Curves of runs, and the table of an experiment, out of metrics.jsonl."""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from v4jax import extras
from v4jax.errors import InputError
from v4jax.train import metrics

# A curve of fewer points is drawn with its points, and is not smoothed.
DENSE = 30


class Panel(NamedTuple):
    """A picture of one figure of metrics.jsonl, drawn where some run has it."""

    field: str
    title: str
    unit: str
    logarithmic: bool = False
    smooth: bool = True


PANELS = (
    Panel("loss", "Training loss", "nats per token"),
    Panel("held_out", "Held-out loss", "nats per token"),
    Panel("held_out_accuracy", "Held-out targets right", "share of targets"),
    Panel("grad_norm", "Gradient norm", "L2 norm", logarithmic=True),
    Panel("learning_rate", "Learning rate", "per step", smooth=False),
    Panel("tokens_per_second", "Speed", "tokens per second"),
    Panel("load_cv", "Load of the experts", "standard deviation / mean"),
    Panel("acceptance_1", "First draft accepted", "probability"),
    Panel("expected_tau", "Tokens per round, drafts and one", "tokens"),
    Panel("held_out_expected_tau", "Tokens per round, held out", "tokens"),
    Panel("confidence_error", "Confidence less acceptance", "absolute value"),
    Panel("indexer", "Indexer's loss", "KL, nats per token"),
)


def lines_of(workdir: Path) -> list[dict[str, Any]]:
    """A run's metrics.

    Raises:
      InputError: there are none, or they cannot be read.
    """
    lines = metrics.read(workdir)
    if not lines:
        raise InputError(
            f"{str(workdir)[:200]}: holds no {metrics.FILE} of a run; give directories of runs"
        )
    return lines


def draw(runs: dict[str, list[list[dict[str, Any]]]], out: Path) -> None:
    """Every panel that some run has figures for, a colour per name.

    Faint curves are as logged, bold ones smoothed. Runs under one name (seeds of one config) have
    one bold curve, their mean, in a band of one standard deviation.

    Args:
      runs: name -> the metrics of each of its runs.
      out: a .png file.

    Raises:
      InputError: no run has figures to draw, or `out` cannot be written.
    """
    extras.require("matplotlib", "plot", "drawing")
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    every = [lines for of_name in runs.values() for lines in of_name]
    panels = [p for p in PANELS if any(p.field in line for lines in every for line in lines)]
    if not panels:
        raise InputError(f"none of {', '.join(runs)} has figures to draw; give other runs")
    columns = min(len(panels), 2)
    rows = -(-len(panels) // columns)
    size = (6 * columns, 3.2 * rows + 0.5)
    figure, axes = plt.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")
    handles = {}
    for axis, panel in zip(axes.flat, panels, strict=False):
        for number, (label, of_name) in enumerate(runs.items()):
            look = {"color": f"C{number % 10}", "linestyle": "--" if number >= 10 else "-"}
            curve = _draw_runs(
                axis, [_points(lines, panel.field) for lines in of_name], panel, look
            )
            if curve:
                handles.setdefault(label, curve)
        scale = "log" if panel.logarithmic else "linear"
        axis.set(title=panel.title, xlabel="step", ylabel=panel.unit, yscale=scale)
        axis.grid(alpha=0.3)
    for axis in axes.flat[len(panels) :]:
        axis.remove()
    figure.suptitle(_title(runs))
    place = {"loc": "outside lower center", "ncols": min(4, len(handles)), "fontsize": 8}
    figure.legend(handles.values(), handles.keys(), **place)
    try:
        figure.savefig(out, dpi=110)
    except (OSError, ValueError) as error:
        raise InputError(f"{out}: cannot be written ({error}); give a .png file") from None
    finally:
        plt.close(figure)


def _title(runs):
    seeds = max(len(of_name) for of_name in runs.values())
    if seeds > 1:
        return f"Mean and standard deviation of {seeds} runs, smoothed; faint: as logged"
    return "Smoothed; faint: as logged"


def _draw_runs(axis, runs, panel, look):
    """The runs of one name; returns the bold curve, or None where no run has a point."""
    runs = [dict(points) for points in runs if points]
    if not runs:
        return None
    dense = len(runs[0]) >= DENSE
    for points in runs:
        if len(runs) > 1 or (dense and panel.smooth):
            axis.plot(*_sorted(points), linewidth=0.6, alpha=0.25, **look)
    # Seeds of one config have the same steps, as far as all of them have got.
    steps = sorted(set.intersection(*(set(points) for points in runs)))
    if not steps:
        steps, runs = sorted(runs[0]), runs[:1]
    values = np.array([[points[step] for step in steps] for points in runs], np.float64)
    if dense and panel.smooth:
        values = np.array([smoothed(of_run) for of_run in values])
    mean = np.mean(values, axis=0)
    if len(values) > 1:
        spread = np.std(values, axis=0, ddof=1)
        axis.fill_between(
            steps, mean - spread, mean + spread, color=look["color"], alpha=0.15, linewidth=0
        )
    (curve,) = axis.plot(steps, mean, linewidth=1.4, marker="" if dense else ".", **look)
    return curve


def _sorted(points):
    return zip(*sorted(points.items()), strict=True)


def smoothed(values: np.ndarray) -> np.ndarray:
    """The running mean over a twentieth of the curve around each point, of what is finite."""
    half = max(1, len(values) // 40)
    window = np.ones(2 * half + 1)
    finite = np.isfinite(values)
    total = np.convolve(np.where(finite, values, 0.0), window, "same")
    count = np.convolve(finite.astype(np.float64), window, "same")
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


def _points(lines, field):
    """(step, value) of the lines that have one: a batch without targets has no loss."""
    return [(line["step"], line[field]) for line in lines if line.get(field) is not None]


def summary(lines: list[dict[str, Any]]) -> dict[str, float | int]:
    """A run's end: loss over its last tenth (if that has targets), held-out figures, speed.

    The loss is a mean over targets, of which a step may have more than another. A line stands for
    the steps since the one before it, which may not all be logged; minutes are those of steps.
    """
    tail = lines[-max(1, len(lines) // 10) :]
    found = {"step": lines[-1]["step"]}
    if losses := [(line["loss"], _targets(line)) for line in tail if line.get("loss") is not None]:
        values, weights = zip(*losses, strict=True)
        found["loss"] = float(np.average(values, weights=weights))
    for name in ("held_out", "held_out_bits_per_byte"):
        if values := _points(lines, name):
            found[name] = values[-1][1]
    if speeds := [value for _, value in _points(lines, "tokens_per_second")]:
        found["tokens_per_second"] = float(np.median(speeds))
    steps, seconds = np.array(_points(lines, "seconds") or [(0, 0)], np.float64).T
    found["minutes"] = float(np.sum(np.diff(steps, prepend=0) * seconds)) / 60
    return found


def _targets(line):
    """Runs of before this was noted down had as many in every step, as far as anyone knows."""
    return line.get("targets") or 1.0
