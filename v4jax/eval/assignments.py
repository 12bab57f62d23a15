"""A suite's jobs done by workers elsewhere: they make the samples themselves, by the same seed."""

import dataclasses
import threading
from collections.abc import Callable, Sequence
from typing import Any

from v4jax.eval.descriptions import Description
from v4jax.eval.fit import NotPossible
from v4jax.eval.records import Key, Records
from v4jax.eval.suite import Job, Target
from v4jax.eval.suites import ALONE, SUITES, Settings
from v4jax.workers.crew import Crew

_FIELDS, _SKIPPED = "fields", "skipped"


@dataclasses.dataclass(frozen=True)
class Assignment:
    """One job, by what makes it: a worker has the same tasks and scores."""

    target: Description
    part: str
    settings: Settings
    key: Key

    def __str__(self) -> str:
        task, length, sample = self.key
        return f"sample {sample} of {task} at {length} tokens"


class Evaluator:
    """A worker's side: does assignments, several at a time if need be.

    A target is opened when it is first asked, and its programs are compiled then.
    """

    def __init__(self) -> None:
        self._targets: dict[Description, Any] = {}
        self._jobs: dict[tuple[str, Settings], dict[Key, Job]] = {}
        self._lock = threading.Lock()

    def __call__(self, assignment: Assignment) -> tuple[str, Any]:
        with self._lock:
            target, job = self._target(assignment), self._job(assignment)
        try:
            return _FIELDS, job.run(target)
        except NotPossible as error:
            return _SKIPPED, str(error)

    def _target(self, assignment) -> Target:
        described = assignment.target
        if described not in self._targets:
            self._targets[described] = described.open()
        target = self._targets[described]
        if assignment.part not in ALONE:  # those choose for themselves how many they ask at once
            target.resize(getattr(described, "slots", 1))
            target.warm_up()
        return target

    def _job(self, assignment):
        jobs = assignment.part, assignment.settings
        if jobs not in self._jobs:
            made = SUITES[assignment.part](assignment.settings)
            self._jobs[jobs] = {job.key: job for job in made}
        return self._jobs[jobs][assignment.key]


def run(
    assignments: Sequence[Assignment],
    crew: Crew,
    records: Records,
    progress: Callable[[dict[str, Any]], None] = lambda record: None,
    deadline: float | None = None,
    skip: Callable[[str], None] = lambda sentence: None,
) -> int:
    """As `suite.run`, by a crew of `Evaluator`s; the records are written here.

    Raises:
      InputError: the first job that failed, or no worker is left; what was done is recorded.
    """
    left = [each for each in assignments if each.key not in records.done]

    def done(assignment, value):
        kind, found = value
        if kind == _SKIPPED:
            skip(found)
        elif assignment.key not in records.done:
            task, length, sample = assignment.key
            record = {"task": task, "length": length, "sample": sample, **found}
            records.add(record)
            progress(record)

    alone = any(each.part in ALONE for each in left)
    return crew.run(left, done, deadline, alone)
