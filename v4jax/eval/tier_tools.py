"""Conversations with tools as two tiers have them: the worker calls, the reviewer sees the calls.

The quotes are the calls with what they returned, which the tools' side has written down itself. A
draft that is sent back is played again from its beginning, since calls cannot be taken back.
"""

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from v4jax.eval.extraction import said_value
from v4jax.eval.ledger import Course
from v4jax.eval.sample import Answer, Prompt
from v4jax.eval.tier_documents import again, ask_verdict, complaints
from v4jax.eval.tiers import NO_ANSWER, Draft, Outcome
from v4jax.eval.tool_use import BUDGET, TEMPERATURE, Script, play
from v4jax.eval.verdicts import Verdict

LONGEST = 200  # characters of a call or a result that the reviewer sees
_REVIEW = (
    "You review the work of another, who called tools for a user. You see what the user asked, the "
    "calls with their results, and the answer. Answer with JSON and nothing else: "
    '{"verdict": "accept", "revise" or "redo", "issues": [what is wrong, a sentence each], "text": '
    '"the right answer, if you revise and know it"}. Accept what the results support. Revise where '
    "the calls are right and the answer is not. Redo where calls are wrong or missing."
)


@dataclasses.dataclass(frozen=True)
class Calls:
    """What was called and what came back, and the conversation that it was.

    Attributes:
      messages: up to the answer.
    """

    made: tuple[tuple[str, str, str], ...]  # name, arguments, result
    messages: tuple[Mapping[str, Any], ...]
    record: Mapping[str, Any]

    def shown(self) -> str:
        """A line each."""
        lines = [
            f"{name[:LONGEST]}({arguments[:LONGEST]}) -> {result[:LONGEST]}"
            for name, arguments, result in self.made
        ]
        return "\n".join(lines) or "(none)"


@dataclasses.dataclass(frozen=True)
class Tools:
    """A script that two tiers play.

    Args:
      agrees: the reviewer answers from the results again, in place of a verdict as JSON.
    """

    script: Script
    seed: int
    agrees: bool = False

    def draft(
        self, course: Course, issues: Sequence[str], before: Draft | None, round: int
    ) -> Draft:
        """See `Case`. With `agrees` it cannot be told what was wrong, and other draws are made."""
        told = () if self.agrees else issues
        warm = TEMPERATURE if round and self.agrees else 0.0
        action = "draft" if before is None else "revise"
        text, calls = self._play(course, "worker", action, told, warm, self.seed + round)
        problem = "" if text.strip() else NO_ANSWER
        return Draft(text, self._scores(calls.record), calls, _confidence(calls, text), problem)

    def review(self, course: Course, draft: Draft, problem: str, round: int) -> Verdict:
        """See `Case`."""
        if self.agrees:
            return self._agreement(course, draft, round)
        text = (
            f"{_REVIEW}\n\nTHE USER: {self.script.user}\n\nCALLS:\n{draft.evidence.shown()}\n\n"
            f"ANSWER:\n{draft.text}{again(problem)}"
        )
        return ask_verdict(course, text, self.seed + round)

    def corrected(self, draft: Draft, text: str) -> Mapping[str, float]:
        """See `Case`. The calls stay those of the draft."""
        record = dict(draft.evidence.record)
        right = record["steps_done"] == 1.0 and bool(text.strip())
        right = right and self.script.final.lower() in text.lower()
        return self._scores(record | {"ended_right": float(right), "score": 0.0})

    def alone(self, course: Course, role: str) -> Outcome:
        """See `Case`."""
        text, calls = self._play(course, role, "answer", (), 0.0, self.seed)
        return Outcome(text, self._scores(calls.record), role)

    def _play(self, course, role, action, issues, temperature, seed):
        script = self.script
        if issues:
            script = dataclasses.replace(script, user=script.user + complaints(issues))
        seat = _Seat(course, role, action)
        record = play(seat, script, temperature, seed)
        return record["answer"], Calls(_made(seat.messages), seat.messages, record)

    def _scores(self, record):
        """A task is solved where all calls came in order and the answer is right, at last.

        A question that no tool is for is solved by an answer without a call.
        """
        solved = record["ended_right"] if self.script.steps else record["score"]
        names = ("steps_done", "valid_calls", "exact_calls")
        return {"score": solved} | {name: record[name] for name in names if name in record}

    def _agreement(self, course, draft, round):
        """The verdict of a reviewer that answers from the same results."""
        tools = tuple(tool.described() for tool in self.script.tools)
        answer = course.ask(
            "reviewer",
            "review",
            Prompt(draft.evidence.messages, tools=tools),
            BUDGET,
            seed=self.seed + round,
            judge=lambda said: _agreed(draft, said).fields(),
        )
        return _agreed(draft, answer.text)


def _agreed(draft, said):
    """The same value accepts, another one of the last result revises, anything else has it redone.

    An answer without text is a call: the reviewer would have gone on.
    """
    drafted, answered = said_value(draft.text), said_value(said)
    if not answered:
        return Verdict("redo", ("The reviewer would go on calling.",))
    if answered == drafted:
        return Verdict("accept")
    made = draft.evidence.made
    if made and answered in _values(made[-1][2]):
        return Verdict("revise", ("The reviewer reads another value.",), f'It is "{answered}".')
    return Verdict("redo", ("The reviewer answers something else.",))


class _Seat:
    """A role in a course as what `play` asks.

    Attributes:
      messages: of the conversation, as the last question had them.
    """

    style, max_length = "chat", None

    def __init__(self, course, role, action):
        self.name, self.identity = role, {}
        self._ask: Callable = course.ask
        self._role, self._action = role, action
        self.messages: tuple[Mapping[str, Any], ...] = ()

    def measure(self, prompt: Prompt) -> int:
        raise NotImplementedError("a script is played as it is: nothing is measured")

    def ask(
        self,
        prompt: Prompt,
        max_new_tokens: int,
        stop: Sequence[str] = (),
        temperature: float = 0.0,
        seed: int = 0,
        shared: int = 0,
    ) -> Answer:
        self.messages = prompt.messages
        return self._ask(
            self._role,
            self._action,
            prompt,
            max_new_tokens,
            stop,
            temperature=temperature,
            seed=seed,
            shared=shared,
        )

    def close(self) -> None:
        """The targets are others' to close."""


def _made(messages):
    """The calls of a conversation, each with its result."""
    results = [each["content"] for each in messages if each["role"] == "tool"]
    calls = [call for each in messages for call in each.get("tool_calls") or ()]
    return tuple(
        (call["function"]["name"], call["function"]["arguments"], result)
        for call, result in zip(calls, results, strict=True)
    )


def _confidence(calls, text):
    """The mean of two shares: of calls without an error, and 1 if the last result has the answer.

    0 without an answer, 0.5 for an answer without a call.
    """
    if not text.strip():
        return 0.0
    if not calls.made:
        return 0.5
    fine = sum("error" not in _read(result) for _, _, result in calls.made) / len(calls.made)
    return (fine + float(any(value in text for value in _values(calls.made[-1][2])))) / 2


def _read(result):
    found = json.loads(result)
    return found if isinstance(found, dict) else {"value": found}


def _values(result):
    """The texts and numbers of a result, as text."""
    found = _read(result)
    return [str(each) for each in found.values() if isinstance(each, str | int | float)]
