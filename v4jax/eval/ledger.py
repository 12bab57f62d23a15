"""A ledger of two tiers: every step a line, and a course of steps that goes on where it ended.

A course asks the same questions in the same order each time. What the ledger has is not asked
again, so a run that was killed between two steps goes on with the second.
"""

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from v4jax.errors import InputError
from v4jax.eval.records import Records
from v4jax.eval.sample import Answer, Prompt
from v4jax.eval.suite import Target

LEDGER = "ledger.jsonl"
ROLES = ("worker", "reviewer")
TOTALS = ("prompt_tokens", "cached_tokens", "output_tokens", "seconds")


class Ledger(Records):
    """The lines of one directory, for the threads of one process.

    Args:
      directory, identity: as of `Records`.
    """

    def __init__(self, directory, identity: Mapping[str, Any]):
        super().__init__(directory, identity, LEDGER, step_key)
        self._adding = threading.Lock()

    def add(self, record: Mapping[str, Any]) -> None:
        """See `Records.add`."""
        with self._adding:
            super().add(record)

    def __enter__(self) -> "Ledger":
        return self


def step_key(line: Mapping[str, Any]) -> tuple:
    """What no two lines share: the task, its length and sample, the course, the step's number."""
    return line["task"], line["length"], line["sample"], line["course"], line["step"]


class Course:
    """One sample's way through one policy.

    Args:
      key: task, length and number of the sample. name: of the course.
      targets: who plays each role.

    Attributes:
      lines: of the steps so far.
    """

    def __init__(
        self,
        ledger: Ledger,
        key: tuple[str, int, int],
        name: str,
        targets: Mapping[str, Target],
    ):
        self.key, self.name, self._ledger, self._targets = key, name, ledger, targets
        self.lines: list[Mapping[str, Any]] = []

    def ask(
        self,
        role: str,
        action: str,
        prompt: Prompt,
        budget: int,
        stop: Sequence[str] = (),
        temperature: float = 0.0,
        seed: int = 0,
        shared: int = 0,
        judge: Callable[[str], Mapping[str, Any]] = lambda text: {},
    ) -> Answer:
        """What the role's model answers, as a line of the ledger.

        Args:
          judge: answer's text -> fields of the line, such as the verdict.

        Returns:
          The answer; an empty one where the target raised, which the line's `error` says.

        Raises:
          InputError: of the target: it cannot be reached, or has no memory. The line is not made,
            and the same run asks again.
        """
        if not self._kept(role, action):
            answer, error = self._answer(
                role, prompt, budget, stop, temperature=temperature, seed=seed, shared=shared
            )
            self._write(role, self._targets[role].name, action, answer, error, judge(answer.text))
        return _answer_of(self.lines[-1])

    def note(self, action: str, verdict: str, fields: Mapping[str, Any]) -> None:
        """A step that no model took part in, as a line."""
        if not self._kept("check", action):
            self._write("check", "-", action, Answer(), None, {"verdict": verdict, **fields})

    def _kept(self, role, action):
        """Takes the step from the ledger; whether it is there."""
        line = self._ledger.done.get((*self.key, self.name, len(self.lines)))
        if line is None:
            return False
        if (line["role"], line["action"]) != (role, action):
            raise InputError(
                f"{self._ledger.directory / LEDGER}: step {len(self.lines)} of {self.key} is of "
                f"{line['role']} ({line['action']}), and {role} ({action}) comes next: the ledger "
                "is of another version; give another --out"
            )
        self.lines.append(line)
        return True

    def _answer(self, role, prompt, budget, stop, **options):
        began = time.perf_counter()
        try:
            return self._targets[role].ask(prompt, budget, stop, **options), None
        except InputError:
            raise
        except Exception as error:
            spent = time.perf_counter() - began
            answer = Answer(seconds=spent, finish="error")
            return answer, f"{type(error).__name__}: {str(error)[:200]}"

    def _write(self, role, model, action, answer, error, fields):
        task, length, sample = self.key
        line = {
            "task": task,
            "length": length,
            "sample": sample,
            "course": self.name,
            "step": len(self.lines),
            "role": role,
            "model": model,
            "action": action,
            "verdict": None,
            "prompt_tokens": answer.prompt_tokens,
            "cached_tokens": answer.cached_tokens,
            "output_tokens": answer.output_tokens,
            "seconds": round(answer.seconds, 6),
            "text": answer.text,
            "calls": answer.calls,
            "finish": answer.finish,
            **({"error": error} if error else {}),
            **fields,
        }
        self._ledger.add(line)
        self.lines.append(line)


def _answer_of(line):
    """The answer that a line is of; the same whether it was just made or read again."""
    return Answer(
        text=line["text"],
        calls=[dict(each) for each in line["calls"]],
        finish=line["finish"],
        **{name: line[name] for name in TOTALS},
    )


def totals(lines: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Tokens and seconds of each role's steps."""
    found = {role: dict.fromkeys(TOTALS, 0) for role in ROLES}
    for line in lines:
        for name in TOTALS if line["role"] in found else ():
            found[line["role"]][name] += line[name]
    return {role: each | {"seconds": round(each["seconds"], 6)} for role, each in found.items()}
