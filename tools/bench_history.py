"""What a line of a benchmark's history says besides its numbers: which code, run how, and where."""

import importlib.metadata
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def origin():
    """Commit, command, time, machine and JAX of the run that asks.

    The commit ends in "+" where tracked files differ from it, and is "unknown" outside a clone.
    """
    command = shlex.join(["python", os.path.relpath(sys.argv[0], ROOT), *sys.argv[1:]])
    return {
        "commit": _git("describe", "--always", "--exclude=*", "--dirty=+") or "unknown",
        "command": command,
        "time": time.strftime("%Y-%m-%d %H:%M:%S"),
        "machine": f"{_processor()}, {os.cpu_count()} cores",
        "jax": importlib.metadata.version("jax"),
    }


def _git(*arguments):
    run = subprocess.run(
        ["git", "-C", ROOT, *arguments], capture_output=True, text=True, check=False
    )
    return run.stdout.strip()


def _processor():
    names = [
        line.partition(":")[2].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    ]
    return names[0] if names else os.uname().machine
