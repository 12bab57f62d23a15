"""Configs of runs: overrides by name, config files and names, bad values."""

import dataclasses
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.support.tiny import tiny_config
from v4jax import named_configs
from v4jax.accounting import count_parameters
from v4jax.errors import InputError
from v4jax.train import config_file, sweep
from v4jax.train.config import Stage, TrainConfig, by_dotted_name, override
from v4jax.train.schedule import Schedule

ROOT = Path(__file__).resolve().parents[2]
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
    found = by_dotted_name(override(BASE, {key: text}))[key]
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
        ("mesh", "expert=--8", "mesh has 'expert=--8'; expected AXIS=N"),
        ("mesh", "pipeline=2", "mesh axis 'pipeline' is unknown"),
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
    assert [BASE.stage_of(step) for step in (0, 4, 5, 11, 40)] == [
        (0, 0), (0, 4), (1, 0), (1, 6), (1, 35),
    ]  # fmt: skip
    assert BASE.steps == 12


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
        ("import no_such_module\n", "config.py:1: ModuleNotFoundError: No module named"),
        ("def get_config():\n    return 1 / 0\n", "config.py:2: ZeroDivisionError"),
        ("def get_config(needed): return 5\n", "config.py: TypeError: get_config() missing 1"),
        (b"\xff = 1\n", "config.py:"),
        (b"x = 1\0\n", "config.py"),
    ],
)
def test_bad_files(content, sentence, tmp_path):
    path = tmp_path / "config.py"
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(InputError) as caught:
        config_file.read(str(path))
    assert sentence in str(caught.value)


@pytest.mark.parametrize(
    "name, sentence",
    [
        ("/proc/self/mem", "/proc/self/mem: cannot be read (Input/output error)"),
        ("/proc", "--config /proc: that is no file"),
        ("x" * 5000, "cannot be read (File name too long)"),
        ("nothing", "there is no such file; give a Python file, or one of train_small, train_tiny"),
    ],
)
def test_paths_that_cannot_be_read(name, sentence):
    with pytest.raises(InputError) as caught:
        config_file.read(name)
    assert sentence in str(caught.value) and len(str(caught.value)) < 600


def test_a_config_by_its_name(tmp_path, monkeypatch):
    wanted = config_file.read("configs/train_tiny.py")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "train_tiny").mkdir()  # a run's directory has no say
    assert config_file.read("train_tiny") == wanted
    assert config_file.read("flash_tiny", {"stages.0.steps": "200"}).steps == 200
    installed = tmp_path / "site-packages"
    (installed / "v4jax" / "configs").mkdir(parents=True)
    shutil.copy(ROOT / "configs" / "train_tiny.py", installed / "v4jax" / "configs")
    monkeypatch.setattr(named_configs, "__file__", str(installed / "v4jax" / "named_configs.py"))
    assert config_file.read("train_tiny") == wanted
    assert named_configs.recipe_names() == ["train_tiny"]


@pytest.mark.slow
def test_a_config_by_its_name_from_an_installed_wheel(tmp_path):
    source, wheels, target = (tmp_path / name for name in ("source", "wheels", "target"))
    for name in ("v4jax", "configs", "pyproject.toml", "README.md", "LICENSE"):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        source.mkdir(exist_ok=True)
        copy(ROOT / name, source / name)
    build = ["-m", "pip", "wheel", "--no-deps", "--no-build-isolation", f"-w{wheels}", source]
    subprocess.run([sys.executable, *map(str, build)], check=True, capture_output=True)
    (wheel,) = wheels.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(target)
    code = "import v4jax.train.config_file as f; print(f.__file__, f.read('train_tiny').steps)"
    found = subprocess.run(
        [sys.executable, "-c", code],
        check=True,
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(target)},
    ).stdout
    assert found == f"{target}/v4jax/train/config_file.py 60\n"


@pytest.mark.parametrize(
    "file",
    [
        "configs/train_tiny.py",
        "configs/train_small.py",
        "experiments/011_nano_chat/config.py",
        "experiments/012_two_tiers/config.py",
    ],
)
def test_recipes_are_valid(file):
    config = config_file.read(file)
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
