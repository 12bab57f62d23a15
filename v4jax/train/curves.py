"""Curves of runs, and the table of an experiment, out of metrics.jsonl."""

from pathlib import Path
from typing import Any

import numpy as np

from v4jax import extras
from v4jax.errors import InputError
from v4jax.train import metrics

# (field, name on the axis, logarithmic); drawn where some run has it.
PANELS = (
    ("loss", "nats a token", False),
    ("held_out", "held-out nats a token", False),
    ("held_out_accuracy", "held-out targets right", False),
    ("grad_norm", "gradient norm", True),
    ("learning_rate", "learning rate", False),
    ("tokens_per_second", "tokens a second", False),
    ("load_cv", "variation of the experts' load", False),
    ("indexer", "KL of the indexer", False),
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
    """Every panel that some run has figures for, a curve a run.

    Runs under one name (seeds of one config) have one colour.
    """
    extras.require("matplotlib", "plot", "drawing")
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    every = [lines for of_name in runs.values() for lines in of_name]
    panels = [p for p in PANELS if any(p[0] in line for lines in every for line in lines)]
    if not panels:
        raise InputError(f"none of {', '.join(runs)} has figures to draw; give other runs")
    columns = min(len(panels), 2)
    rows = -(-len(panels) // columns)
    size = (6 * columns, 3.2 * rows)
    figure, axes = plt.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")
    handles = {}
    for axis, (field, name, logarithmic) in zip(axes.flat, panels, strict=False):
        for number, (label, of_name) in enumerate(runs.items()):
            for lines in of_name:
                found = _points(lines, field)
                if found:
                    mark = {"color": f"C{number % 10}", "marker": "." * (len(found) < 30)}
                    dashed = "--" if number >= 10 else "-"
                    steps, values = np.array(found).T
                    (curve,) = axis.plot(steps, values, linewidth=1, linestyle=dashed, **mark)
                    handles.setdefault(label, curve)
        axis.set(xlabel="step", ylabel=name, yscale="log" if logarithmic else "linear")
        axis.grid(alpha=0.3)
    for axis in axes.flat[len(panels) :]:
        axis.remove()
    place = {"loc": "outside lower center", "ncols": min(4, len(handles)), "fontsize": 8}
    figure.legend(handles.values(), handles.keys(), **place)
    try:
        figure.savefig(out, dpi=120)
    except (OSError, ValueError) as error:
        raise InputError(f"{out}: cannot be written ({error}); give a .png file") from None
    finally:
        plt.close(figure)


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
