"""Tasks done by a pool's workers: each exactly once, also where workers end in the middle."""

import collections
import itertools
import time
from collections.abc import Callable, Sequence
from typing import Any

from v4jax.errors import InputError
from v4jax.workers.outcome import FAULT, VALUE, Outcome
from v4jax.workers.pool import Done, Event, Gone, Pool, Ready

TRIES = 3  # workers that may end while they have a task, before the task is blamed
PATIENCE = 20.0  # seconds without any worker after which the user is told
_TICK = 0.5
_REST = "what is done is kept: run the same command again for the rest"


class Crew:
    """A pool's workers, from one list of tasks to the next.

    Args:
      tell: called with a sentence that the user should know.

    Attributes:
      alive: numbers of the workers that have started and not ended.
    """

    def __init__(self, pool: Pool, tell: Callable[[str], None] = lambda sentence: None):
        self._pool, self._tell = pool, tell
        self._numbers = itertools.count()
        self._lost: dict[int, str] = {}
        self.alive: set[int] = set()

    def run(
        self,
        tasks: Sequence[Any],
        done: Callable[[Any, Any], None],
        deadline: float | None = None,
        alone: bool = False,
        name: Callable[[Any], str] = str,
    ) -> int:
        """Has tasks done, begun in their order; how many were left for want of time.

        The tasks of a worker that has ended are given to others. What a task gives is counted when
        it comes; nothing comes from a worker that has ended.

        Args:
          done: called here, in one thread, with each task and what it gave.
          deadline: of `time.monotonic`: no task begins after it; None: all are done.
          alone: one task at a time, of one worker, with nothing beside it.
          name: of a task, for sentences.

        Raises:
          InputError: what a task raised, once those under way have ended; or no worker is left; or
            a task was under way each time that several workers ended.
          RuntimeError: a fault of a task's code, with the worker's traceback.
        """
        shift = _Shift(self, self._pool, tasks, done, deadline, alone, name)
        return shift.run()

    def take(self, event: Event) -> None:
        """Keeps who is there; says who has gone."""
        if isinstance(event, Ready):
            self.alive.add(event.worker)
        elif isinstance(event, Gone):
            self.alive.discard(event.worker)
            self._lost[event.worker] = event.why

    def say(self, sentence: str) -> None:
        self._tell(sentence)

    def next_number(self) -> int:
        return next(self._numbers)

    def check_any_left(self) -> None:
        """Raises `InputError` where all workers have ended."""
        if len(self._lost) == self._pool.count:
            worker, why = list(self._lost.items())[-1]
            raise InputError(
                f"no worker is left: of {self._pool.count} the last, worker {worker + 1}, {why}; "
                f"{_REST}, perhaps with fewer --workers or less --concurrency"
            )

    def close(self) -> None:
        """Ends all workers."""
        self._pool.close()

    def __enter__(self) -> "Crew":
        return self

    def __exit__(self, *error) -> None:
        self.close()


class _Shift:
    """One list of tasks under way."""

    def __init__(self, crew, pool, tasks, done, deadline, alone, name):
        self._crew, self._pool, self._tasks, self._done = crew, pool, tasks, done
        self._deadline, self._alone, self._name = deadline, alone, name
        self._waiting = collections.deque(range(len(tasks)))
        self._flying: dict[int, tuple[int, int]] = {}  # number -> worker, place in the list
        self._ended: collections.Counter[int] = collections.Counter()  # by place in the list
        self._error: Exception | None = None

    def run(self) -> int:
        since, told = time.monotonic(), False
        while True:
            if self._may_begin():
                self._hand_out()
            if not self._flying and not (self._waiting and self._may_begin()):
                break
            self._crew.check_any_left()
            for event in self._pool.events(_TICK):
                self._take(event)
            if not (self._crew.alive or told) and time.monotonic() - since > PATIENCE:
                self._crew.say(f"none of {self._pool.count} workers has started yet; waiting")
                told = True
        if self._error is not None:
            raise self._error
        return len(self._waiting)

    def _may_begin(self):
        late = self._deadline is not None and time.monotonic() >= self._deadline
        return self._error is None and not late

    def _hand_out(self):
        """Gives waiting tasks to those who have the least to do."""
        load = dict.fromkeys(sorted(self._crew.alive), 0)
        for worker, _ in self._flying.values():
            load[worker] += 1
        most, together = (1, 1) if self._alone else (self._pool.many, len(load) * self._pool.many)
        while self._waiting and load and len(self._flying) < together:
            worker = min(load, key=lambda each: load[each])
            if load[worker] >= most:
                return
            number, place = self._crew.next_number(), self._waiting.popleft()
            self._flying[number] = worker, place
            load[worker] += 1
            self._pool.give(worker, number, self._tasks[place])

    def _take(self, event):
        self._crew.take(event)
        if isinstance(event, Done) and event.number in self._flying:
            _, place = self._flying.pop(event.number)
            self._finish(place, event.outcome)
        elif isinstance(event, Gone):
            self._give_back(event)

    def _finish(self, place, outcome: Outcome):
        if outcome.kind == VALUE:
            self._done(self._tasks[place], outcome.value)
        elif self._error is None:
            wrong = RuntimeError if outcome.kind == FAULT else InputError
            self._error = wrong(outcome.value)

    def _give_back(self, event):
        """What a worker had goes to the front; a task that ends one worker after another stays."""
        mine = [number for number, (worker, _) in self._flying.items() if worker == event.worker]
        places = sorted(self._flying.pop(number)[1] for number in mine)
        self._waiting.extendleft(reversed(places))
        again = f"; what it had under way ({len(places)}) is done again by others" if places else ""
        self._crew.say(f"worker {event.worker + 1} {event.why}{again}")
        self._ended.update(places)
        if self._error is None and places and max(self._ended[each] for each in places) >= TRIES:
            worst = max(places, key=lambda each: self._ended[each])
            self._error = InputError(
                f"{self._name(self._tasks[worst])} was under way each time that {TRIES} workers "
                f"ended; the last one {event.why}; {_REST}, with fewer --workers, less "
                "--concurrency or shorter --lengths if memory ran out"
            )
