"""The training loop: from a config and a directory to checkpoints, metrics and a model.

    DIR/config.json       every field of the config
    DIR/tokenizer.json    of a text
    DIR/metrics.jsonl     one object a logged step
    DIR/checkpoints/STEP  parameters, optimiser, position in the data, step and config
    DIR/model             the trained model in the official layout, once the run is complete

Run again, it goes on from the last whole checkpoint, bit for bit as if it had never stopped, with
what of its config it was begun with (`resume`).
"""

import contextlib
import dataclasses
import functools
import json
import math
from collections.abc import Collection
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from v4jax.datasets import rows as rows_lib
from v4jax.datasets.source import Source, open_source
from v4jax.errors import InputError
from v4jax.files.atomic import write_atomically
from v4jax.files.writing import refused, writable_directory, writing
from v4jax.model.transformer import Transformer
from v4jax.sharding import processes
from v4jax.sharding.rules import Layout
from v4jax.train import (
    evaluate,
    export,
    host_memory,
    lora,
    metrics,
    placement,
    report,
    resume,
    start,
)
from v4jax.train.batch import Batch, make_batch
from v4jax.train.clock import Clock
from v4jax.train.config import Stage, TrainConfig, as_json
from v4jax.train.flops import passes, step_flops
from v4jax.train.optimizer import make_optimizer
from v4jax.train.saves import Checkpoints
from v4jax.train.signals import Signals
from v4jax.train.step import Rates, StepConfig, TrainState, new_state, train_step

NOT_INDEXER = "^(?!.*/indexer/)"
# Figures that are means, and what of a line says over how much.
COUNTED = {"loss": "targets", "mtp": "mtp_targets", "indexer": "indexer_queries"}
COUNTED |= {f"indexer_{name}": "indexer_queries" for name in ("uniform", "captured")}
CONFIG, TOKENIZER = "config.json", "tokenizer.json"


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
            settings = {"change": change, "given": sorted(given)}
            run = _open(config, Path(workdir), steps, stack, settings)
        return _run(run)


@dataclasses.dataclass
class _Run:
    """A run that is open: the fixed things, and in `state` what changes."""

    config: TrainConfig
    workdir: Path
    steps: int
    source: Source
    checkpoints: Checkpoints
    metrics: metrics.Metrics | None  # of the first process
    signals: Signals
    optimizer: Any
    state: TrainState
    shardings: Any = None


def _open(config, workdir, steps, stack, settings):
    """The run, what can be refused at once before what takes long."""
    writable_directory(workdir, "--workdir")
    layout = placement.layout_of(config.mesh)
    for stage in config.stages:
        placement.own_rows(layout, stage.batch // stage.parts)
    processes.agree("the run", {"config": as_json(config), "change": settings["change"]})
    checkpoints = Checkpoints(workdir, config.keep)
    stack.callback(checkpoints.close)
    latest = checkpoints.latest
    stored = None if latest is None else checkpoints.run_of(latest)
    said = None
    if stored is not None:
        config, said = resume.settle(config, stored["config"], workdir, **settings)
    model, optimizer = _model(config, config.stages[0]), _optimizer(config)
    scales = start.scales(config, model) if stored is None else checkpoints.scales_of(latest)
    shape = _shape(config, model, optimizer, scales)
    shardings = placement.state_shardings(model, optimizer, shape)
    source = _source(config, workdir)
    if stored is None:
        state = _fresh(config, model, optimizer, source, shardings, scales)
    else:
        _check_same_data(config, source, stored, workdir)
        state = checkpoints.restore(latest, placement.placed(shape, shardings))
    log = _describe(config, workdir, source, latest or 0, stack) if processes.index() == 0 else None
    steps = config.steps if steps is None else steps
    report.opening(config, layout, source, latest or 0, steps)
    if said is not None:
        report.say(said)
    signals = stack.enter_context(Signals())
    run = _Run(config, workdir, steps, source, checkpoints, log, signals, optimizer, state)
    run.shardings = shardings
    return run


def _source(config, workdir):
    """The run's data, with which every stage has a row and all processes agree."""
    source = open_source(config.data, config.model, workdir / TOKENIZER)
    processes.agree("the run", {"data": source.fingerprint})
    for stage in config.stages:
        source.rows_of(stage.documents).check(stage.length, _ahead(config))
        evaluate.check(config, stage, source)
    return source


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


def _shape(config, model, optimizer, scales):
    """The state's shapes."""
    variables = Transformer(model.config, min_repeats=model.min_repeats).abstract_variables()
    begin = functools.partial(new_state, optimizer=optimizer)
    params = jax.eval_shape(functools.partial(start.adapted, config), variables["params"])
    return jax.eval_shape(begin, params, variables["buffers"], scales=scales)


def _fresh(config, model, optimizer, source, shardings, scales):
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


def _run(run: _Run) -> Result:
    """Steps until the end or a signal; the last one's checkpoint is on disk when it returns."""
    done, saved = int(jax.device_get(run.state.step)), run.checkpoints.latest
    last: dict[str, Any] = {}
    without_targets = 0
    shown = {"initial": done, "unit": "step", "dynamic_ncols": True}
    with tqdm(total=run.steps, disable=None, **shown) as bar:  # None: not into pipes
        while done < run.steps and not run.signals.stop:
            stage, _ = run.config.place(done)
            for line in _steps_of(run, stage, done):
                last, done = line, line["step"]
                without_targets += line["loss"] is None
                _show(bar, line)
                if "held_out" in line or (bar.disable and _saves(run.config, done)):
                    report.progress(line, run.steps)
                if _saves(run.config, done):
                    _save(run, done)
                    saved = done
    if done != saved:
        _save(run, done)
    run.checkpoints.wait()
    if without_targets:
        report.say(f"{without_targets} steps had no target, and no loss")
    if done >= run.config.steps:
        with jax.transfer_guard("allow"), writing(run.workdir / export.FOLDER):
            export.export(run.workdir, run.config, run.state, run.source.tokenizer)
    return Result(done, run.signals.stop, last)


def _steps_of(run: _Run, number: int, done: int):
    """The steps of one stage from `done` on; yields a line for each when its figures are here.

    A step is started before the figures of the one before are read, and its batch is made while
    that one computes: the device does not wait for the host. It does where the state of just that
    step is asked for, which the next one would use up.
    """
    config, stage = run.config, run.config.stages[number]
    model, options = _model(config, stage), step_config(config, stage)
    step = jax.jit(
        functools.partial(train_step, model, run.optimizer, options),
        donate_argnums=0,
        out_shardings=(run.shardings, run.shardings.step),
    )
    evaluator = evaluate.evaluator(config, stage, model, run.source)
    rows = run.source.rows_of(stage.documents)
    tokens = stage.batch * stage.length
    computed = passes(run.state.params, options.trained, config.model)
    flops = step_flops(config.model, tokens, stage.length, computed, options.dense)
    clock = Clock(tokens, stage.length, flops)
    program, ahead = None, None
    while done < run.steps and config.place(done)[0] == number:
        batch = _load(config, rows, number, config.place(done)[1], model.sharding)
        rates = placement.replicate(model.sharding, _rates(config, stage, done))
        inputs = placement.put_batch(model.sharding, batch, stage.batch), rates
        run.signals.share()  # all processes end before the same step
        if run.signals.stop:
            break
        if program is None:  # before the clock of the first step begins
            report.compiling(config, number)
            program = step.lower(run.state, *inputs).compile()
            processes.compiled()
            host_memory.forget_traces()
            clock.start()
        run.state, noted = program(run.state, *inputs)
        done += 1
        before, ahead = ahead, (done, noted, batch, clock.watch(noted))
        if before is not None:
            yield _line(run, clock, *before)
        evaluates = config.evaluate_every and done % config.evaluate_every == 0
        if evaluates or _saves(config, done):
            yield _line(run, clock, *ahead, evaluator if evaluates else None)
            ahead = None
            clock.start()  # behind the evaluation and what the reader of the line has done
    if ahead is not None:
        yield _line(run, clock, *ahead)
    clock.close()


def _saves(config, step):
    """Whether the state after this step is kept: the next one waits for it."""
    return step % config.checkpoint_every == 0


def _line(run, clock, step, noted, batch, ended, evaluator=None):
    """What is known of a step once it is done; written down where it is to be."""
    noted = {k: float(v) for k, v in jax.device_get(noted).items()}
    line = {"step": step, **noted, **clock.tick(ended)}
    _check_finite(run, line, batch)
    for name, counted in COUNTED.items():
        if name in line and not line[counted]:
            line[name] = None  # a mean over nothing is no 0
    if evaluator is not None:
        line |= evaluator(run.state)
    if run.metrics and (step % run.config.log_every == 0 or step == run.steps):
        try:
            run.metrics.write(line)
        except OSError as error:
            raise refused(run.workdir / metrics.FILE, error, _kept(run)) from error
    return line


def step_config(config: TrainConfig, stage: Stage) -> StepConfig:
    """What `train_step` is told of a stage."""
    weight = config.losses.indexer if stage.indexer is None else stage.indexer
    trained = stage.trained
    if trained is None and config.lora.rank is not None:
        trained = f"^{lora.SUBTREE}/"
    if trained is None and not weight:
        trained = NOT_INDEXER  # with weight 0 decay must not move the indexer either
    return StepConfig(
        losses=dataclasses.replace(config.losses, indexer=weight),
        trained=trained,
        dense=stage.attention == "dense",
        parts=stage.parts,
        clip=config.optimizer.clip,
        bias_step=config.bias_step if trained in (None, NOT_INDEXER) else 0.0,
        quantized=stage.quantized,
        lora=config.lora,
    )


def _load(config: TrainConfig, rows, number: int, step: int, layout: Layout) -> Batch:
    """This process's rows of a step of a stage, on the host."""
    stage, ahead = config.stages[number], _ahead(config)
    own = placement.own_rows(layout, stage.batch)
    numbers = range(step * stage.batch + own.start, step * stage.batch + own.stop)
    row = rows_lib.take(rows, numbers, number, stage.length, ahead)
    return make_batch(row.ids, row.documents, row.counts, ahead, config.data.packed)


def _ahead(config):
    return 1 + (len(config.model.mtp_layers) if config.losses.mtp else 0)


def _model(config, stage):
    model = config.model
    if stage.rope_scaling is not None:
        model = dataclasses.replace(model, rope_scaling=stage.rope_scaling)
    return Transformer(
        model,
        dtype="bfloat16" if stage.quantized else config.dtype,
        numerics="native" if stage.quantized else None,
        min_repeats=config.min_repeats,
        remat=config.remat,
        sharding=placement.layout_of(config.mesh),
    )


def _optimizer(config):
    options = config.optimizer
    if config.lora.rank is not None:
        options = dataclasses.replace(options, frozen=lora.ALL_ELSE)
    return make_optimizer(options, config.model.o_groups)


def _rates(config, stage, step):
    rate = stage.learning_rate
    if rate is None:
        rate = config.schedule.rate(step, config.steps)
    decaying = config.schedule.decayed(step, config.steps) > 0
    mtp = config.mtp_decayed if decaying else config.losses.mtp
    return Rates(np.float32(rate), np.float32(mtp))


def _check_finite(run, line, batch):
    if math.isfinite(line["loss"]) and math.isfinite(line["grad_norm"]):
        return
    step = line["step"]
    of = f"_process_{processes.index()}" if processes.count() > 1 else ""
    path = run.workdir / f"nonfinite_step_{step}{of}.npz"
    where = f"is in {path}"
    try:
        np.savez(path, **{k: v for k, v in dataclasses.asdict(batch).items() if v is not None})
    except OSError as error:
        where = f"could not be written to {path} ({error.strerror})"
    kept = _kept(run)
    change = " with --change" if run.checkpoints.latest is not None else ""
    raise InputError(
        f"the loss is {line['loss']} and the gradient's norm {line['grad_norm']} at step {step}, "
        f"with learning rate {line['learning_rate']:.3g}; its batch {where} and {kept}: lower "
        f"schedule.peak and run again{change}"
    )


def _kept(run):
    """What is safe, for a message."""
    run.checkpoints.wait()
    good = run.checkpoints.latest
    return f"the checkpoint of step {good} is good" if good is not None else "nothing was saved yet"


def _save(run, step):
    stage, place = run.config.place(step)
    position = {"stage": stage, "rows": place * run.config.stages[stage].batch}
    described = {
        "config": as_json(run.config),
        "data": run.source.fingerprint,
        "position": position,
        "step": step,
    }
    run.checkpoints.save(step, run.state, described)


def _show(bar, line):
    loss = "no targets" if line["loss"] is None else f"loss {line['loss']:.3f}"
    bar.set_postfix_str(
        f"{loss}, {line['tokens_per_second']:.0f} tokens/s, MFU {line['mfu']:.1%}",
        refresh=False,
    )
    bar.update(line["step"] - bar.n)
