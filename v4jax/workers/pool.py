"""What a pool of workers is, whatever they run on: processes of this machine, or a Ray cluster."""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, Protocol, runtime_checkable

from v4jax.workers.outcome import Outcome

Make = Callable[[], Callable[[Any], Any]]  # called in a worker; what it gives does the tasks


class Ready(NamedTuple):
    """A worker has started."""

    worker: int


class Done(NamedTuple):
    """A worker has done the task that it was given under this number."""

    worker: int
    number: int
    outcome: Outcome


class Gone(NamedTuple):
    """A worker has ended, and nothing more comes from it. why: how the sentence goes on."""

    worker: int
    why: str


Event = Ready | Done | Gone


@runtime_checkable
class Pool(Protocol):
    """Workers, numbered from 0, that are started when the pool is made.

    Attributes:
      count: of workers. many: tasks that one of them may have at a time.
    """

    count: int
    many: int

    def give(self, worker: int, number: int, task: Any) -> None:
        """Has a worker do a task, under a number that was never used. Tasks have to be picklable.

        A worker that has ended meanwhile says so by an event, and not here.
        """
        ...

    def events(self, timeout: float) -> Iterable[Event]:
        """What has happened; waits for so many seconds if nothing has."""
        ...

    def close(self) -> None:
        """Ends all workers, whatever they do."""
        ...
