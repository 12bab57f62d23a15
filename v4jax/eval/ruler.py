"""RULER-style tasks: 11 that need no data, and questions over documents that are made up here."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from v4jax.eval import haystack
from v4jax.eval.dice import Dice
from v4jax.eval.distinct import Keys, Numbers, Uuids
from v4jax.eval.fit import most_steps
from v4jax.eval.ruler_lists import COMMON, DOCUMENTS, FREQUENT, VARIABLES
from v4jax.eval.sample import Measure, Sample, Task, asked, budget_text
from v4jax.eval.scores import share_found

BUDGET = 128
_VALUES = {"numbers": Numbers, "uuids": Uuids}
_KEYS: dict[str, Any] = {"words": Keys, "uuids": Uuids}
_FIRST = 1000  # number of the haystack's first binding; those that are hidden in it come before


@dataclasses.dataclass(frozen=True)
class Needles:
    """A needle task.

    Attributes:
      haystack: "noise", "essay" or "needles": other bindings of the same form.
      key, value: kinds. keys: bindings that are hidden. values: of each key. asked: keys asked for.
    """

    name: str
    haystack: str
    key: str = "words"
    value: str = "numbers"
    keys: int = 1
    values: int = 1
    asked: int = 1

    def make(
        self, seed: int, number: int, length: int, depth: float | None, measure: Measure
    ) -> Sample:
        dice = Dice("ruler", self.name, seed, length, number)
        # The haystack is the same for all samples, so that what lies before the needles is shared.
        units = self._units(seed)
        keys, values = _KEYS[self.key]("keys", seed, self.name), self._values(seed)
        bound = [
            (keys[number % 200 * 4 + k], [values[dice.below(_FIRST)] for _ in range(self.values)])
            for k in range(self.keys)
        ]
        bound = self._without_repeats(bound, values)
        lines = dice.shuffled([self._line(key, each) for key, found in bound for each in found])
        places = haystack.depths(dice, len(lines))
        if depth is not None:
            places = [depth] * len(lines)
        needles = list(zip(places, lines, strict=True))
        wanted = dice.sample(bound, self.asked)
        question, prefix = self._question([key for key, _ in wanted])

        def build(steps):
            text = haystack.hidden(units, steps, needles)
            return asked(f"{self._introduction()}{text}\n{question}", prefix)

        steps = most_steps(build, measure, length, BUDGET, self.name)
        prompt = build(steps)
        expected = [value for _, found in wanted for value in found]
        shared = prompt.text.index(lines[0])
        return Sample(prompt, expected, BUDGET, places[0], (), {"keys": wanted[0][0]}, shared)

    def _values(self, seed):
        return _VALUES[self.value]("values", seed, self.name)

    def _units(self, seed):
        if self.haystack == "noise":
            return haystack.noise
        if self.haystack == "essay":
            return haystack.essay(seed)
        keys, values = _KEYS[self.key]("keys", seed, self.name), self._values(seed)
        return lambda i: self._line(keys[_FIRST + i], values[_FIRST + i])

    def _without_repeats(self, bound, values):
        """Values drawn twice give way to ones that were not drawn."""
        free = iter(range(_FIRST))
        seen: set[str] = set()
        for _, found in bound:
            for place, value in enumerate(found):
                while value in seen:
                    value = values[next(free)]
                seen.add(value)
                found[place] = value
        return bound

    def _line(self, key, value):
        kind = "magic number" if self.value == "numbers" else "magic UUID"
        return f"One of the {kind}s for {key} is: {value}.\n"

    def _introduction(self):
        kind = "numbers" if self.value == "numbers" else "UUIDs"
        return (
            f"Some magic {kind} are hidden in the following text. Memorize them: you will be asked "
            "for some of them afterwards.\n\n"
        )

    def _question(self, keys: Sequence[str]):
        kind = "magic numbers" if self.value == "numbers" else "magic UUIDs"
        named = budget_text(keys)
        return (
            f"What are all the {kind} for {named} mentioned in the text above?",
            f"The {kind} for {named} mentioned in the text are",
        )


def _score(sample: Sample, answer: str) -> dict[str, float]:
    return {"score": share_found(sample.expected, answer)}


NEEDLES = (
    Needles("single_1", "noise"),
    Needles("single_2", "essay"),
    Needles("single_3", "essay", value="uuids"),
    Needles("multikey_1", "essay", keys=4),
    Needles("multikey_2", "needles"),
    Needles("multikey_3", "needles", key="uuids", value="uuids"),
    Needles("multivalue", "essay", values=4),
    Needles("multiquery", "essay", keys=4, asked=4),
)


def tasks() -> list[Task]:
    """All of them."""
    needles = [
        Task(each.name, each.make, _score, depths=each.keys * each.values == 1) for each in NEEDLES
    ]
    return [*needles, VARIABLES, COMMON, FREQUENT, DOCUMENTS]
