"""Workers that are Ray actors, on whatever machines a cluster has.

v4jax has to be installed on each of them, and checkpoints have to lie at the same paths.
"""

import os
import socket
import time
from collections.abc import Iterator, Mapping
from typing import Any

from v4jax.errors import InputError
from v4jax.extras import require
from v4jax.workers.outcome import outcome_of
from v4jax.workers.pool import Done, Event, Gone, Make, Ready

EXTRA = "ray"
_PASSED_ON = ("JAX_", "XLA_")  # variables that an actor has as this process has them
_CONNECT_SECONDS = 10.0
_CPU, _GPU = "CPU", "GPU"


class RayPool:
    """Actors of the cluster that is there (RAY_ADDRESS, else one begun on this machine by
    `ray start`), else of one that is made here for as long as this process runs.

    An actor that cannot be reached any more counts as ended: what it goes on doing is not counted.

    Args:
      make: pickled into each actor. count: of workers. many: tasks that one has at a time.
      resources: of each worker, in Ray's names: {"CPU": 4.0, "GPU": 1.0}; None: a core.

    Raises:
      InputError: Ray is not installed or not reached, or no cluster of its size can have them.
    """

    def __init__(
        self,
        make: Make,
        count: int,
        many: int = 1,
        resources: Mapping[str, float] | None = None,
    ):
        require("ray", EXTRA, "--executor ray")
        if count < 1 or many < 1:
            raise InputError(f"{count} workers with {many} tasks each; expected 1 or more of both")
        self._ray = _connected()
        self.count, self.many = count, many
        needed = dict(resources or {_CPU: 1.0})
        _check_resources(self._ray.cluster_resources(), needed)
        actor = self._ray.remote(_Actor).options(
            num_cpus=needed.pop(_CPU, 0),
            num_gpus=needed.pop(_GPU, 0),
            resources=needed,
            max_concurrency=many,
            max_restarts=0,
            max_task_retries=0,
        )
        environment = {k: v for k, v in os.environ.items() if k.startswith(_PASSED_ON)}
        self._actors = [actor.remote(make, environment) for _ in range(count)]
        self._gone: set[int] = set()
        # What is awaited: worker, and the task's number; None: that the worker is ready.
        self._refs: dict[Any, tuple[int, int | None]] = {
            actor.ready.remote(): (worker, None) for worker, actor in enumerate(self._actors)
        }

    def give(self, worker: int, number: int, task: Any) -> None:
        """See `Pool`."""
        self._refs[self._actors[worker].do.remote(task)] = worker, number

    def events(self, timeout: float) -> Iterator[Event]:
        """See `Pool`."""
        if not self._refs:
            time.sleep(timeout)
            return
        found, _ = self._ray.wait(list(self._refs), num_returns=1, timeout=timeout)
        for ref in found:
            worker, number = self._refs.pop(ref)
            try:
                value = self._ray.get(ref)
            except self._ray.exceptions.RayError as error:
                if worker not in self._gone:
                    self._gone.add(worker)
                    self._ray.kill(self._actors[worker])  # if it is there and only out of reach
                    yield Gone(worker, _why(error))
                continue
            if worker not in self._gone:
                yield Ready(worker) if number is None else Done(worker, number, value)

    def close(self) -> None:
        """See `Pool`. The connection to the cluster stays, which ends with this process."""
        for actor in self._actors:
            self._ray.kill(actor)
        self._refs.clear()


class _Actor:
    """What runs in the cluster."""

    def __init__(self, make, environment):
        os.environ.update(environment)
        self._do = make()

    def ready(self):
        return True

    def do(self, task):
        return outcome_of(self._do, task)


def _connected():
    """The module, connected to a cluster."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # reports go to its makers otherwise
    import ray

    if not ray.is_initialized():
        address = os.environ.get("RAY_ADDRESS", "the one on this machine")
        try:
            _check_reachable(os.environ.get("RAY_ADDRESS", ""))
            ray.init(log_to_driver=False, logging_level="ERROR", include_dashboard=False)
        except (OSError, RuntimeError, ValueError) as error:
            raise InputError(
                f"the Ray cluster ({address[:200]}) cannot be reached: {str(error)[:200]}; start "
                "one with `ray start --head`, or set RAY_ADDRESS"
            ) from error
    return ray


def _check_reachable(address):
    """Raises `OSError` at once where nothing listens; Ray would try for five minutes."""
    host, _, port = address.rpartition(":")
    if port.isdecimal() and "/" not in host:
        socket.create_connection((host, int(port)), _CONNECT_SECONDS).close()


def _check_resources(there, needed):
    for name, amount in needed.items():
        if there.get(name, 0) < amount:
            raise InputError(
                f"a worker is to have {amount:g} {name}, and the whole Ray cluster has "
                f"{there.get(name, 0):g}; expected less in --worker_resources, or more machines"
            )


def _why(error) -> str:
    """How a worker ended, as the end of a sentence."""
    kind, said = type(error).__name__, str(error)
    if "OutOfMemory" in kind or "OutOfMemory" in said or "memory pressure" in said:
        return "was ended by Ray, since its machine ran out of memory"
    if "node" in said and ("has died" in said or "is dead" in said) and "node has died" in said:
        return "has ended with its machine"
    if kind == "ActorUnavailableError":
        return "cannot be reached any more"
    if kind in ("ActorDiedError", "RayActorError") and "creation task" not in said:
        return "has ended: its process was killed or has crashed"
    return f"has ended: {kind}, {_last_line(said)}"


def _last_line(text):
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:300] if lines else "nothing is said"
