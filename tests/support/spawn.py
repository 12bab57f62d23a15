"""Several processes of one program on this machine, for tests; each with CPU devices of its own."""

import contextlib
import dataclasses
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

_RUN = """
import sys
from tests.support import spawn
spawn.enter(*sys.argv[1:])
"""


@dataclasses.dataclass(frozen=True)
class Ended:
    """How one process ended; `seconds` after the start of all, None if it had to be killed."""

    status: int | None
    seconds: float
    stdout: str
    stderr: str


def kill_at(lines: int, path: Path, command: Sequence[str], **options) -> None:
    """Starts a command, and kills it once a file has so many lines; a minute at most."""
    child = subprocess.Popen(command, **options)
    until = time.monotonic() + 60
    while time.monotonic() < until and child.poll() is None:
        if path.exists() and path.read_bytes().count(b"\n") >= lines:
            break
        time.sleep(0.001)
    child.send_signal(signal.SIGKILL)
    child.wait()


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def run_command(arguments: Sequence[str], processes: int, **options) -> list[Ended]:
    """`v4jax ARGUMENTS` in so many processes, with the flags that join them."""
    address = f"127.0.0.1:{free_port()}"

    def command(process):
        joining = [f"--coordinator={address}", f"--num_processes={processes}"]
        joining.append(f"--process_id={process}")
        return [sys.executable, "-m", "v4jax.cli.main", *arguments, *joining]

    return run(command, processes, **options)


def run_function(
    name: str, processes: int, *arguments: str, heartbeat: int = 10, **options
) -> list[Ended]:
    """`module:function` with string arguments, in so many joined processes."""
    address = f"127.0.0.1:{free_port()}"

    def command(process):
        joining = [address, str(processes), str(process), str(heartbeat)]
        return [sys.executable, "-c", _RUN, name, *joining, *arguments]

    return run(command, processes, **options)


def enter(name, address, processes, process, heartbeat, *arguments):
    """What a process of `run_function` does."""
    import importlib

    from v4jax.sharding.processes import joined

    module, _, function = name.partition(":")
    with joined(address, int(processes), int(process), wait=60, heartbeat=int(heartbeat)):
        getattr(importlib.import_module(module), function)(*arguments)


def run(
    command: Callable[[int], Sequence[str]],
    processes: int,
    devices: int = 2,
    timeout: float = 240,
    environment: dict[str, str] | None = None,
) -> list[Ended]:
    """Starts `command(process)` for each and waits for all; kills those that outlive `timeout`."""
    flags = f"--xla_force_host_platform_device_count={devices}"
    variables = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags} | (environment or {})
    started = time.monotonic()
    with contextlib.ExitStack() as stack:
        files = [
            tuple(stack.enter_context(tempfile.TemporaryFile("w+")) for _ in range(2))
            for _ in range(processes)
        ]
        running = [
            subprocess.Popen(command(i), stdout=out, stderr=err, env=variables)
            for i, (out, err) in enumerate(files)
        ]
        ends = _wait(running, started, timeout)
        return [Ended(*ends[i], *map(_text, files[i])) for i in range(processes)]


def _wait(running, started, timeout):
    """Status and seconds of each process."""
    ends: dict[int, tuple[int | None, float]] = {}
    while len(ends) < len(running) and time.monotonic() - started < timeout:
        for i, process in enumerate(running):
            if i not in ends and process.poll() is not None:
                ends[i] = (process.returncode, time.monotonic() - started)
        time.sleep(0.05)
    for i, process in enumerate(running):
        if i not in ends:
            process.kill()
            process.wait()
            ends[i] = (None, timeout)
    return ends


def _text(file):
    file.seek(0)
    return file.read()
