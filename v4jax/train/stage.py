"""A stage that is under way: its rows, its compiled step, its evaluation and its clock."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax

from v4jax.datasets import rows as rows_lib
from v4jax.model.transformer import Transformer
from v4jax.sharding import processes
from v4jax.train import evaluate, host_memory, placement, recipe, report
from v4jax.train.anchors import with_anchors
from v4jax.train.batch import Batch, make_batch
from v4jax.train.clock import Clock
from v4jax.train.config import Stage, TrainConfig
from v4jax.train.flops import passes, step_flops
from v4jax.train.run import Run
from v4jax.train.step import Rates, TrainState, train_step


@dataclasses.dataclass
class OpenStage:
    """What the steps of one stage share.

    Attributes:
      number: which of the config's stages. first, end: the run's steps that are done when it
        begins, and when it ends or this call does.
      step: the jitted step. program: the same, compiled; None before `compile`.
      evaluate: from a state to figures of held-out rows.
    """

    config: TrainConfig
    number: int
    first: int
    end: int
    model: Transformer
    rows: Any
    step: Any
    evaluate: Callable[[TrainState], dict[str, float]]
    clock: Clock
    program: Any = None

    @property
    def stage(self) -> Stage:
        return self.config.stages[self.number]

    def batch(self, done: int) -> Batch:
        """This process's rows of the step that follows `done` steps, on the host."""
        size, ahead = self.stage.batch, recipe.ahead(self.config)
        own = placement.own_rows(self.model.sharding, size)
        start = (done - self.first) * size
        numbers = range(start + own.start, start + own.stop)
        row = rows_lib.take(self.rows, numbers, self.number, self.stage.length, ahead)
        batch = make_batch(row.ids, row.documents, row.counts, ahead, self.config.data.packed)
        if (of := self.config.draft) is None:
            return batch
        return with_anchors(batch, numbers, self.number, self.config.seed, of.anchors)

    def inputs(self, batch: Batch, done: int) -> tuple[Batch, Rates]:
        """The batch and the rates of the step that follows `done` steps, on the devices."""
        layout = self.model.sharding
        rates = placement.replicate(layout, recipe.rates(self.config, self.stage, done))
        return placement.put_batch(layout, batch, self.stage.batch), rates

    def compile(self, state: TrainState, inputs: tuple[Batch, Rates]) -> None:
        """Makes `program`, in all processes, and then starts the clock."""
        report.compiling(self.config, self.number)
        self.program = self.step.lower(state, *inputs).compile()
        processes.compiled()
        host_memory.forget_traces()
        self.clock.start()


def open_stage(run: Run, done: int) -> OpenStage:
    """The stage of the step that follows `done` steps; nothing is compiled yet."""
    config = run.config
    number, of_it = config.stage_of(done)
    stage, first = config.stages[number], done - of_it
    last = number == len(config.stages) - 1  # which has no end of its own
    model, options = recipe.model(config, stage), recipe.step_config(config, stage)
    step = jax.jit(
        functools.partial(train_step, model, run.optimizer, options),
        donate_argnums=0,
        out_shardings=(run.shardings, run.shardings.step),
    )
    evaluator = evaluate.evaluator(config, stage, model, run.source)
    rows, tokens = run.source.rows_of(stage.documents), stage.batch * stage.length
    computed = passes(run.state.params, options.trained, config.model)
    flops = step_flops(config.model, tokens, stage.length, computed, options.dense)
    clock = Clock(tokens, stage.length, flops)
    run.stack.callback(clock.close)
    return OpenStage(
        config=config,
        number=number,
        first=first,
        end=run.steps if last else min(run.steps, first + stage.steps),
        model=model,
        rows=rows,
        step=step,
        evaluate=evaluator,
        clock=clock,
    )
