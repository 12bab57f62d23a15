"""Two and four real processes on this machine, with two CPU devices each."""

import filecmp
import itertools
import json
import os
import sys
import time

import jax
import numpy as np
import pytest

from tests.support import spawn, workers
from tests.support.checkpoints import synthetic
from tests.support.selection import first
from v4jax.checkpoints import convert as convert_lib
from v4jax.checkpoints import load as checkpoint
from v4jax.checkpoints.convert import convert
from v4jax.checkpoints.load import open_checkpoint
from v4jax.errors import InputError
from v4jax.sharding import processes
from v4jax.sharding.mesh import make_mesh
from v4jax.sharding.rules import TRAIN
from v4jax.train import placement

WORKERS = "tests.support.workers:"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("processes")
    synthetic(folder / "official")
    return folder


def check_ended(ended):
    for process, each in enumerate(ended):
        assert each.status == 0, f"process {process}: {each.stderr[-2000:]}"


SIZES = dict(fsdp=2, expert=2)
# Without overlap; every process has a slice of every row.
ROWS = {"data=2,fsdp=2": [[0, 4], [4, 8]], "sequence=4": [[0, 8], [0, 8]]}
LOADED = {
    "stored": ("prefill", dict(expert=4), "stored"),
    "bf16": ("train", SIZES, "bf16"),
}


@pytest.fixture(scope="module")
def pair(folder):
    """Two joined processes that do one thing after the other and disagree at last."""
    path, sizes = str(folder / "official"), json.dumps(SIZES)
    parts = {"speak": ["speak"]}
    for name, (strategy, mesh, weights) in LOADED.items():
        parts[name] = ["load", path, strategy, json.dumps(mesh), weights]
    parts["restore"] = ["restore", str(folder), "prefill", sizes]
    parts |= {mesh: ["rows", mesh] for mesh in ROWS}
    parts["disagree"] = ["disagree"]
    ended = spawn.run_function(WORKERS + "in_turn", 2, json.dumps(parts))
    found = workers.said(ended[0].stdout)
    assert found.keys() == parts.keys(), ended[0].stderr[-2000:]
    return ended, found


def test_only_the_first_speaks(pair):
    ended, found = pair
    assert found["speak"] == "hello from 0\nsum 4.0\n"
    assert ended[1].stdout == ""


@pytest.mark.slow
def test_only_the_first_of_four_speaks():
    ended = spawn.run_function(WORKERS + "speak", 4)
    check_ended(ended)
    assert ended[0].stdout == "hello from 0\nsum 8.0\n"
    assert all(each.stdout == "" for each in ended[1:])


@pytest.mark.parametrize("name", LOADED)
def test_each_of_two_reads_its_part(pair, folder, name):
    check_loaded(json.loads(pair[1][name]), 2, folder, LOADED[name][2])


@pytest.mark.slow
@pytest.mark.parametrize(
    "strategy, sizes, weights",
    [
        ("prefill", dict(expert=8), "stored"),
        ("train", dict(data=2, fsdp=2, expert=2), "float32"),
    ],
)
def test_each_of_four_reads_its_part(folder, strategy, sizes, weights):
    path = str(folder / "official")
    ended = spawn.run_function(WORKERS + "load", 4, path, strategy, json.dumps(sizes), weights)
    check_ended(ended)
    check_loaded(json.loads(ended[0].stdout), 4, folder, weights)


def check_loaded(found, count, folder, weights):
    assert [each["wrong"] for each in found] == [0] * count
    size = sum(f.stat().st_size for f in (folder / "official").glob("*.safetensors"))
    for each in found:
        assert each["read"] < 0.9 * size
        if weights == "stored":
            # What its devices hold, parts of equal content once, and the sample for `agree`.
            assert 0 <= each["read"] - each["held"] < 4096


def test_restore_onto_another_mesh(pair):
    assert [each["wrong"] for each in json.loads(pair[1]["restore"])] == [0, 0]


@pytest.mark.parametrize("mesh", ROWS)
def test_rows_of_a_batch(pair, mesh):
    assert json.loads(pair[1][mesh]) == ROWS[mesh]


def test_disagreement_names_the_field(pair):
    ended, _ = pair
    assert [each.status for each in ended] == [2, 2]
    message = "the processes disagree on the config: config.width is 64 in process 0 and 66 in"
    assert message in ended[0].stderr
    assert "disagree" not in ended[1].stderr


@pytest.mark.parametrize(
    "count, to", first([(2, "orbax")], [(2, "orbax"), (4, "official"), (2, "transformers")])
)
def test_conversion(folder, count, to):
    source, one, many = (str(folder / name) for name in ("official", f"one-{to}", f"many-{to}"))
    convert(source, one, to, progress=False)
    flags = [f"--source={source}", f"--target={many}", f"--to={to}", "--verify"]
    ended = spawn.run_command(["convert", *flags], count)
    check_ended(ended)
    assert ended[0].stdout.startswith("converted ") and ended[0].stdout.count("\n") == 1
    assert all(each.stdout == "" and each.stderr == "" for each in ended[1:])
    check_same_files(one, many)


TRAINED = """
import dataclasses
from tests.train.test_mesh import config
from v4jax.config import CSA
from v4jax.datasets.config import DataConfig
from v4jax.train.config import Stage, TrainConfig
from v4jax.train.schedule import Schedule

def get_config():
    base = TrainConfig(model=config(layers=(CSA,), mtp_layers=(), hc_mult=1))
    return dataclasses.replace(
        base,
        stages=(Stage(steps=3, length=32, batch=4),),
        data=DataConfig(kind="copy"),
        optimizer=dataclasses.replace(base.optimizer, matrices="adamw", eps=1e-6),
        schedule=Schedule(1e-3, 1e-4, warm_up=1, decay=1),
        checkpoint_every=2,
        evaluate_every=2,
        evaluate_rows=4,
    )
"""


def test_rows_that_a_mesh_does_not_divide():
    layout = placement.Layout(make_mesh(jax.devices()[:4], data=2, fsdp=2), TRAIN)
    with pytest.raises(InputError, match="6"):
        placement.own_rows(layout, 6)


@pytest.mark.slow
@pytest.mark.parametrize("mesh", ["data=2,fsdp=2", "sequence=4", "sequence=2,expert=2"])
def test_training(tmp_path, mesh):
    """Two processes of two devices each, and one of four: the same metrics and the same model."""
    (tmp_path / "config.py").write_text(TRAINED)

    def arguments(name):
        flags = [f"--config={tmp_path}/config.py", f"--workdir={tmp_path}/{name}"]
        return ["train", *flags, f"--config.mesh={mesh}"]

    ended = spawn.run_command(arguments("two"), 2, timeout=500)
    check_ended(ended)
    assert ended[0].stdout.startswith("v4jax train: trained at step 3")
    assert ended[1].stdout == ended[1].stderr == ""
    command = [sys.executable, "-m", "v4jax.cli.main", *arguments("one")]
    check_ended(spawn.run(lambda _: command, 1, devices=4, timeout=500))
    lines = [(tmp_path / name / "metrics.jsonl").read_text() for name in ("one", "two")]
    one, two = ([json.loads(line) for line in text.splitlines()] for text in lines)
    for mine, theirs in zip(two, one, strict=True):
        assert mine.keys() == theirs.keys()
        for name in ("loss", "held_out"):
            assert abs(mine.get(name, 0) - theirs.get(name, 0)) < 1e-5 * theirs["loss"]
    assert "held_out" in two[1]
    (_, wanted), (_, found) = (checkpoint.load(tmp_path / n / "model") for n in ("one", "two"))
    for a, b in zip(jax.tree.leaves(wanted), jax.tree.leaves(found), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("count", (2, 4))
def test_generate(folder, count):
    """One mesh over all processes: the tokens of one process, said once."""
    flags = [f"--checkpoint={folder}/official", "--prompt_ids=1,2,3,4,5", "--max_new_tokens=8"]
    # Each process compiles the whole program, and two cores may be all that there are.
    words = ["generate", *flags, f"--mesh=sequence={2 * count}"]
    ended = spawn.run_command(words, count, timeout=120 * count)
    check_ended(ended)
    command = [sys.executable, "-m", "v4jax.cli.main", "generate", *flags]
    (alone,) = spawn.run(lambda _: command, 1, devices=1)
    assert ended[0].stdout == alone.stdout != ""
    assert all(each.stdout == "" for each in ended[1:])


def test_parts_of_a_stopped_conversion_are_kept(folder):
    """One of three processes had written its part when all were stopped; then one goes on."""
    source, one, many = (str(folder / name) for name in ("official", "whole", "stopped"))
    convert(source, one, "orbax", progress=False)
    task = convert_lib._Task(source, many, "orbax", "stored", False)
    with open_checkpoint(source) as opened:
        conversion = convert_lib._Conversion(opened, task)
        conversion._begin()
    convert_lib._convert_part(task, {}, (1, 3))
    with pytest.raises(InputError, match="has not ended"), open_checkpoint(many):
        pass
    report = convert(source, many, "orbax", progress=False)
    assert report.resumed == len(list(conversion.items)[1::3])
    check_same_files(one, many)


def check_same_files(one, many):
    names = [files_below(path) for path in (one, many)]
    assert names[0] == names[1] and names[0]
    assert filecmp.cmpfiles(one, many, names[0], shallow=False)[0] == names[0]


def files_below(path):
    found = (os.path.join(root, name) for root, _, names in os.walk(path) for name in names)
    return sorted(os.path.relpath(each, path) for each in found)


@pytest.mark.parametrize("process", (0, 1))
def test_bad_input_in_one_stops_all(process):
    ended = spawn.run_function(WORKERS + "fail", 2, str(process), timeout=90)
    assert f"process {process} of 2: the file is bad" in ended[process].stderr
    assert ended[process].status == 2
    other = ended[1 - process]
    assert other.status not in (0, None) and other.seconds - ended[process].seconds < 30
    assert other.stderr.strip()


@pytest.mark.parametrize(
    "count, process, way",
    first(
        [(2, 0, "compute"), (2, 1, "sleep"), (2, 1, "compile")],
        itertools.product((2, 4), (0, 1), ("compute", "sleep", "compile")),
    ),
)
def test_a_killed_process_stops_the_others(count, process, way):
    """Within three heartbeats of 10 seconds, and not without a word."""
    ended = spawn.run_function(WORKERS + "die", count, str(process), way, timeout=120)
    assert ended[process].status == -9
    for each in (each for i, each in enumerate(ended) if i != process):
        assert each.status not in (0, None)
        assert each.seconds - ended[process].seconds < 30
        assert "process" in each.stderr or "task" in each.stderr


def test_a_coordinator_that_does_not_answer():
    address = f"127.0.0.1:{spawn.free_port()}"
    started = time.monotonic()
    with (
        pytest.raises(InputError, match=f"{address} did not answer within 1 s"),
        processes.joined(address, 2, 1, wait=1),
    ):
        pass
    assert time.monotonic() - started < 10


def test_a_process_that_never_comes():
    """Process 0 of two waits for the other one, and says so."""
    address = f"127.0.0.1:{spawn.free_port()}"
    code = f"from v4jax.sharding.processes import joined\nwith joined({address!r}, 2, 0, wait=3): 1"
    [ended] = spawn.run(lambda _: [sys.executable, "-c", code], 1, timeout=90)
    assert ended.status == 2 and ended.seconds < 60
    assert f"not all of the 2 processes met at {address} within 3 s" in ended.stderr


@pytest.mark.parametrize(
    "flags, message",
    [
        (
            ("localhost:1", None, 0),
            "--num_processes missing next to --coordinator and --process_id",
        ),
        (("localhost", 2, 0), "--coordinator is 'localhost'; expected HOST:PORT"),
        (("localhost:1", 2, 2), "--process_id is 2 and --num_processes 2; expected one from 0 to"),
    ],
)
def test_bad_flags(flags, message):
    with pytest.raises(InputError, match=message), processes.joined(*flags):
        pass
