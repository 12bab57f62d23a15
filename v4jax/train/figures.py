"""What is known of a step once it is done: read from the device and checked, a line of figures."""

import concurrent.futures
import dataclasses
import math
from typing import Any, NamedTuple

import jax
import numpy as np

from v4jax.errors import InputError
from v4jax.sharding import processes
from v4jax.train.batch import Batch
from v4jax.train.clock import Clock
from v4jax.train.run import Run

# Figures that are means, and what of a line says over how much.
COUNTED = {"loss": "targets", "mtp": "mtp_targets", "indexer": "indexer_queries"}
COUNTED |= {f"indexer_{name}": "indexer_queries" for name in ("uniform", "captured")}
# Those of a draft; of its acceptance by place see `without_empty_means`.
COUNTED |= dict.fromkeys(("cross_entropy", "distance", "confidence"), "targets")
COUNTED |= dict.fromkeys(("confidence_bias", "confidence_error"), "targets")
COUNTED |= {"expected_tau": "blocks"}


class Begun(NamedTuple):
    """A step that the device has been given, and may not have done yet.

    step: its number, from 1. noted: its figures, on the device. batch: what it trains on.
    ended: when it ends, of `Clock.watch`.
    """

    step: int
    noted: dict[str, jax.Array]
    batch: Batch
    ended: concurrent.futures.Future


def read(run: Run, clock: Clock, begun: Begun) -> dict[str, Any]:
    """Waits for a step; its line of the metrics, None for a mean over nothing.

    Raises:
      InputError: a loss or a gradient that is not finite; the batch is written down first.
    """
    noted = {k: float(v) for k, v in jax.device_get(begun.noted).items()}
    line = {"step": begun.step, **noted, **clock.tick(begun.ended)}
    _check_finite(run, line, begun.batch)
    return without_empty_means(line)


def without_empty_means(line: dict[str, Any]) -> dict[str, Any]:
    """The line with None for a mean over nothing: 0 would be the best loss there is."""
    counted = COUNTED | {name: "blocks" for name in line if name.startswith("acceptance_")}
    empty = [name for name, number in counted.items() if name in line and not line[number]]
    return line | dict.fromkeys(empty)


def _check_finite(run, line, batch):
    if math.isfinite(line["loss"]) and math.isfinite(line["grad_norm"]):
        return
    where, kept = _written(run, line["step"], batch), run.kept()
    change = " with --change" if run.checkpoints.latest is not None else ""
    raise InputError(
        f"the loss is {line['loss']} and the gradient's norm {line['grad_norm']} at step "
        f"{line['step']}, with learning rate {line['learning_rate']:.3g}; its batch {where} and "
        f"{kept}: lower schedule.peak and run again{change}"
    )


def _written(run, step, batch):
    """Writes this process's rows of a batch next to the metrics; where they are, in words."""
    of = f"_process_{processes.index()}" if processes.count() > 1 else ""
    path = run.workdir / f"nonfinite_step_{step}{of}.npz"
    try:
        np.savez(path, **{k: v for k, v in dataclasses.asdict(batch).items() if v is not None})
    except OSError as error:
        return f"could not be written to {path} ({error.strerror})"
    return f"is in {path}"
