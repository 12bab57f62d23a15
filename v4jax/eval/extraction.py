"""Extraction from documents: facts of one place among made-up fact sheets, with distractors.

`sheets` asks for three facts in prose; `pairs` for one, in the words that nano's chat was trained
on. Both have `about`: the source, the question, and what a review needs.
"""

import functools
import re
from collections.abc import Sequence

from v4jax.eval import haystack, words
from v4jax.eval.dice import Dice
from v4jax.eval.distinct import Distinct, Words
from v4jax.eval.fit import NotPossible, most_steps
from v4jax.eval.sample import Measure, Prompt, Sample, Task, asked

FIELDS = ("founder", "dish", "river", "guild")
ASKED = 3  # of the fields
SHEET_BUDGET, PAIR_BUDGET = 64, 24
REMEMBERED = "I will remember."  # what the chat's training answers to facts
_OWN = 200  # numbers of sheets and pairs that are asked for; the haystack's come behind them
_NAMES = 8  # invented words of one sheet


def sheets(seed: int, number: int, length: int, depth, measure: Measure) -> Sample:
    """Three facts of one place."""
    dice = Dice("tiers", "sheets", seed, length, number)
    drawn = Words("tiers", "sheets", seed)
    depth = haystack.even_depth(dice) if depth is None else depth
    sheet = _Sheet(drawn, seed, number % _OWN)
    fields = tuple(dice.sample(FIELDS, ASKED))
    lines = "\n".join(f"{field}: ..." for field in fields)
    question = (
        f"From the text above, give the facts about {sheet.place}. Answer with these lines and "
        f"nothing else:\n{lines}"
    )

    def build(steps):
        listed = [_Sheet(drawn, seed, _OWN + i).text for i in range(steps)]
        listed.insert(round(depth * steps), sheet.text)
        return "\n".join(listed)

    source = build(
        most_steps(
            lambda steps: asked(f"{build(steps)}\n\n{question}"),
            measure,
            length,
            SHEET_BUDGET,
            "sheets",
        )
    )
    about = {"source": source, "question": question, "fields": fields}
    prompt = asked(f"{source}\n\n{question}")
    expected = {field: sheet.answers(field) for field in fields}
    # Sheets before the asked one are the same for all samples.
    return Sample(prompt, expected, SHEET_BUDGET, depth, (), about, source.index(sheet.text))


class _Sheet:
    """What there is to know of a made-up place, and names beside it that are none of its facts."""

    def __init__(self, drawn, seed, number):
        dice = Dice("tiers", "sheet", seed, number)
        place, surname, dish, river, guild, guest, other_dish, other_river = (
            drawn[_NAMES * number + i].capitalize() for i in range(_NAMES)
        )
        self.place, self._surname, self._first = place, surname, dice.choice(words.PEOPLE)
        self._facts = {"dish": dish, "river": river, "guild": guild}
        visitor = f"{dice.choice(words.PEOPLE)} {guest}"
        done = f"{dice.choice(words.VERBS)} its {dice.choice(words.NOUNS)}"
        sentences = [
            f"It was founded by {self._first} {surname}.",
            f"Its own dish is {dish}, with {dice.choice(words.NOUNS)} bread.",
            f"The river through it is the {river}.",
            f"The guild that runs its market is the {guild}.",
            f"{visitor}, who {done}, founded another village.",
            f"Travellers ask for {other_dish}, a dish that it does not have.",
            f"The river {other_river} passes it by at a distance.",
        ]
        opening = f"{place} is a {dice.choice(words.ADJECTIVES)} village."
        self.text = " ".join([opening, *dice.shuffled(sentences)])

    def answers(self, field: str) -> list[str]:
        if field == "founder":
            return [f"{self._first} {self._surname}", self._surname]
        return [self._facts[field]]


def said_fields(answer: str, fields: Sequence[str]) -> dict[str, str]:
    """What an answer says of each field, by lines `field: value`; of a field named twice, nothing.

    Blanks, quotation marks and a full stop around a value are not part of it.
    """
    found: dict[str, list[str]] = {field: [] for field in fields}
    for line in answer.splitlines():
        name, colon, value = line.partition(":")
        name = name.strip(" \t*-").lower()
        if colon and name in found:
            found[name].append(plain(value))
    return {name: values[0] for name, values in found.items() if len(values) == 1 and values[0]}


def plain(value: str) -> str:
    """A value without what stands around it."""
    return value.strip(" \t*.\"'`")


def _score_sheets(sample: Sample, answer: str) -> dict[str, float]:
    said = said_fields(answer, tuple(sample.expected))
    right = sum(
        said.get(field, "").lower() in [each.lower() for each in allowed]
        for field, allowed in sample.expected.items()
    )
    return {"score": right / len(sample.expected)}


def pairs(seed: int, number: int, length: int, depth, measure: Measure) -> Sample:
    """What one of many keys is, told as `"key" is "value".`."""
    dice = Dice("tiers", "pairs", seed, length, number)
    depth = haystack.even_depth(dice) if depth is None else depth
    values = _Held(seed)
    key, value = values[2 * (number % _OWN)], values[2 * (number % _OWN) + 1]
    fact, question = f'"{key}" is "{value}".', f'What is "{key}"?'

    def build(steps):
        facts = [
            f'"{values[2 * (_OWN + i)]}" is "{values[2 * (_OWN + i) + 1]}".' for i in range(steps)
        ]
        facts.insert(round(depth * steps), fact)
        return " ".join(facts)

    def prompt(steps):
        return remembered(build(steps), question)

    source = build(most_steps(prompt, measure, length, PAIR_BUDGET, "pairs"))
    about = {"source": source, "question": question}
    return Sample(
        remembered(source, question),
        [value],
        PAIR_BUDGET,
        depth,
        (),
        about,
        source.index(fact),
    )


def remembered(facts: str, question: str) -> Prompt:
    """Facts and a question as the chat's training has them."""
    turns = (("user", facts), ("assistant", REMEMBERED), ("user", question))
    return Prompt(tuple({"role": role, "content": text} for role, text in turns))


def said_value(answer: str) -> str:
    """The one value that an answer says: what stands in quotation marks, or all of it; else ""."""
    quoted = set(re.findall(r'"([^"\n]*)"', answer))
    if len(quoted) > 1:
        return ""
    return quoted.pop() if quoted else plain(answer)


def _score_pairs(sample: Sample, answer: str) -> dict[str, float]:
    return {"score": float(said_value(answer) == sample.expected[0])}


class _Held:
    """Values of two words that the chat's training did not have, none twice."""

    def __init__(self, seed):
        self._all = _held_out()
        self._walk = Distinct(len(self._all), "tiers", "pairs", seed)

    def __getitem__(self, number: int) -> str:
        if number >= len(self._all):
            raise NotPossible(
                f"pairs: there are {len(self._all):,} values that training did not have, too few "
                "for this length; give a shorter one, or the task sheets"
            )
        return self._all[self._walk[number]]


@functools.cache
def _held_out():
    from v4jax.datasets.lexicon import WORDS, is_held_out

    known = [word for word in WORDS if not is_held_out(word)]
    both = (f"{first}_{second}" for first in known for second in known)
    return tuple(value for value in both if is_held_out(value))


SHEETS = Task("sheets", sheets, _score_sheets, depths=True)
PAIRS = Task("pairs", pairs, _score_pairs, depths=True)
