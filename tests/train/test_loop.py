"""Runs end to end: killed and resumed bit for bit, stopped by a signal, refused in a sentence."""

import dataclasses
import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

import v4jax
from tests.support.tiny import tiny_config
from v4jax.config import CSA, with_hash_routing
from v4jax.datasets import rows
from v4jax.datasets.config import DataConfig
from v4jax.datasets.source import open_source
from v4jax.errors import InputError
from v4jax.train import loop, metrics, placement
from v4jax.train.config import Stage, TrainConfig
from v4jax.train.saves import Checkpoints
from v4jax.train.schedule import Schedule
from v4jax.train.step import TrainState

pytestmark = pytest.mark.slow  # compiles whole training programs, minutes of it

ROOT = Path(__file__).resolve().parents[2]
STEPS = 8


def get_config(text=None) -> TrainConfig:
    """Two short stages on a text; the child process of the test of kill -9 imports it too."""
    model = dict(vocab_size=300, hidden_size=16, mtp_layers=(), hc_mult=2, hc_sinkhorn_iters=2)
    layers = with_hash_routing((CSA, CSA), 1)
    model |= dict(layers=layers, index_topk=4, n_routed_experts=4, moe_intermediate_size=16)
    return TrainConfig(
        model=tiny_config(**model),
        stages=(Stage(steps=3, length=32, batch=2), Stage(steps=STEPS - 3, length=48, batch=2)),
        data=DataConfig(kind="text", path=text or os.environ["TEXT"], tokenizer="bytes"),
        schedule=Schedule(peak=1e-2, final=1e-3, warm_up=2, decay=3),
        checkpoint_every=2,
        keep=2,
        evaluate_every=4,
        evaluate_rows=3,
    )


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("".join(f"{i} times {i} is {i * i}.\n" for i in range(300)))
    return str(path)


@pytest.fixture(scope="module")
def whole(text, tmp_path_factory):
    """A run that nothing stops."""
    workdir = tmp_path_factory.mktemp("whole")
    result = loop.train(get_config(text), workdir)
    assert (result.step, result.stopped) == (STEPS, False)
    return workdir


def arrays(workdir, step=STEPS):
    """The leaves of a checkpoint by name, as they are on disk."""
    import orbax.checkpoint as ocp

    with ocp.StandardCheckpointer() as checkpointer:
        return checkpointer.restore(workdir / "checkpoints" / str(step) / "state")


def assert_same(a, b):
    a, b = arrays(a), arrays(b)
    assert a.keys() == b.keys() and len(a) > 40
    for name, leaf in a.items():
        np.testing.assert_array_equal(np.asarray(leaf), np.asarray(b[name]), err_msg=name)


def test_what_a_run_leaves(whole):
    lines = metrics.read(whole)
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    for line in lines:
        wanted = {"loss", "tokens_per_second", "grad_norm", "learning_rate", "mfu", "indexer"}
        assert wanted <= set(line) and all(np.isfinite(v) for v in line.values())
    assert not any("mtp" in line for line in lines)  # the model has no such block
    assert [line["step"] for line in lines if "held_out" in line] == [4, 8]
    # No step is counted as next to nothing, however its figures were read (on any machine).
    seconds = sorted(line["seconds"] for line in lines)
    assert seconds[0] > seconds[-1] / 200 and all(0 < line["mfu"] < 1 for line in lines)
    assert 0 <= lines[-1]["held_out_accuracy"] <= 1
    np.testing.assert_allclose([line["learning_rate"] for line in lines[:2]], [5e-3, 1e-2])
    assert lines[-1]["loss"] < lines[0]["loss"]
    assert sorted(p.name for p in (whole / "checkpoints").iterdir()) == ["6", "8"]
    assert json.loads((whole / "config.json").read_text())["model.hidden_size"] == 16


def test_a_batch_without_a_target_has_no_loss_and_the_run_goes_on(tmp_path, capsys):
    """Most of the text is masked: its batches are counted, and not as the best loss there is."""
    pieces = [[["mute " * 30, 0], ["says " * 3, int(n % 4 == 0)]] for n in range(8)]
    records = [json.dumps({"text": text}) + "\n" for text in pieces]
    (tmp_path / "rare.jsonl").write_text("".join(records))
    config = get_config(str(tmp_path / "rare.jsonl"))
    stage = dataclasses.replace(config.stages[0], steps=8, batch=1)
    config = dataclasses.replace(config, stages=(stage,), evaluate_every=None, checkpoint_every=50)
    result = loop.train(config, tmp_path / "run")
    lines = metrics.read(tmp_path / "run")
    without = [line["targets"] == 0 for line in lines]
    assert [line["loss"] is None for line in lines] == without and 0 < sum(without) < 8
    assert all(0 < line["loss"] < 10 for line in lines if line["targets"])
    assert f"{sum(without)} steps had no target" in capsys.readouterr().err
    assert result.last == lines[-1]


def test_the_export_is_a_checkpoint_of_ours(whole):
    model, variables = v4jax.load(whole / "model")
    assert model.config.hidden_size == 16
    table = variables["buffers"]["layers_0"]["block_0"]["ffn"]["gate"]["tid2eid"]
    np.testing.assert_array_equal(table, arrays(whole)["buffers.layers_0.block_0.ffn.gate.tid2eid"])


def command_line(text, workdir, *words, devices=None):
    """The run as a process of its own."""
    environment = os.environ | {"TEXT": text}
    environment["PYTHONPATH"] = str(ROOT)
    if devices is not None:
        flags = [f for f in environment["XLA_FLAGS"].split() if "device_count" not in f]
        count = f"--xla_force_host_platform_device_count={devices}"
        environment["XLA_FLAGS"] = " ".join([*flags, count])
    command = [sys.executable, "-m", "v4jax.cli.main", "train", f"--config={__file__}"]
    return subprocess.Popen([*command, f"--workdir={workdir}", *words], env=environment, cwd=ROOT)


def kill_at_random(child, workdir):
    """Kills a run after one of its steps but the last."""
    at = int.from_bytes(os.urandom(1)) % (STEPS - 1) + 1
    print("killed after step", at)
    while child.poll() is None and len(metrics.read(workdir)) < at:
        time.sleep(0.01)
    child.send_signal(signal.SIGKILL)
    child.wait()


def test_killed_at_a_random_step_it_ends_the_same(text, tmp_path):
    paths = [tmp_path / "whole", tmp_path / "killed"]
    for path in paths:
        path.mkdir()
    assert command_line(text, paths[0]).wait() == 0
    kill_at_random(command_line(text, paths[1]), paths[1])
    assert command_line(text, paths[1]).wait() == 0
    assert_same(*paths)
    for path in paths:
        assert [line["step"] for line in metrics.read(path)] == list(range(1, STEPS + 1))


def test_flags_that_train_adds_change_nothing_but_the_rounding(whole, text, tmp_path):
    """`whole` is a run in this process, without them."""
    assert command_line(text, tmp_path).wait() == 0
    for mine, theirs in zip(metrics.read(tmp_path), metrics.read(whole), strict=True):
        for name in ("loss", "grad_norm", "held_out"):
            if name in theirs:
                np.testing.assert_allclose(mine[name], theirs[name], rtol=1e-4, err_msg=name)


def test_killed_on_four_devices_it_ends_the_same(text, tmp_path):
    words = [
        "--config.mesh=data=2,fsdp=2",
        "--config.stages.0.batch=4",
        "--config.stages.1.batch=4",
    ]

    def start(name):
        (tmp_path / name).mkdir(exist_ok=True)
        return command_line(text, tmp_path / name, *words, devices=4)

    assert start("whole").wait() == 0
    kill_at_random(start("killed"), tmp_path / "killed")
    assert start("killed").wait() == 0
    assert_same(tmp_path / "whole", tmp_path / "killed")


def test_sigterm_saves_and_the_run_goes_on(whole, text, tmp_path, monkeypatch):
    config = dataclasses.replace(get_config(text), checkpoint_every=STEPS)
    write = metrics.Metrics.write

    def write_and_stop(self, line):
        write(self, line)
        if line["step"] == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(metrics.Metrics, "write", write_and_stop)
        result = loop.train(config, tmp_path)
    # Step 2 had begun when the figures of step 1 were read.
    assert (result.step, result.stopped) == (2, True)
    assert [line["step"] for line in metrics.read(tmp_path)] == [1, 2]
    assert (tmp_path / "checkpoints" / "2").is_dir() and not (tmp_path / "model").exists()
    assert loop.train(config, tmp_path).step == STEPS
    assert_same(whole, tmp_path)


def test_a_run_that_is_complete_does_nothing(whole, text):
    result = loop.train(get_config(text), whole)
    assert (result.step, result.last) == (STEPS, {})


@pytest.mark.parametrize("every", [2, STEPS], ids=["saved_there", "next_step_begun"])
def test_a_loss_that_is_not_finite_stops_with_its_step(text, tmp_path, every):
    config = dataclasses.replace(get_config(text), checkpoint_every=every)
    wild = dataclasses.replace(config, schedule=Schedule(1e30, 1e30, warm_up=0, decay=0))
    with pytest.raises(InputError, match=r"at step 2, with learning rate 1e\+30; its batch is in"):
        loop.train(wild, tmp_path)
    batch = np.load(tmp_path / "nonfinite_step_2.npz")
    source = open_source(config.data, config.model, tmp_path / "tokenizer.json")
    wanted = rows.take(source.rows_of(None), range(2, 4), 0, 32, 1)
    np.testing.assert_array_equal(batch["tokens_BT"], wanted.ids[:, :-1])
    assert [line["step"] for line in metrics.read(tmp_path)] == [1]
    assert not (tmp_path / "checkpoints" / "2").exists()
    # Nothing is lost: with a lower rate the same directory trains on.
    assert loop.train(config, tmp_path, steps=2).step == 2


def test_another_config_is_refused_by_its_fields(whole, text):
    config = get_config(text)
    other = dataclasses.replace(
        config, seed=1, model=dataclasses.replace(config.model, hidden_size=32)
    )
    sentence = "another config: model.hidden_size is 32 and was 16; seed is 1 and was 0"
    with pytest.raises(InputError, match=sentence):
        loop.train(other, whole)


def test_other_data_is_refused(whole, text):
    content = Path(text).read_text()
    try:
        Path(text).write_text("x" + content[1:])
        with pytest.raises(InputError, match="its run was trained on other data than"):
            loop.train(get_config(text), whole)
    finally:
        Path(text).write_text(content)


def test_a_text_with_no_complete_row(tmp_path):
    (tmp_path / "short.txt").write_text("too short")
    with pytest.raises(InputError, match="no complete row of 32"):
        loop.train(get_config(str(tmp_path / "short.txt")), tmp_path / "run")


def test_a_full_disk_leaves_the_checkpoint_before(tmp_path):
    def state(value):
        params = {"w": {"weight": np.full((1 << 20,), value, np.float32)}}
        return TrainState(params, {}, {}, np.int32(1))

    checkpoints = Checkpoints(tmp_path, keep=2)
    described = {"config": {}, "data": "the data's fingerprint", "step": 1}
    checkpoints.save(1, state(1), described)
    checkpoints.wait()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, limits[1]))  # as good as a full disk
    try:
        with pytest.raises(InputError, match="could not be saved .*the one of step 1 is good"):
            checkpoints.save(2, state(np.random.default_rng(0).random(1 << 20)), described)
            checkpoints.wait()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    again = Checkpoints(tmp_path, keep=2)
    assert again.latest == 1 and again.run_of(1) == described
    like = jax.eval_shape(lambda: jax.tree.map(jax.numpy.asarray, state(0)))
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    found = again.restore(1, placement.with_shardings(like, jax.tree.map(lambda _: here, like)))
    np.testing.assert_array_equal(found.params["w"]["weight"], 1.0)
    again.close()
