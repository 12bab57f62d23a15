"""The suites by name, and what each has to do."""

import dataclasses
import difflib
import math
from collections.abc import Callable, Iterable, Sequence

from v4jax.errors import InputError
from v4jax.eval import aggregation, cost, graphwalks, latency, mrcr, needle, probes, ruler, tool_use
from v4jax.eval.sample import Task
from v4jax.eval.suite import Job, jobs_of

VERSION = 1  # of the tasks; a new one makes other samples of the same seed


@dataclasses.dataclass(frozen=True)
class Settings:
    """What a user chose.

    Attributes:
      lengths: tokens of prompt and answer. samples: of each task and length.
      tasks: names; empty: all of the suite. style: of the target.
      trials: of each conversation with tools, at this temperature.
      attempts: at a task whose cost is measured. loads: requests at once, for latency.
      scoring: "published" for GraphWalks as its published code scores.
      spread: all lengths and depths come early, for a run that may be cut short.
    """

    lengths: tuple[int, ...]
    samples: int
    seed: int = 0
    style: str = "plain"
    tasks: tuple[str, ...] = ()
    trials: int = 4
    temperature: float = tool_use.TEMPERATURE
    attempts: int = cost.ATTEMPTS
    loads: tuple[int, ...] = latency.CONCURRENCY
    scoring: str = "ours"
    spread: bool = False

    def __post_init__(self):
        if not self.lengths:
            raise InputError("lengths is empty; expected numbers such as 512,1024")
        for name, least, values in (
            ("a length", 1, self.lengths),
            ("samples", 1, (self.samples,)),
            ("trials", 1, (self.trials,)),
            ("attempts", 1, (self.attempts,)),
            ("a load", 1, self.loads),
        ):
            for value in values:
                if value < least:
                    raise InputError(f"{name} is {value}; expected {least} or more")
        if not 0 <= self.seed < 2**32:
            raise InputError(f"seed is {self.seed}; expected 0 to 2^32 - 1")
        if not 0 <= self.temperature < math.inf:
            raise InputError(f"temperature is {self.temperature}; expected 0 or more")


def _questions(make: Callable[[Settings], Sequence[Task]]) -> Callable[[Settings], list[Job]]:
    """The jobs of a suite of tasks that are one question each."""

    def jobs(settings):
        return [
            job
            for task in chosen(make(settings), settings.tasks)
            for job in jobs_of(
                task, settings.lengths, settings.samples, settings.seed, settings.spread
            )
        ]

    return jobs


def chosen(tasks: Sequence[Task], names: Sequence[str]) -> list[Task]:
    """The tasks of those names; of no name: all.

    Raises:
      InputError: a name that none has.
    """
    known = {task.name: task for task in tasks}
    for name in names:
        _check_task(name, known)
    return [known[name] for name in names] if names else list(tasks)


def _check_task(name, known: Iterable[str]):
    known = list(dict.fromkeys(known))
    if name not in known:
        raise InputError(
            f"there is no task {name[:100]!r} in this suite{_near(name, known)}; expected one of "
            f"{', '.join(known)}"
        )


def _only(jobs: list[Job], settings: Settings) -> list[Job]:
    """The jobs of the tasks that are wanted."""
    for name in settings.tasks:
        _check_task(name, (job.task for job in jobs))
    return [job for job in jobs if not settings.tasks or job.task in settings.tasks]


def _tools(settings):
    jobs = tool_use.jobs(
        settings.seed, settings.samples, settings.trials, settings.temperature, settings.style
    )
    return _only(jobs, settings)


def _latency(settings):
    return _only(latency.jobs(settings.seed, settings.lengths, settings.loads), settings)


def _probes(settings):
    jobs = probes.jobs(settings.seed, settings.lengths, settings.samples, settings.style)
    return _only(jobs, settings)


def _cost(settings):
    """The needle and questions over documents: what people pay long prompts for."""
    tasks = [needle.task(settings.style), *(t for t in ruler.tasks() if t.name == "documents")]
    if settings.style == "facts":
        tasks = tasks[:1]
    jobs = cost.jobs(tasks, settings.lengths, settings.samples, settings.seed, settings.attempts)
    return _only(jobs, settings)


SUITES: dict[str, Callable[[Settings], list[Job]]] = {
    "needle": _questions(lambda settings: [needle.task(settings.style)]),
    "ruler": _questions(lambda settings: ruler.tasks()),
    "mrcr": _questions(lambda settings: [mrcr.task(n) for n in mrcr.NEEDLES]),
    "graphwalks": _questions(lambda settings: graphwalks.tasks(settings.scoring)),
    "aggregation": _questions(lambda settings: aggregation.tasks()),
    "tools": _tools,
    "latency": _latency,
    "cost": _cost,
    "probes": _probes,
}
SERVED = ("tools", "controls")  # suites that ask a server
ALONE = ("latency",)  # suites that measure, so that nothing may run beside a sample of theirs
NAMES = (*SUITES, "controls", "five")
LENGTHS = {
    "needle": (512, 1024, 2048, 4096),
    "latency": (1024, 4096, 16384, 65536),
    "probes": (1024,),
    "cost": (1024, 4096),
}
DEFAULT_LENGTHS = (2048, 4096, 8192)


def check_name(name: str) -> None:
    """Raises `InputError` where no suite has this name."""
    if name not in NAMES:
        raise InputError(
            f"there is no suite {name[:100]!r}{_near(name, (*NAMES, 'compare'))}; expected one of "
            f"{', '.join(NAMES)}, or compare"
        )


def _near(name, known):
    near = difflib.get_close_matches(name[:100], list(known), n=1)
    return f", maybe {near[0]}" if near else ""
