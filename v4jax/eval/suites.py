"""The suites by name, and what each has to do."""

import dataclasses
import difflib
from collections.abc import Callable, Sequence

from v4jax.errors import InputError
from v4jax.eval import needle
from v4jax.eval.sample import Task
from v4jax.eval.suite import Job, jobs_of

VERSION = 1  # of the tasks; a new one makes other samples of the same seed


@dataclasses.dataclass(frozen=True)
class Settings:
    """What a user chose.

    Attributes:
      lengths: tokens of prompt and answer. samples: of each task and length.
      tasks: names; empty: all of the suite. style: of the target.
    """

    lengths: tuple[int, ...]
    samples: int
    seed: int = 0
    style: str = "plain"
    tasks: tuple[str, ...] = ()

    def __post_init__(self):
        for length in self.lengths:
            if length < 1:
                raise InputError(f"a length is {length}; expected 1 token or more")
        if self.samples < 1:
            raise InputError(f"samples is {self.samples}; expected 1 or more")
        if not self.lengths:
            raise InputError("lengths is empty; expected numbers such as 512,1024")
        if not 0 <= self.seed < 2**32:
            raise InputError(f"seed is {self.seed}; expected 0 to 2^32 - 1")


def questions(make: Callable[[str], Sequence[Task]]) -> Callable[[Settings], list[Job]]:
    """The jobs of a suite of tasks that are one question each."""

    def jobs(settings):
        tasks = chosen(make(settings.style), settings.tasks)
        return [
            job
            for task in tasks
            for job in jobs_of(task, settings.lengths, settings.samples, settings.seed)
        ]

    return jobs


def chosen(tasks: Sequence[Task], names: Sequence[str]) -> list[Task]:
    """The tasks of those names.

    Raises:
      InputError: a name that none has.
    """
    known = {task.name: task for task in tasks}
    for name in names:
        if name not in known:
            raise InputError(
                f"there is no task {name[:100]!r} in this suite{_near(name, known)}; expected one "
                f"of {', '.join(known)}"
            )
    return [known[name] for name in names] if names else list(tasks)


SUITES: dict[str, Callable[[Settings], list[Job]]] = {
    "needle": questions(lambda style: [needle.task(style)]),
}


def find(name: str) -> Callable[[Settings], list[Job]]:
    """A suite's jobs, given settings.

    Raises:
      InputError: no suite of that name.
    """
    if name not in SUITES:
        raise InputError(
            f"there is no suite {name[:100]!r}{_near(name, SUITES)}; expected one of "
            f"{', '.join(SUITES)}, or compare"
        )
    return SUITES[name]


def _near(name, known):
    near = difflib.get_close_matches(name[:100], known, n=1)
    return f", maybe {near[0]}" if near else ""
