"""The training loop: from a config and a directory to checkpoints, metrics and a model.

`run` lists the files of the directory. Run again, it goes on from the last whole checkpoint, bit
for bit as if it had never stopped, with what of its config it was begun with (`resume`).
"""

import contextlib
import dataclasses
from collections.abc import Collection
from pathlib import Path
from typing import Any

import jax

from v4jax.files.writing import refused, writing
from v4jax.train import export, figures, metrics, report
from v4jax.train.config import TrainConfig
from v4jax.train.figures import Begun
from v4jax.train.run import Run, open_run
from v4jax.train.stage import OpenStage, open_stage


@dataclasses.dataclass(frozen=True)
class Result:
    """How a call of `train` ended.

    Attributes:
      step: steps done. stopped: whether a signal ended it. last: the last line of metrics.
    """

    step: int
    stopped: bool
    last: dict[str, Any]


def train(
    config: TrainConfig,
    workdir: str | Path,
    steps: int | None = None,
    change: bool = False,
    given: Collection[str] = (),
) -> Result:
    """Trains until step `steps` (by default the config's), or goes on with it.

    In the main thread SIGTERM and SIGINT end it after the step in flight; in others, where Python
    lets nobody listen to signals, they are left to the program.

    Args:
      change, given: what of the config a run that goes on may change; see `resume.settle`.

    Raises:
      InputError: bad data, a checkpoint of another run, a full disk, a loss that is not finite.
    """
    with jax.transfer_guard("disallow"), contextlib.ExitStack() as stack:
        with jax.transfer_guard("allow"):
            run = open_run(config, Path(workdir), steps, stack, change, given)
        return _loop(run)


def _loop(run: Run) -> Result:
    """Steps until the end or a signal; the last one's checkpoint is on disk when it returns."""
    config = run.config
    done, saved = int(jax.device_get(run.state.step)), run.checkpoints.latest
    stage: OpenStage | None = None
    begun: Begun | None = None  # a step whose figures are still to be read
    with report.bar(done, run.steps) as bar:
        log = _Log(run, bar)
        while done < run.steps:
            # Once per stage: its rows, its step, its clock.
            if stage is None or done == stage.end:
                stage = open_stage(run, done)

            # The batch, made while the device computes the step before.
            batch = stage.batch(done)
            inputs = stage.inputs(batch, done)

            # Stop on a signal: all processes before the same step.
            run.signals.share()
            if run.signals.stop:
                break

            # Once per stage: compile. The clock starts afterwards.
            if stage.program is None:
                stage.compile(run.state, inputs)

            # The step, which uses up the state that it is given. The device does not wait for the
            # host: a step starts before the figures of the one before are read.
            run.state, noted = stage.program(run.state, *inputs)
            done += 1
            before, begun = begun, Begun(done, noted, batch, stage.clock.watch(noted))

            # Log the step before.
            if before is not None:
                log.add(figures.read(run, stage.clock, before))

            # Go on at once, unless something is to be done with the state of just this step, which
            # the next one would use up, or the next one is another stage's. Then wait for it.
            evaluates = config.evaluate_every and done % config.evaluate_every == 0
            saves = done % config.checkpoint_every == 0
            if not (evaluates or saves or done == stage.end):
                continue
            line, begun = figures.read(run, stage.clock, begun), None

            # Every `evaluate_every` steps: evaluate on held-out rows.
            if evaluates:
                line |= stage.evaluate(run.state)
            log.add(line)
            if evaluates or (saves and bar.disable):  # a pipe has no bar, and is told now and then
                report.progress(line, run.steps)

            # Every `checkpoint_every` steps: write a checkpoint. It is on disk some steps later.
            if saves:
                run.save(done)
                saved = done

            stage.clock.start()  # none of this counts as time of the next step
        if stage is not None and begun is not None:  # a signal came after it
            log.add(figures.read(run, stage.clock, begun))
    return _end(run, done, saved, log)


class _Log:
    """The lines of the steps as they come: written every `log_every` steps, shown and counted."""

    def __init__(self, run, bar):
        self.last: dict[str, Any] = {}
        self.without_targets = 0
        self._run, self._bar = run, bar

    def add(self, line):
        run, step = self._run, line["step"]
        if run.metrics and (step % run.config.log_every == 0 or step == run.steps):
            try:
                run.metrics.write(line)
            except OSError as error:
                raise refused(run.workdir / metrics.FILE, error, run.kept()) from error
        self.last = line
        self.without_targets += line["loss"] is None
        report.show(self._bar, line)


def _end(run, done, saved, log):
    """The last checkpoint and, of a run that is complete, the model."""
    if done != saved:
        run.save(done)
    run.checkpoints.wait()
    if log.without_targets:
        report.say(f"{log.without_targets} steps had no target, and no loss")
    if done >= run.config.steps:
        with jax.transfer_guard("allow"), writing(run.workdir / export.FOLDER):
            export.export(run.workdir, run.config, run.state, run.source.tokenizer)
    return Result(done, run.signals.stop, log.last)
