"""A run that goes on keeps what it was begun with; what it may change, and what needs a flag."""

import dataclasses
import fnmatch
import json
import threading

import pytest

from tests.support.tiny import tiny_config
from v4jax.config import CSA, with_hash_routing
from v4jax.datasets.config import DataConfig
from v4jax.errors import InputError
from v4jax.train import loop, metrics, resume
from v4jax.train.config import Stage, TrainConfig, as_json, by_dotted_name, override
from v4jax.train.schedule import Schedule
from v4jax.train.signals import Signals

BASE = TrainConfig(
    model=tiny_config(),
    stages=(Stage(steps=5), Stage(steps=7, trained="/indexer/")),
    data=DataConfig(kind="text", path="here", tokenizer="bytes"),
    schedule=Schedule(warm_up=2, decay=3),
)
STORED = as_json(BASE)
CHANGES = {
    "free": {
        "checkpoint_every": "7",
        "keep": "9",
        "log_every": "2",
        "evaluate_every": "3",
        "remat": "true",
        "mesh": "data=2",
        "stages.0.parts": "2",
        "stages.1.parts": "4",
        "start": "nano",
        "data.path": "there",
    },
    "changeable": {
        "schedule.peak": "1e-3",
        "schedule.final": "1e-5",
        "schedule.warm_up": "1",
        "schedule.decay": "4",
        "evaluate_rows": "2",
        "stages.1.steps": "70",
        "stages.1.learning_rate": "0.5",
    },
    "fixed": {
        "seed": "1",
        "data.seed": "1",
        "model.hidden_size": "96",
        "min_repeats": "2",
        "dtype": "bfloat16",
        "losses.mtp": "0.2",
        "optimizer.clip": "3",
        "stages.0.steps": "6",
        "stages.0.learning_rate": "1e-3",
        "stages.1.batch": "8",
    },
}
EACH = [(kind, name, text) for kind, of in CHANGES.items() for name, text in of.items()]


@pytest.mark.parametrize("kind, name, text", EACH, ids=[name for _, name, _ in EACH])
def test_each_kind_of_field(kind, name, text):
    config = override(BASE, {name: text})
    assert resume.kind_of(name, config) == kind
    if kind == "free":
        assert resume.settle(config, STORED, "run") == (config, None)
    elif kind == "fixed":
        for change in (False, True):
            with pytest.raises(InputError, match="run: holds a run of another config: ") as caught:
                resume.settle(config, STORED, "run", change)
            assert f"{name} is " in str(caught.value)
    else:
        begun, said = resume.settle(config, STORED, "run")
        assert begun == BASE
        assert said.startswith(f"keeps what the run was begun with: {name} is ")
        assert resume.settle(config, STORED, "run", change=True)[0] == config
        with pytest.raises(InputError, match="add --change to go on with it") as caught:
            resume.settle(config, STORED, "run", given=[name])
        now = f"{name} is {by_dotted_name(config)[name]!r}"
        assert f"{now} and the run was begun with {STORED[name]!r}" in str(caught.value)


def test_no_field_is_forgotten():
    """Every list names fields that there are, and all that these tests do not change are fixed."""
    names = set(STORED)
    for pattern in (*resume.FREE, *resume.CHANGEABLE):
        glob = pattern.replace("LAST", "1").replace(r"\d+", "?").replace(".*", "*")
        assert fnmatch.filter(names, glob.replace("\\", "")), pattern
    named = CHANGES["free"].keys() | CHANGES["changeable"].keys()
    assert {resume.kind_of(name, BASE) for name in names - named} == {"fixed"}


def test_fields_that_depend_on_each_other_are_kept_together():
    changes = {"stages.1.steps": "1", "schedule.warm_up": "3", "schedule.decay": "0"}
    assert resume.settle(override(BASE, changes), STORED, "run")[0] == BASE


def test_signals_are_left_alone_in_a_thread():
    caught = []

    def body():
        try:
            with Signals() as signals:
                signals.share()
                caught.append(signals.stop)
        except BaseException as error:
            caught.append(error)

    thread = threading.Thread(target=body)
    thread.start()
    thread.join()
    assert caught == [False]


def run_config(steps=4, **changes) -> TrainConfig:
    layers = with_hash_routing((CSA, CSA), 1)
    model = dict(vocab_size=300, hidden_size=16, mtp_layers=(), hc_mult=2, hc_sinkhorn_iters=2)
    model |= dict(layers=layers, index_topk=4, n_routed_experts=4, moe_intermediate_size=16)
    base = TrainConfig(
        model=tiny_config(**model),
        stages=(Stage(steps=steps, length=32, batch=2),),
        data=DataConfig(kind="copy"),
        schedule=Schedule(peak=3e-3, final=1e-3, warm_up=1, decay=0),
        checkpoint_every=2,
    )
    return dataclasses.replace(base, **changes)


@pytest.mark.slow
def test_a_run_keeps_its_schedule_or_is_told_to_change_it(tmp_path, capsys):
    loop.train(run_config(), tmp_path, steps=2)
    begun = (tmp_path / "config.json").read_bytes()
    said = capsys.readouterr().err
    for words in ("parameters", "on one cpu device of 8", "data copy", "begins at step 0 of 4"):
        assert words in said
    assert "compiles the step of stage 1 of 1" in said

    other = run_config(schedule=Schedule(peak=6e-3, final=1e-3, warm_up=1, decay=0))
    loop.train(other, tmp_path, steps=3)
    assert [line["learning_rate"] for line in metrics.read(tmp_path)] == [pytest.approx(3e-3)] * 3
    assert (tmp_path / "config.json").read_bytes() == begun
    said = capsys.readouterr().err
    assert "goes on from the checkpoint of step 2 of 4, stops at 3" in said
    assert "schedule.peak is 0.006 and the run was begun with 0.003" in said

    with pytest.raises(InputError, match="add --change"):
        loop.train(other, tmp_path, given=["schedule.peak"])
    # Recomputed activations change no number; a thread of Ray's or Optuna's may train as well.
    free = dataclasses.replace(other, remat=True, log_every=2, keep=1)
    ended = []
    thread = threading.Thread(target=lambda: ended.append(loop.train(free, tmp_path, change=True)))
    thread.start()
    thread.join()
    assert ended[0].step == 4 and not ended[0].stopped
    last = metrics.read(tmp_path)[-1]
    assert last["step"] == 4 and last["learning_rate"] == pytest.approx(6e-3)
    assert json.loads((tmp_path / "config.json").read_text())["schedule.peak"] == 6e-3
    assert "changed from here on: schedule.peak is 0.006" in capsys.readouterr().err
