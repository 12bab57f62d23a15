"""`v4jax generate --stream_weights`: the same text, its progress and what it refuses."""

import io
import re
import sys
import types

import pytest

from v4jax.cli import streaming
from v4jax.cli.main import main


def generate(capsys, *args):
    status = main(["v4jax", "generate", "--prompt=def area(", "--max_new_tokens=8", *args])
    return (status, *capsys.readouterr())


def test_prints_the_same_as_the_model_in_memory(capsys):
    status, out, err = generate(capsys, "--stream_weights")
    assert status == 0
    said, *_, summary = err.splitlines()  # on a busy machine a line of progress between them
    assert re.fullmatch(r"nano: 5 layers read as needed from \d+\.\d\d MB on disk", said)
    assert "8 new tokens" in summary
    assert generate(capsys)[1] == out


def test_runs_the_first_layers(capsys):
    status, out, err = generate(capsys, "--stream_weights", "--layers=1", "--format=json")
    assert status == 0 and out.startswith("{")
    assert "nano: 1 layers read as needed" in err


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--stream_weights", "--layers=0"], "--layers is 0; expected 1 to 5, the layers of the"),
        (["--stream_weights", "--layers=6"], "--layers is 6; expected 1 to 5"),
        (["--layers=2"], "--layers is 2 without --stream_weights"),
        (["--stream_weights", "--draft=mtp"], "--stream_weights came with --draft"),
        (["--stream_weights", "--prefix_cache=x"], "--stream_weights came with --prefix_cache"),
        (["--stream_weights", "--mesh=expert=2"], "--stream_weights came with --mesh=expert=2"),
    ],
)
def test_refuses(capsys, args, message):
    status, out, err = generate(capsys, *args)
    assert (status, out) == (2, "")
    assert message in err.splitlines()[-1]


@pytest.fixture
def clock(monkeypatch):
    """A clock that a test sets."""
    clock = types.SimpleNamespace(now=100.0)
    monkeypatch.setattr(streaming.time, "perf_counter", lambda: clock.now)
    return clock


def told(monkeypatch, terminal):
    err = io.StringIO()
    err.isatty = lambda: terminal
    monkeypatch.setattr(sys, "stderr", err)
    return err


def test_progress_has_the_rate_and_the_time_left(monkeypatch, clock):
    err, meter = told(monkeypatch, terminal=True), types.SimpleNamespace(bytes=0)
    progress = streaming.Progress(meter, layers=4, chunks=2, steps=3)
    for layer in (0, 1, 2, 3, 0, 1):
        clock.now += 10
        meter.bytes += 10**9
        progress.layer(layer, None)
    lines = [line for line in err.getvalue().replace("\033[K", "").split("\r") if line]
    assert lines[0] == "prompt, part 1 of 2: layer 1 of 4, read 1.00 GB at 100.00 MB/s, 1:10 left"
    assert lines[-1] == "prompt, part 2 of 2: layer 2 of 4, read 6.00 GB at 100.00 MB/s, 0:20 left"
    # Tokens behind the prompt have a pace of their own: 2 s a layer.
    for layer in (2, 3):
        progress.layer(layer, None)
    clock.now += 2
    progress.layer(0, None)
    last = err.getvalue().replace("\033[K", "").split("\r")[-1]
    assert last.startswith("token 2 of at most 4: layer 1 of 4, read 6.00 GB at")
    assert last.endswith("0:22 left at most")


def test_elsewhere_progress_is_a_line_now_and_then(monkeypatch, clock):
    err, meter = told(monkeypatch, terminal=False), types.SimpleNamespace(bytes=10**9)
    progress = streaming.Progress(meter, layers=8, chunks=1, steps=0)
    for layer in range(8):
        clock.now += 10
        progress.layer(layer, None)
    assert [line.split(",")[1] for line in err.getvalue().splitlines()] == [
        " part 1 of 1: layer 3 of 8",
        " part 1 of 1: layer 6 of 8",
    ]
