"""Which steps a stage has, on which rows, with which rates; and what a config makes of a stage."""

import contextlib
import dataclasses
import functools

import numpy as np
import pytest

from tests.support.tiny import tiny_config
from v4jax.datasets.config import DataConfig
from v4jax.datasets.source import open_source
from v4jax.model.transformer import Transformer
from v4jax.train import lora, recipe
from v4jax.train.config import Stage, TrainConfig
from v4jax.train.run import Run
from v4jax.train.schedule import Schedule
from v4jax.train.stage import open_stage
from v4jax.train.step import TrainState

CONFIG = TrainConfig(
    model=tiny_config(),
    stages=(Stage(steps=3, length=8, batch=2), Stage(steps=4, length=16, batch=4)),
    data=DataConfig(kind="copy"),
    schedule=Schedule(peak=1e-2, final=1e-3, warm_up=2, decay=3),
)


@functools.cache
def params():
    return Transformer(CONFIG.model).abstract_variables()["params"]


@pytest.fixture
def opened(tmp_path):
    """A function: the stage of a step, in a call that stops at `steps`."""
    with contextlib.ExitStack() as stack:

        def stage_of(done, steps=7):
            run = object.__new__(Run)  # what a stage reads of one
            run.config, run.steps, run.optimizer, run.stack = CONFIG, steps, None, stack
            run.source = open_source(CONFIG.data, CONFIG.model, tmp_path / "tokenizer.json")
            run.state = TrainState(params(), {}, {}, 0)
            run.shardings = TrainState(None, None, None, None)
            return open_stage(run, done)

        yield stage_of


@pytest.mark.parametrize(
    "done, steps, wanted",
    [
        (0, 7, (0, 0, 3)),
        (2, 7, (0, 0, 3)),
        (1, 2, (0, 0, 2)),  # this call stops before the stage does
        (3, 7, (1, 3, 7)),
        (5, 7, (1, 3, 7)),
        (7, 9, (1, 3, 9)),  # the last stage has no end
    ],
)
def test_the_steps_of_a_stage(opened, done, steps, wanted):
    stage = opened(done, steps)
    assert (stage.number, stage.first, stage.end) == wanted


def test_a_stage_goes_on_with_the_rows_of_its_step(opened):
    """Whether it was begun there or earlier; no row comes twice."""
    stage = opened(3)
    batches = [stage.batch(done) for done in (3, 4, 5)]
    assert all(batch.tokens_BT.shape == (4, 16) for batch in batches)
    np.testing.assert_array_equal(opened(5).batch(5).tokens_BT, batches[2].tokens_BT)
    assert len({row.tobytes() for batch in batches for row in batch.tokens_BT}) == 12


def test_rates_follow_the_schedule_of_the_whole_run():
    first, last = CONFIG.stages
    found = [
        recipe.rates(CONFIG, stage, step) for stage, step in ((first, 0), (last, 3), (last, 6))
    ]
    np.testing.assert_allclose([rates.learning_rate for rates in found], [5e-3, 1e-2, 1e-3])
    np.testing.assert_allclose([rates.mtp_weight for rates in found], [0.3, 0.3, 0.1])
    own = dataclasses.replace(first, learning_rate=1e-4)
    assert recipe.rates(CONFIG, own, 0).learning_rate == np.float32(1e-4)


def test_what_a_stage_trains():
    """Router biases move only where routers learn; a weight of 0 keeps the indexer as it is."""
    stage = CONFIG.stages[0]
    assert recipe.step_config(CONFIG, stage).trained is None
    without = recipe.step_config(CONFIG, dataclasses.replace(stage, indexer=0.0))
    assert (without.trained, without.losses.indexer) == (recipe.NOT_INDEXER, 0.0)
    assert without.bias_step == CONFIG.bias_step
    warm_up = dataclasses.replace(stage, trained="/indexer/", attention="dense")
    warm_up = recipe.step_config(CONFIG, warm_up)
    assert (warm_up.trained, warm_up.dense, warm_up.bias_step) == ("/indexer/", True, 0.0)
    adapted = dataclasses.replace(CONFIG, lora=lora.LoraConfig(rank=2))
    adapted = recipe.step_config(adapted, stage)
    assert (adapted.trained, adapted.bias_step) == ("^lora/", 0.0)
