"""Configs of runs: overrides by name, what a resumed run may change, config files, bad values."""

import dataclasses
from pathlib import Path

import pytest

from tests.support.tiny import tiny_config
from v4jax.accounting import count_parameters
from v4jax.errors import InputError
from v4jax.train import config_file, sweep
from v4jax.train.config import Stage, TrainConfig, differences, flat, override, plain
from v4jax.train.schedule import Schedule

BASE = TrainConfig(
    model=tiny_config(),
    stages=(Stage(steps=5), Stage(steps=7, trained="/indexer/")),
    schedule=Schedule(warm_up=2, decay=3),
)


@pytest.mark.parametrize(
    "key, text, wanted",
    [
        ("seed", "7", 7),
        ("schedule.peak", "1e-3", 1e-3),
        ("losses.mtp", "0", 0.0),
        ("model.hidden_size", "96", 96),
        ("model.index_topk", "None", None),
        ("stages.1.trained", "norm", "norm"),
        ("stages.0.learning_rate", "0.5", 0.5),
        ("data.packed", "false", False),
        ("optimizer.clip", "none", None),
        ("start", "nano", "nano"),
    ],
)
def test_override(key, text, wanted):
    found = flat(override(BASE, {key: text}))[key]
    assert found == wanted and type(found) is type(wanted)


@pytest.mark.parametrize(
    "key, text, sentence",
    [
        ("speed", "1", "--config.speed: there is no field 'speed'; expected model, stages"),
        ("model.size", "1", "there is no field 'size'"),
        ("seed.more", "1", "there is no field 'more'; expected nothing below it"),
        ("stages.2.steps", "1", "'2' is none of the numbers 0 to 1"),
        ("seed", "many", "--config.seed is 'many'; expected int"),
        ("data.packed", "maybe", "--config.data.packed is 'maybe'; expected bool"),
        ("model.hc_mult", "99", "hc_mult is 99"),
        ("schedule.warm_up", "10", "10 steps of warm-up and 3 of decay, and the run only 12"),
        ("stages.0.batch", "0", "a stage's batch is 0; expected 1 or more"),
        ("stages.0.parts", "3", "a stage's batch of 4 rows has 3 parts; expected a divisor"),
        ("stages.0.trained", "(", "no regular expression"),
        ("keep", "0", "keep is 0; expected 1 or more"),
    ],
)
def test_bad_overrides(key, text, sentence):
    with pytest.raises(InputError) as caught:
        override(BASE, {key: text})
    assert sentence in str(caught.value)


def test_fields_that_depend_on_each_other_come_in_any_order():
    wanted = {"stages.1.steps": "1", "stages.0.steps": "2", "schedule.decay": "1"}
    for keys in (wanted, dict(reversed(wanted.items()))):
        assert override(BASE, keys).steps == 3
    with pytest.raises(InputError, match="give one of both"):
        override(BASE, {"schedule": "x", "schedule.peak": "1"})


def test_places_of_steps():
    assert [BASE.place(step) for step in (0, 4, 5, 11, 40)] == [
        (0, 0), (0, 4), (1, 0), (1, 6), (1, 35),
    ]  # fmt: skip
    assert BASE.steps == 12


def test_what_a_resumed_run_may_change():
    stored = plain(BASE)
    assert differences(BASE, stored) == []
    for key, text in (("schedule.peak", "1e-3"), ("keep", "9"), ("stages.1.steps", "70")):
        assert differences(override(BASE, {key: text}), stored) == []
    assert differences(override(BASE, {"model.hidden_size": "96"}), stored) == [
        "model.hidden_size is 96 and was 48"
    ]
    assert differences(override(BASE, {"stages.0.steps": "6"}), stored) == [
        "stages.0.steps is 6 and was 5"
    ]


def test_a_file_that_gives_a_model_trains_it(tmp_path):
    path = tmp_path / "model.py"
    path.write_text("from tests.support.tiny import tiny_config\nget_config = tiny_config\n")
    config = config_file.read(str(path), {"stages.0.steps": "200", "seed": "3"})
    assert config.model == tiny_config() and (config.steps, config.seed) == (200, 3)


@pytest.mark.parametrize(
    "content, sentence",
    [
        (None, "there is no such file"),
        ("x = 1\n", "has no get_config()"),
        ("def get_config(:\n", "config.py:1: "),
        ("def get_config(): return 5\n", "get_config() gives int; expected a TrainConfig"),
    ],
)
def test_bad_files(content, sentence, tmp_path):
    path = tmp_path / "config.py"
    if content is not None:
        path.write_text(content)
    with pytest.raises(InputError) as caught:
        config_file.read(str(path))
    assert sentence in str(caught.value)


@pytest.mark.parametrize("name", ["train_tiny", "train_small"])
def test_shipped_recipes_are_valid(name):
    config = config_file.read(f"configs/{name}.py")
    assert isinstance(config, TrainConfig)
    assert dataclasses.replace(config, seed=1).steps == config.steps


@pytest.mark.parametrize("folder", sorted(Path("experiments").glob("*/sweep.py")), ids=str)
def test_every_run_of_the_experiments_is_a_valid_config(folder):
    experiment = sweep._read(folder.parent)
    for name, changes in experiment.RUNS.items():
        file = sweep._file(folder.parent, changes.get("config", experiment.CONFIG))
        fields = {k: str(v) for k, v in changes.items() if k != "config"}
        config = config_file.read(str(file), fields)
        base = config_file.read(str(sweep._file(folder.parent, experiment.CONFIG)))
        counts = [count_parameters(c.model) for c in (config, base)]
        sizes = [count.total + sum(count.mtp_blocks) for count in counts]
        assert abs(sizes[0] / sizes[1] - 1) < 0.01, (name, sizes)  # matched parameters
