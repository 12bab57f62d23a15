"""Extraction from documents as two tiers do it: with quotes and verdicts as JSON, or in words.

In words, for models that were taught to remember facts and nothing more: the worker answers, the
sentences of the text that have its answer are its quotes, and the reviewer answers the question
from those alone. Its verdict is whether both say the same.
"""

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence

from v4jax.eval import quotes, verdicts
from v4jax.eval.extraction import remembered, said_fields, said_value
from v4jax.eval.ledger import Course
from v4jax.eval.sample import Prompt, Sample, Task, asked
from v4jax.eval.tiers import NO_ANSWER, NO_QUOTE, Draft, Outcome
from v4jax.eval.tool_use import TEMPERATURE
from v4jax.eval.verdicts import Verdict

QUOTE_BUDGET, VERDICT_BUDGET = 512, 256
SPARE = 1024  # tokens that a step may need beyond the task's prompt and answer
_QUOTE = (
    "First copy out of the text above, word for word, what this task needs. Answer with JSON and "
    'nothing else: {"quotes": [{"start": number of the quote\'s first character in the text, '
    '"text": "the quote"}]}'
)
_REVIEW = (
    "You review the work of another. You see the task, the quotes that it took from the text (they "
    "were checked to be there) and its answer, and not the text. Answer with JSON and nothing "
    'else: {"verdict": "accept", "revise" or "redo", "issues": [what is wrong, a sentence each], '
    '"text": "the right answer, if you revise and know it"}. Accept what the quotes support. '
    "Revise where the quotes are right and the answer is not. Redo where quotes are missing."
)


@dataclasses.dataclass(frozen=True)
class Documents:
    """A sample of `extraction.SHEETS`, with quotes and verdicts as JSON."""

    task: Task
    sample: Sample
    seed: int

    def draft(
        self, course: Course, issues: Sequence[str], before: Draft | None, round: int
    ) -> Draft:
        """See `Case`. A draft that is revised keeps its quotes."""
        checked = self._quotes(course, issues, round) if before is None else before.evidence
        if not checked.kept:
            return Draft("", self._scores(""), checked, 0.0, NO_QUOTE)
        text = self._answer(course, checked, issues, before, round)
        problem = "" if text.strip() else NO_ANSWER
        return Draft(text, self._scores(text), checked, self._confidence(checked, text), problem)

    def review(self, course: Course, draft: Draft, problem: str, round: int) -> Verdict:
        """See `Case`."""
        text = (
            f"{_REVIEW}\n\nTASK: {self._question}\n\nQUOTES:\n{quotes.shown(draft.evidence.kept)}"
            f"\n\nANSWER:\n{draft.text}{again(problem)}"
        )
        return ask_verdict(course, text, self.seed + round)

    def corrected(self, draft: Draft, text: str) -> Mapping[str, float]:
        """See `Case`."""
        return self._scores(text)

    def alone(self, course: Course, role: str) -> Outcome:
        """See `Case`."""
        sample = self.sample
        answer = course.ask(
            role,
            "answer",
            sample.prompt,
            sample.budget,
            sample.stop,
            seed=self.seed,
            shared=sample.shared,
        )
        return Outcome(answer.text, self._scores(answer.text), role)

    @property
    def _question(self):
        return self.sample.about["question"]

    def _scores(self, text):
        return self.task.score(self.sample, text)

    def _quotes(self, course, issues, round):
        source = self.sample.about["source"]
        text = f"{source}\n\n{_QUOTE}\n\nTASK: {self._question}{complaints(issues)}"
        prompt = dataclasses.replace(asked(text), schema=quotes.SCHEMA)
        answer = course.ask(
            "worker",
            "extract",
            prompt,
            QUOTE_BUDGET,
            seed=self.seed + round,
            shared=self.sample.shared,
            judge=lambda said: {"quotes": quotes.read(source, said).counts()},
        )
        return quotes.read(source, answer.text)

    def _answer(self, course, checked, issues, before, round):
        draft = "" if before is None else f"\n\nYOUR LAST ANSWER:\n{before.text}"
        text = (
            f"Do the task from these quotes of the text.\n\nQUOTES:\n{quotes.shown(checked.kept)}"
            f"\n\nTASK: {self._question}{draft}{complaints(issues)}"
        )
        return course.ask(
            "worker",
            "draft" if before is None else "revise",
            asked(text),
            self.sample.budget,
            seed=self.seed + round,
        ).text

    def _confidence(self, checked, text):
        """The mean of two shares: of quotes that are in the text, of fields that a quote has."""
        said = said_fields(text, self.sample.about["fields"])
        kept = "\n".join(each.text for each in checked.kept).lower()
        supported = sum(value.lower() in kept for value in said.values())
        return (checked.share + supported / len(self.sample.about["fields"])) / 2


@dataclasses.dataclass(frozen=True)
class Remembered:
    """A sample of `extraction.PAIRS`, reviewed by answering it again from the quotes."""

    task: Task
    sample: Sample
    seed: int

    def draft(
        self, course: Course, issues: Sequence[str], before: Draft | None, round: int
    ) -> Draft:
        """See `Case`. It cannot be told what was wrong, so it is asked again with other draws."""
        answer = self._ask(course, "worker", "draft", self.sample.prompt, round)
        evidence = self._sentences(said_value(answer.text))
        problem = "" if evidence.kept else NO_QUOTE
        return Draft(
            answer.text,
            self.task.score(self.sample, answer.text),
            evidence,
            1.0 / max(evidence.said, 1) if evidence.kept else 0.0,
            problem,
        )

    def review(self, course: Course, draft: Draft, problem: str, round: int) -> Verdict:
        """See `Case`. Every answer is a verdict: none is `INVALID`."""
        kept = " ".join(each.text for each in draft.evidence.kept)
        prompt = remembered(kept, self.sample.about["question"])
        return self._ask_verdict(course, prompt, draft, kept, round)

    def corrected(self, draft: Draft, text: str) -> Mapping[str, float]:
        """See `Case`."""
        return self.task.score(self.sample, text)

    def alone(self, course: Course, role: str) -> Outcome:
        """See `Case`."""
        answer = self._ask(course, role, "answer", self.sample.prompt, 0)
        return Outcome(answer.text, self.task.score(self.sample, answer.text), role)

    def _ask(self, course, role, action, prompt, round, judge: Callable = lambda text: {}):
        return course.ask(
            role,
            action,
            prompt,
            self.sample.budget,
            self.sample.stop,
            temperature=TEMPERATURE if round else 0.0,
            seed=self.seed + round,
            judge=judge,
        )

    def _ask_verdict(self, course, prompt, draft, kept, round):
        def judge(answer):
            return agreement(said_value(draft.text), said_value(answer), kept).fields()

        answer = course.ask(
            "reviewer", "review", prompt, self.sample.budget, seed=self.seed + round, judge=judge
        )
        return agreement(said_value(draft.text), said_value(answer.text), kept)

    def _sentences(self, value):
        """The sentences of the source that have a value, as quotes."""
        source = self.sample.about["source"]
        found = [
            {"start": each.start(), "text": each[0]}
            for each in re.finditer(r'"[^"]*" is "[^"]*"\.', source)
            if value and each[0].endswith(f' is "{value}".')
        ]
        return quotes.check(source, found)


def agreement(drafted: str, answered: str, evidence: str) -> Verdict:
    """A verdict by answering again: the same value accepts, another one of the evidence revises.

    Anything else, such as that it does not know, has the draft done again.
    """
    if drafted and answered == drafted:
        return Verdict("accept")
    if answered and f' is "{answered}".' in evidence:
        return Verdict("revise", ("The reviewer reads another value.",), f'It is "{answered}".')
    return Verdict("redo", ("The reviewer does not find the value in the quotes.",))


def ask_verdict(course: Course, text: str, seed: int) -> Verdict:
    """The reviewer's verdict on what a text shows it."""
    prompt: Prompt = dataclasses.replace(asked(text), schema=verdicts.SCHEMA)
    answer = course.ask(
        "reviewer",
        "review",
        prompt,
        VERDICT_BUDGET,
        seed=seed,
        judge=lambda said: verdicts.read(said).fields(),
    )
    return verdicts.read(answer.text)


def complaints(issues: Sequence[str]) -> str:
    """What was wrong, for the worker."""
    return "\n\nWRONG LAST TIME:\n" + "\n".join(f"- {each}" for each in issues) if issues else ""


def again(problem: str) -> str:
    """What was wrong with a verdict, for the reviewer."""
    return f"\n\nYour last verdict could not be read: {problem}." if problem else ""
