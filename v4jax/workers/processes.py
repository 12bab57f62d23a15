"""Workers that are processes of this machine, each on its part of the cores."""

import contextlib
import multiprocessing.connection
import os
import pickle
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

from v4jax.errors import InputError
from v4jax.workers.outcome import Outcome
from v4jax.workers.pool import Done, Event, Gone, Make, Ready

_GRACE = 5.0  # seconds that an ended worker's connection may outlive it, and the other way round


class ProcessPool:
    """Child processes; they end with this one, however it ends.

    Args:
      make: pickled into each child. count: of workers. many: tasks that one has at a time.
    """

    def __init__(self, make: Make, count: int, many: int = 1):
        if count < 1 or many < 1:
            raise InputError(f"{count} workers with {many} tasks each; expected 1 or more of both")
        self.count, self.many = count, many
        self._workers: dict[int, _Worker] = {}
        self._failed: list[int] = []  # to send to
        try:
            for number in range(count):
                self._workers[number] = _Worker(make, many, _cores(number, count))
        except BaseException:
            self.close()
            raise

    def give(self, worker: int, number: int, task: Any) -> None:
        """See `Pool`."""
        with contextlib.suppress(OSError):  # it has ended: its connection says so to `events`
            self._workers[worker].connection.send((number, task))

    def events(self, timeout: float) -> Iterator[Event]:
        """See `Pool`."""
        there: dict[Any, int] = {w.connection: number for number, w in self._workers.items()}
        for connection in multiprocessing.connection.wait(list(there), timeout):
            worker = there[connection]
            try:
                message = self._workers[worker].connection.recv()
            except (EOFError, OSError):
                yield Gone(worker, self._workers.pop(worker).ended())
                continue
            if message is None:
                yield Ready(worker)
            else:
                number, outcome = message
                yield Done(worker, number, Outcome(*outcome))

    def close(self) -> None:
        """See `Pool`."""
        for worker in self._workers.values():
            worker.end()
        self._workers.clear()

    @property
    def pids(self) -> list[int]:
        """Process ids of the workers that are there."""
        return [worker.process.pid for worker in self._workers.values()]


class _Worker:
    """A child and the connection to it."""

    def __init__(self, make, many, cores):
        ours, theirs = socket.socketpair()
        with theirs:
            command = [sys.executable, "-m", "v4jax.workers.child", str(theirs.fileno())]
            self.process = subprocess.Popen(
                command,
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=2,  # what is on stdout is the command's result
                env=os.environ | {"PYTHONPATH": os.pathsep.join(map(os.path.abspath, sys.path))},
            )
        self.connection = multiprocessing.connection.Connection(ours.detach())
        with contextlib.suppress(OSError):  # it has ended already
            self.connection.send_bytes(pickle.dumps((make, many, cores)))

    def ended(self) -> str:
        """How it ended, once its connection is closed."""
        self.connection.close()
        try:
            status = self.process.wait(_GRACE)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            return "has closed its connection"
        if status < 0:
            name = signal.Signals(-status).name
            memory = ", as the system does where memory runs out" if name == "SIGKILL" else ""
            return f"was killed ({name}{memory})"
        return f"has ended with status {status}"

    def end(self) -> None:
        self.connection.close()
        self.process.kill()
        self.process.wait()


def _cores(number, count):
    """A worker's part of the cores, None where they are not divided."""
    if not hasattr(os, "sched_getaffinity"):
        return None
    cores = sorted(os.sched_getaffinity(0))
    return cores[number::count] if 1 < count <= len(cores) else None
