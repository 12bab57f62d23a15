"""The tasks of two tiers by name, and what each sample of one has to do."""

import dataclasses
import difflib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from v4jax.errors import InputError
from v4jax.eval import tool_use
from v4jax.eval.dice import Dice
from v4jax.eval.extraction import PAIRS, SHEETS
from v4jax.eval.ledger import Course, Ledger, totals
from v4jax.eval.sample import Measure
from v4jax.eval.suite import Job, Target
from v4jax.eval.tier_documents import Documents, Remembered
from v4jax.eval.tier_tools import Tools
from v4jax.eval.tiers import Case, Outcome, reviewed

VERSION = 1  # of the tasks and the prompts; a new one makes other steps of the same seed
FORMS = ("json", "words")
Make = Callable[[int, int, int, Measure], tuple[Case, Any]]  # seed, number, length -> case, truth


def _sheets(seed, number, length, measure):
    sample = SHEETS.make(seed, number, length, None, measure)
    return Documents(SHEETS, sample, number * 100), sample.expected


def _pairs(seed, number, length, measure):
    sample = PAIRS.make(seed, number, length, None, measure)
    return Remembered(PAIRS, sample, number * 100), sample.expected


def _script(name: str, make: Callable[[Dice], tool_use.Script], agrees: bool) -> Make:
    def maker(seed, number, length, measure):
        script = make(Dice("tiers", name, seed, number))
        return Tools(script, number * 100, agrees), script.final

    return maker


def _chain(make, calls):
    return lambda dice: make(dice, calls)


# By form: what a chat model is asked, and the same in the words that nano's chat was trained on.
TASKS: dict[str, dict[str, Make]] = {
    "json": {
        "extraction": _sheets,
        "single": _script("single", tool_use.single, False),
        "refuse": _script("refuse", tool_use.refusal, False),
        "chain_3": _script("chain_3", _chain(tool_use.chain, 3), False),
        "chain_5": _script("chain_5", _chain(tool_use.chain, 5), False),
    },
    "words": {
        "extraction": _pairs,
        "single": _script("single", tool_use.looked_up, True),
        "refuse": _script("refuse", tool_use.declined, True),
        "chain_3": _script("chain_3", _chain(tool_use.followed, 3), True),
        "chain_5": _script("chain_5", _chain(tool_use.followed, 5), True),
    },
}
NAMES = tuple(TASKS["json"])
WITH_LENGTH = ("extraction",)  # the others are as long as their scripts
# Where the worker alone does other than draft: it answers from the text, and quotes nothing.
_OWN_WAY = (("json", "extraction"),)


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a run is to do.

    Attributes:
      form: "json" or "words". tasks: names. lengths: of tasks that have one.
      samples: of each task and length. revisions: at most, of each draft.
    """

    form: str
    tasks: tuple[str, ...]
    lengths: tuple[int, ...]
    samples: int
    seed: int
    revisions: int

    def every_sample(self) -> list[tuple[str, int, int]]:
        """Task, length (0 where it has none) and number of every sample."""
        return [
            (task, length, number)
            for task in self.tasks
            for length in (self.lengths if task in WITH_LENGTH else (0,))
            for number in range(self.samples)
        ]


def check_names(names: Sequence[str]) -> None:
    """Raises `InputError` where there are none, or one is of no task."""
    if not names:
        raise InputError(f"tasks is empty; expected some of {', '.join(NAMES)}")
    for name in names:
        if name not in NAMES:
            near = difflib.get_close_matches(name[:100], NAMES, n=1)
            raise InputError(
                f"there is no task {name[:100]!r} of two tiers"
                f"{f', maybe {near[0]}' if near else ''}; expected some of {', '.join(NAMES)}"
            )
        if names.count(name) > 1:
            raise InputError(f"the task {name} is named twice; expected each once")


def has_own_way(form: str, task: str) -> bool:
    """Whether the worker alone does another thing than draft, and so is a course of its own."""
    return (form, task) in _OWN_WAY


class Table:
    """Both tiers at work on a plan: its ledger and who plays which role."""

    def __init__(self, plan: Plan, ledger: Ledger, worker: Target, reviewer: Target):
        self.plan, self._ledger = plan, ledger
        self._targets = {"worker": worker, "reviewer": reviewer}

    def job(self, key: tuple[str, int, int], course: str) -> Job:
        """A sample's way through a course, as a record.

        "worker" and "reviewer": each alone. "draft": the worker's draft with its quotes.
        "reviewed": what becomes of that draft under review.
        """
        task, length, number = key
        return Job(f"{task}/{course}", length, number, lambda target: self._run(key, course))

    def _run(self, key, name):
        task, length, number = key
        case, expected = TASKS[self.plan.form][task](self.plan.seed, number, length, self._measure)
        # A draft is made once, and is the beginning of what it becomes under review.
        course = Course(
            self._ledger, key, "both" if name in ("draft", "reviewed") else name, self._targets
        )
        outcome, confidence = self._outcome(case, course, name)
        return record_of(self.plan.seed, course, outcome, expected) | confidence

    def _outcome(self, case: Case, course: Course, name: str) -> tuple[Outcome, dict[str, float]]:
        if name in ("worker", "reviewer"):
            return case.alone(course, name), {}
        draft = case.draft(course, (), None, 0)
        confidence = {"confidence": draft.confidence}
        if name == "draft":
            return Outcome(draft.text, draft.scores, "worker"), confidence
        return reviewed(course, case, draft, self.plan.revisions), confidence

    def _measure(self, prompt):
        """Tokens of a prompt as the tier counts it that needs more of them."""
        return max(target.measure(prompt) for target in self._targets.values())


def record_of(seed: int, course: Course, outcome: Outcome, expected: Any) -> dict[str, Any]:
    """The fields of a record of one course."""
    by_role = totals(course.lines)
    every: Mapping[str, Any] = {
        name: round(sum(each[name] for each in by_role.values()), 6) for name in by_role["worker"]
    }
    return {
        "seed": seed,
        "depth": None,
        **every,
        "first_token_seconds": None,
        "by_role": by_role,
        "steps": len(course.lines),
        "errors": sum("error" in line for line in course.lines),
        "invalid": sum(line["verdict"] == "invalid" for line in course.lines),
        "by": outcome.by,
        "attempts": outcome.attempts,
        "reviews": outcome.reviews,
        "answer": outcome.text,
        "expected": expected,
        **outcome.scores,
    }
