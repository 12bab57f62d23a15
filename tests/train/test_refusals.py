"""Places that cannot be written and meshes that cannot be are refused first; so is a full disk."""

import contextlib
import errno
import os
import resource

import numpy as np
import pytest

from tests.train.test_resume import run_config
from v4jax.cli.main import main
from v4jax.datasets import files, tokenize
from v4jax.datasets.config import DataConfig
from v4jax.datasets.records import Piece
from v4jax.errors import InputError
from v4jax.files import atomic, writing
from v4jax.train import events, loop, metrics, saves, sweep
from v4jax.train import run as run_files

CONFIG = """
from tests.train.test_resume import run_config

def get_config():
    return run_config()
"""


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "config.py"
    path.write_text(CONFIG)
    return str(path)


@pytest.fixture
def no_work(monkeypatch):
    """Nothing is tokenised and no checkpoint opened before a refusal."""

    def called(*_args, **_named):
        raise AssertionError("work before the refusal")

    monkeypatch.setattr(run_files, "open_source", called)
    monkeypatch.setattr(saves.Checkpoints, "__init__", called)


@pytest.mark.parametrize(
    "workdir, reason",
    [
        ("file", "a file is in the way"),
        ("file/below", "Not a directory"),
        ("file/far/below", "Not a directory"),
        ("/proc", "No such file or directory"),
        ("/proc/run", "No such file or directory"),
        ("/proc/1/run", ""),
        ("/dev/null", "a file is in the way"),
        ("x" * 5000, "File name too long"),
        ("nul\0", "null byte"),
    ],
)
def test_directories_that_cannot_be_written(workdir, reason, config, tmp_path, capsys, no_work):
    (tmp_path / "file").write_text("in the way")
    path = str(tmp_path / workdir)
    assert main(["v4jax", "train", f"--config={config}", f"--workdir={path}"]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"v4jax train: --workdir {path[:200]}: cannot be used (")
    assert reason in said and said.count("\n") == 1 and len(said) < 500
    with pytest.raises(InputError, match="--workdir .* cannot be used"):
        loop.train(run_config(), path)


def test_a_directory_without_permission(config, tmp_path, capsys, no_work, monkeypatch):
    def refuse(*_args, **_named):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(writing.tempfile, "TemporaryFile", refuse)
    assert main(["v4jax", "train", f"--config={config}", f"--workdir={tmp_path}/run"]) == 2
    assert "cannot be used (Permission denied)" in capsys.readouterr().err


@pytest.mark.parametrize(
    "mesh, sentence",
    [
        ("expert=--8", "mesh has 'expert=--8'; expected AXIS=N"),
        ("expert=8-", "mesh has 'expert=8-'"),
        ("expert=\u00b2", "mesh has 'expert=\u00b2'"),
        ("expert=" + "9" * 5000, "mesh has 'expert=999"),
        ("expert", "mesh has 'expert'"),
        ("=8", "mesh has '=8'"),
        ("expert=0", "expected sizes of 1 or more"),
        ("data=-1,expert=-1", "-1 (what remains) at most once"),
        ("data=2,data=4", "mesh has data twice"),
        ("pipeline=8", "mesh axis 'pipeline' is unknown"),
        ("data=3", "the mesh data 3 needs 3 devices and there are 8"),
        ("data=8", "batch has size 2, which mesh axes data=8"),
    ],
)
def test_meshes_that_cannot_be(mesh, sentence, config, tmp_path, capsys, no_work):
    words = [f"--config={config}", f"--workdir={tmp_path}/run", f"--config.mesh={mesh}"]
    assert main(["v4jax", "train", *words]) == 2
    said = capsys.readouterr().err
    assert sentence in said and said.count("\n") == 1 and len(said) < 500


def experiment(folder, text="CONFIG = 'config.py'\nRUNS = {'a': {}}\nSEEDS = (0,)\n"):
    folder.mkdir()
    (folder / "sweep.py").write_text(text)
    return folder


@pytest.mark.parametrize("runs", ["file", "file/below", "/proc/runs"])
def test_a_sweeps_runs_that_cannot_be_written(runs, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sweep, "_run_all", None)
    (tmp_path / "file").write_text("in the way")
    folder = experiment(tmp_path / "experiment")
    assert main(["v4jax", "sweep", str(folder), f"--runs={tmp_path / runs}"]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"v4jax sweep: --runs {tmp_path / runs}: cannot be used (")
    assert said.count("\n") == 1


@pytest.mark.parametrize(
    "text, sentence",
    [
        ("RUNS = {", "sweep.py:1: '{' was never closed"),
        ("import nothing_of_that_name\n", "sweep.py:1: ModuleNotFoundError"),
        ("CONFIG = RUNS = SEEDS = 5\n", "sweep.py: RUNS is 5 and SEEDS 5; expected {NAME:"),
        ("CONFIG, RUNS, SEEDS = 'x', {'a': {}}, ()\n", "SEEDS (); expected"),
        ("CONFIG, RUNS, SEEDS = 'x', {}, (1,)\n", "RUNS is {} and"),
    ],
)
def test_sweeps_with_mistakes(text, sentence, tmp_path, capsys):
    assert main(["v4jax", "sweep", str(experiment(tmp_path / "experiment", text))]) == 2
    said = capsys.readouterr().err
    assert sentence in said and said.count("\n") == 1


@contextlib.contextmanager
def full_after(size):
    """Files may have so many bytes: as good as a full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_full_disk_under_tokenised_data(tmp_path):
    documents = [files.Document("a", (Piece("some text " * 1000),))]
    tokenizer = tokenize.learn(documents, tokenize.BYTES)
    for size in (0, 1, 100, 4096, 20_000, 60_000):
        with full_after(size), pytest.raises(InputError, match=r"tokens_\w+.npz: cannot be writ"):
            tokenize.encode_once(documents, tokenizer, 0, 1, tmp_path)
        assert list(tmp_path.iterdir()) == []  # and what was written is gone, the space free again
    tokens = tokenize.encode_once(documents, tokenizer, 0, 1, tmp_path)
    again = tokenize.encode_once(documents, tokenizer, 0, 1, tmp_path)
    np.testing.assert_array_equal(tokens.ids, again.ids)
    assert len(list(tmp_path.iterdir())) == 1


def test_a_full_disk_under_metrics_and_events(tmp_path):
    line = {"step": 1, "loss": 1.0}
    with full_after(0), pytest.raises(InputError, match=r"events\S+: cannot be written \(File too"):
        metrics.Metrics(tmp_path, 0)
    (tmp_path / metrics.FILE).write_bytes(b'{"step": 1, "loss": 1.0}\n{"step": 2, "loss": 1.0}\n')
    with full_after(10), pytest.raises(InputError, match=r"metrics.jsonl: cannot be written"):
        metrics.Metrics(tmp_path, 1)
    assert [each["step"] for each in metrics.read(tmp_path)] == [1, 2]  # nothing is lost
    log = metrics.Metrics(tmp_path, 1)
    with full_after(30), pytest.raises(OSError, match="File too large"):
        log.write(line)
    log.close()  # has nothing left to write that would fail again
    assert [each["step"] for each in metrics.read(tmp_path)] == [1]


@pytest.fixture
def text_config(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("".join(f"{i} times {i} is {i * i}.\n" for i in range(300)))
    return run_config(data=DataConfig(kind="text", path=str(text), tokenizer="bytes"))


@pytest.mark.slow
def test_a_full_disk_under_a_run(tmp_path, text_config):
    """Wherever it strikes, one sentence; with space again the same command goes on."""
    run = tmp_path / "run"
    loop.train(text_config, run, steps=1)
    for size in (0, 40, 300, 1000, 3000, 6000, 20_000):
        with full_after(size), pytest.raises(InputError, match="space|mend"):
            loop.train(text_config, run)
    assert loop.train(text_config, run).step == 4
    assert [line["step"] for line in metrics.read(run)] == [1, 2, 3, 4]


def failing(name, patch):
    """Has writing one kind of file raise what a full disk raises."""

    def fail(*_args, **_named):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def write(path, content):
        (fail if path.name == name else atomic.write_atomically)(path, content)

    patch.setattr(run_files, "write_atomically", write)
    if name == "metrics.jsonl":
        patch.setattr(metrics, "append", fail)
    elif name == "events":
        patch.setattr(events.EventFile, "write", fail)
    elif name == "model":
        patch.setattr(loop.export.checkpoint, "save_official", fail)


@pytest.mark.slow
def test_a_disk_that_is_full_at_each_kind_of_file(tmp_path, text_config, monkeypatch):
    """Raised by the system's own calls, where the limit of the other test does not reach."""
    for name in ("config.json", "tokenizer.json", "metrics.jsonl", "events", "model"):
        sentence = "cannot be written .No space left on device.; .*free"
        with monkeypatch.context() as patch, pytest.raises(InputError, match=sentence):
            failing(name, patch)
            loop.train(text_config, tmp_path / "run")
    assert loop.train(text_config, tmp_path / "run").step == 4
    assert (tmp_path / "run" / "model").is_dir()
