"""A sweep by workers: each run once at a time, also where a worker is killed while it trains."""

import json
import sys

import pytest

from v4jax.cli.main import main
from v4jax.train import sweep

# In place of `v4jax train`: the run b_0 kills its worker the first time, and would go on alone.
STAND_IN = """
import json, os, pathlib, signal, sys, time
from v4jax import lifeline
lifeline.watch()
workdir = pathlib.Path(next(a for a in sys.argv if a.startswith("--workdir=")).split("=", 1)[1])
first = workdir / "first"
if workdir.name == "b_0" and not first.exists():
    first.write_text(str(os.getpid()))
    os.kill(os.getppid(), signal.SIGKILL)
    time.sleep(5)
    (workdir / "alone").touch()
if workdir.name == "c_0":
    sys.exit("v4jax train: it is not to be")
line = {"step": 1, "loss": 2.0, "tokens_per_second": 1.0, "grad_norm": 1.0, "learning_rate": 1.0,
        "seconds": 1.0}
with (workdir / "metrics.jsonl").open("a") as file:
    file.write(json.dumps(line) + "\\n")
time.sleep(0.2)
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    script = tmp_path / "stand_in.py"
    script.write_text(STAND_IN)
    monkeypatch.setattr(sweep, "TRAIN", (str(script),))
    folder = tmp_path / "experiment"
    folder.mkdir()

    def write(names):
        runs = {name: {} for name in names}
        (folder / "sweep.py").write_text(f"CONFIG, RUNS, SEEDS = 'c.py', {runs}, (0, 1)\n")
        return folder

    return write


def test_runs_of_a_killed_worker_are_run_by_others(folder, capsys):
    path = folder("ab")
    command = ["v4jax", "sweep", str(path), "--executor=processes", "--workers=2"]
    assert main([*command]) == 0
    said = capsys.readouterr()
    assert "was killed (SIGKILL" in said.err and "done again by others" in said.err
    assert [line[:4] for line in said.out.splitlines()] == ["| ru", "|---", "| a ", "| b "]
    for name in ("a_0", "a_1", "b_0", "b_1"):
        lines = (path / "runs" / name / "metrics.jsonl").read_text().splitlines()
        assert len(lines) == 1 and json.loads(lines[0])["loss"] == 2.0
        assert not (path / "runs" / name / "alone").exists()
    assert (path / "runs" / "b_0" / "first").exists() and (path / "table.md").exists()


@pytest.mark.parametrize("flags", [["--executor=processes", "--workers=1"], ["--jobs=2"]])
def test_a_run_that_fails_is_one_sentence(flags, folder, capsys):
    path = folder("c")
    assert main(["v4jax", "sweep", str(path), *flags]) == 2
    said = capsys.readouterr().err
    assert "c_0 ended with status 1: v4jax train: it is not to be; mend what it says" in said


def test_here_as_before(folder, capsys):
    path = folder("a")
    assert main(["v4jax", "sweep", str(path), "--jobs=2"]) == 0
    assert "a_1 is complete, 2 of 2" in capsys.readouterr().err or sys.stderr.isatty()


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--workers=2"], "--workers is 2, and --executor local has none"),
        (["--executor=processes", "--jobs=2"], "--jobs is given with --executor processes"),
        (["--worker_resources=CPU=1"], "--worker_resources is given without --executor ray"),
        (["--executor=ray", "--worker_resources=CPU"], "--worker_resources has 'CPU'; expected"),
        (["--executor=ray", "--worker_resources=CPU=0"], "--worker_resources has 'CPU=0'"),
        (["--executor=clouds"], "expected local or processes or ray"),
        (["--executor=processes", "--workers=0"], "--workers is '0'; expected"),
    ],
)
def test_flags_that_do_not_fit(flags, sentence, folder, capsys):
    assert main(["v4jax", "sweep", str(folder("a")), *flags]) == 2
    assert sentence in capsys.readouterr().err
