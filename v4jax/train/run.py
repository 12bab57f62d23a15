"""A run and its directory: opened anew, or where its last checkpoint left it; saved.

DIR/config.json       every field of the config
DIR/tokenizer.json    of a text
DIR/metrics.jsonl     one object per logged step
DIR/checkpoints/STEP  parameters, optimiser, position in the data, step and config
DIR/model             the trained model in the official layout, once it is complete (`export`)
"""

import contextlib
import dataclasses
import functools
import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

import jax
import optax

from v4jax.datasets.source import Source, open_source
from v4jax.errors import InputError
from v4jax.files.atomic import write_atomically
from v4jax.files.writing import writable_directory, writing
from v4jax.model.transformer import Transformer
from v4jax.sharding import processes
from v4jax.train import evaluate, metrics, placement, recipe, report, resume, start
from v4jax.train.config import TrainConfig, as_json
from v4jax.train.saves import Checkpoints
from v4jax.train.signals import Signals
from v4jax.train.step import TrainState, new_state

CONFIG, TOKENIZER = "config.json", "tokenizer.json"


@dataclasses.dataclass
class Run:
    """A run that is open: what is fixed, and in `state` what every step replaces.

    Attributes:
      steps: where this call stops. metrics: of the first process; None in others. shardings: of
        every leaf of the state. stack: closes what the run has opened.
    """

    config: TrainConfig
    workdir: Path
    steps: int
    source: Source
    checkpoints: Checkpoints
    metrics: metrics.Metrics | None
    signals: Signals
    optimizer: optax.GradientTransformation
    shardings: Any
    state: TrainState
    stack: contextlib.ExitStack

    def save(self, step: int) -> None:
        """Begins to write the checkpoint of a step; returns when `state` may change."""
        stage, done = self.config.stage_of(step)
        described = {
            "config": as_json(self.config),
            "data": self.source.fingerprint,
            "position": {"stage": stage, "rows": done * self.config.stages[stage].batch},
            "step": step,
        }
        self.checkpoints.save(step, self.state, described)

    def kept(self) -> str:
        """What is safe, for the message of an error; waits for the save in flight."""
        self.checkpoints.wait()
        good = self.checkpoints.latest
        if good is None:
            return "nothing was saved yet"
        return f"the checkpoint of step {good} is good"


def open_run(
    config: TrainConfig,
    workdir: Path,
    steps: int | None,
    stack: contextlib.ExitStack,
    change: bool = False,
    given: Collection[str] = (),
) -> Run:
    """Begins a run in a directory, or goes on with the one that it holds.

    Args:
      steps: where to stop; None: at the config's end. stack: closes what is opened here.
      change, given: see `resume.settle`.

    Raises:
      InputError: a directory, a mesh, data or a checkpoint that this config cannot run with.
    """
    # What can be refused at once comes before what takes long.
    writable_directory(workdir, "--workdir")
    layout = placement.layout_of(config.mesh)
    for stage in config.stages:
        placement.own_rows(layout, stage.batch // stage.parts)
    processes.agree("the run", {"config": as_json(config), "change": change})

    # A directory with a checkpoint holds a run: it goes on, with the config that it began with.
    checkpoints = Checkpoints(workdir, config.keep)
    stack.callback(checkpoints.close)
    latest, stored, said = checkpoints.latest, None, None
    if latest is not None:
        stored = checkpoints.run_of(latest)
        config, said = resume.settle(config, stored["config"], workdir, change, given)

    # Shapes and shardings of the state, and the data.
    model, optimizer = recipe.model(config, config.stages[0]), recipe.optimizer(config)
    scales = start.scales(config, model) if stored is None else checkpoints.scales_of(latest)
    shape = _shape(config, model, optimizer, scales)
    shardings = placement.state_shardings(model, optimizer, shape)
    source = _source(config, workdir)

    # The state itself.
    if stored is None:
        state = _fresh(config, model, optimizer, source, shardings, scales)
    else:
        _check_same_data(config, source, stored, workdir)
        state = checkpoints.restore(latest, placement.with_shardings(shape, shardings))

    # From here on the directory says what it holds, and so does stderr.
    log = _describe(config, workdir, source, latest or 0, stack) if processes.index() == 0 else None
    steps = config.steps if steps is None else steps
    report.opening(config, layout, source, latest or 0, steps)
    if said is not None:
        report.say(said)
    signals = stack.enter_context(Signals())
    return Run(
        config=config,
        workdir=workdir,
        steps=steps,
        source=source,
        checkpoints=checkpoints,
        metrics=log,
        signals=signals,
        optimizer=optimizer,
        shardings=shardings,
        state=state,
        stack=stack,
    )


def _shape(config, model, optimizer, scales):
    """The state's shapes."""
    variables = Transformer(model.config, min_repeats=model.min_repeats).abstract_variables()
    begin = functools.partial(new_state, optimizer=optimizer)
    params = jax.eval_shape(functools.partial(start.adapted, config), variables["params"])
    return jax.eval_shape(begin, params, variables["buffers"], scales=scales)


def _source(config, workdir):
    """The run's data, with which every stage has a row and all processes agree."""
    source = open_source(config.data, config.model, workdir / TOKENIZER)
    processes.agree("the run", {"data": source.fingerprint})
    for stage in config.stages:
        source.rows_of(stage.documents).check(stage.length, recipe.ahead(config))
        evaluate.check(config, stage, source)
    return source


def _fresh(config, model, optimizer, source, shardings, scales):
    """The state before the first step."""
    variables = start.variables(config, model, source.counts_V)
    begin = functools.partial(new_state, optimizer=optimizer)
    where = shardings.params, shardings.buffers, shardings.scales
    params = start.adapted(config, variables["params"])
    params, buffers, scales = jax.device_put((params, variables["buffers"], scales), where)
    return jax.jit(begin, out_shardings=shardings)(params, buffers, scales=scales)


def _check_same_data(config, source, stored, workdir):
    if stored["data"] != source.fingerprint:
        where = config.data.path or config.data.kind
        raise InputError(
            f"{workdir}: its run was trained on other data than {where} now holds; bring that data "
            "back, or give another --workdir"
        )


def _describe(config, workdir, source, step, stack):
    """Writes down what is trained on what, and opens the metrics."""
    if source.tokenizer is not None:
        with writing(workdir / TOKENIZER):
            write_atomically(workdir / TOKENIZER, source.tokenizer.to_str().encode())
    with writing(workdir / CONFIG):
        described = json.dumps(as_json(config), indent=1).encode() + b"\n"
        write_atomically(workdir / CONFIG, described)
    log = metrics.Metrics(workdir, step)
    stack.callback(log.close)
    if log.damaged:
        report.say(f"{workdir / metrics.FILE}: leaves out {log.damaged} damaged lines")
    return log
