"""A child ends with its parent, also with one that is killed."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from v4jax import lifeline

ROOT = Path(__file__).resolve().parents[1]
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT)}

PARENT = """
import subprocess, sys, time
from v4jax.lifeline import Child
child = Child({command!r}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
other = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(20)"])  # holds no end
print(child.pid, other.pid, flush=True)
time.sleep(60)
"""
SLEEPER = [
    sys.executable,
    "-c",
    "import os, time; from v4jax.lifeline import VARIABLE, watch; watch();"
    "assert VARIABLE not in os.environ; time.sleep(60)",
]
SERVER = [sys.executable, "-m", "v4jax", "serve", "--checkpoint=nano", "--port=0"]


def runs(pid):
    """Whether a process is there that is no zombie."""
    done = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True)
    return done.stdout.strip()[:1] not in ("", "Z")


def wait_until(condition, seconds=30):
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.02)


@pytest.mark.parametrize("command", [SLEEPER, SERVER], ids=["watching", "v4jax serve"])
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_parent_takes_its_child_along(command, number):
    script = PARENT.format(command=command)
    parent = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, env=ENVIRONMENT
    )
    child, other = map(int, parent.stdout.readline().split())
    try:
        assert runs(child)
        parent.send_signal(number)
        parent.wait()
        wait_until(lambda: not runs(child))
    finally:
        os.kill(other, signal.SIGKILL)


def test_a_child_runs_as_long_as_its_parent_wants():
    command = [sys.executable, "-c", "from v4jax.lifeline import watch; watch(); print(7)"]
    child = lifeline.Child(command, ENVIRONMENT, stdout=subprocess.PIPE, text=True)
    assert child.communicate(timeout=60)[0] == "7\n" and child.returncode == 0


def test_nobody_is_watched_for_nothing(monkeypatch):
    lifeline.watch()
    file = os.open(os.devnull, os.O_RDONLY)
    for value in ("", "x", "987654", str(file)):  # no pipe of ours
        monkeypatch.setenv(lifeline.VARIABLE, value)
        lifeline.watch()
        assert lifeline.VARIABLE not in os.environ
    os.close(file)
