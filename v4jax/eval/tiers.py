"""Two tiers: a cheap worker drafts, a strong reviewer judges, revises, or answers itself.

The worker extracts quotes and drafts. What can be checked without a model is checked first: a draft
that no quote of the text supports goes back at once. The reviewer sees the task, the quotes and the
draft, and not the text. After so many revisions it answers itself, and then reads the text.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

from v4jax.errors import InputError
from v4jax.eval.ledger import Course
from v4jax.eval.verdicts import INVALID, Verdict

REVISIONS = 2
NO_QUOTE = "None of your quotes is in the text. Copy them word for word."
NO_ANSWER = "There was no answer."


@dataclasses.dataclass(frozen=True)
class Draft:
    """What the worker made of a task.

    Attributes:
      text: its answer. scores: of it; "score" is 1 for a task that is solved.
      evidence: what the reviewer sees of the source: quotes, or calls with their results.
      confidence: 0 to 1, from what can be checked without a model; see docs/tiers.md.
      problem: why no reviewer need look at it, or "".
    """

    text: str
    scores: Mapping[str, float]
    evidence: Any
    confidence: float
    problem: str = ""


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a task ended.

    Attributes:
      by: whose answer it is: "worker", "review" (a reviewer's own words for the draft) or
        "reviewer" (which did the task itself).
      attempts: drafts, and the reviewer's own answer. reviews: verdicts that were asked for.
    """

    text: str
    scores: Mapping[str, float]
    by: str
    attempts: int = 1
    reviews: int = 0


@runtime_checkable
class Case(Protocol):
    """A task as both tiers do it; what it asks goes through a `Course`."""

    def draft(
        self, course: Course, issues: Sequence[str], before: Draft | None, round: int
    ) -> Draft:
        """The worker's draft.

        Args:
          issues: what was wrong with the last one. before: that one, where it is to be revised;
            None: all is done anew. round: how many drafts there were.
        """
        ...

    def review(self, course: Course, draft: Draft, problem: str, round: int) -> Verdict:
        """The reviewer's verdict; problem: why its last one could not be read, or ""."""
        ...

    def corrected(self, draft: Draft, text: str) -> Mapping[str, float]:
        """Scores of a draft whose answer is another text."""
        ...

    def alone(self, course: Course, role: str) -> Outcome:
        """A role's answer without the other one."""
        ...


def reviewed(course: Course, case: Case, first: Draft, revisions: int = REVISIONS) -> Outcome:
    """What a draft becomes under review.

    Accepted, it is the answer; with "revise" and a text, that text is. Otherwise the worker does
    it again, with the issues, at most `revisions` times. After that, and where the reviewer twice
    gives no verdict that can be read, the reviewer does the task itself.
    """
    draft, drafts = first, 1
    while True:
        verdict = _judged(course, case, draft, drafts)
        if verdict.kind == "accept":
            return _ended(course, Outcome(draft.text, draft.scores, "worker", drafts))
        if verdict.text is not None:
            scores = case.corrected(draft, verdict.text)
            return _ended(course, Outcome(verdict.text, scores, "review", drafts))
        if verdict.kind == INVALID or drafts > revisions:
            own = case.alone(course, "reviewer")
            return _ended(course, dataclasses.replace(own, attempts=drafts + 1))
        before = draft if verdict.kind == "revise" else None
        draft = case.draft(course, verdict.issues, before, drafts)
        drafts += 1


def _judged(course, case, draft, drafts):
    """The verdict on a draft: of the check without a model, or of the reviewer."""
    if draft.problem:
        course.note("check", "redo", {"issues": [draft.problem]})
        return Verdict("redo", (draft.problem,))
    verdict = case.review(course, draft, "", drafts)
    if verdict.kind == INVALID:
        verdict = case.review(course, draft, verdict.issues[0], drafts)
    return verdict


def _ended(course, outcome):
    reviews = sum(line["action"] == "review" for line in course.lines)
    return dataclasses.replace(outcome, reviews=reviews)


def check_revisions(revisions: int) -> None:
    """Raises `InputError` for a number that is none of revisions."""
    if not 0 <= revisions <= 20:
        raise InputError(f"revisions is {revisions}; expected 0 to 20")
