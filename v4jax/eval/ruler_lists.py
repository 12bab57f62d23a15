"""RULER-style tasks over a whole text: variables, counts of words, questions over documents."""

from collections.abc import Iterable

from v4jax.eval import haystack, words
from v4jax.eval.dice import Dice
from v4jax.eval.distinct import Words
from v4jax.eval.fit import most_steps
from v4jax.eval.sample import Measure, Sample, Task, asked
from v4jax.eval.scores import any_found, share_found

HOPS = 4
_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
VARIABLE_BUDGET, COMMON_BUDGET, FREQUENT_BUDGET, DOCUMENT_BUDGET = 30, 120, 50, 32
WANTED = 10  # common words
_SHORT = 4096  # below it the words of a list are fewer times in it


def variables(seed: int, number: int, length: int, depth, measure: Measure) -> Sample:
    """One chain of assignments in noise: which names have the value?"""
    dice = Dice("ruler", "variables", seed, length, number)
    names = _names(dice, 2 * (HOPS + 1))
    values = dice.sample(range(10000, 100000), 2)
    example = _chain(names[HOPS + 1 :], values[1])
    solved = haystack.hidden(
        haystack.noise, 6, list(zip([0.0, 0.3, 0.5, 0.7, 1.0], example, strict=True))
    )
    lines = _chain(names[: HOPS + 1], values[0])
    places = haystack.depths(dice, len(lines))
    introduction = "Track the assignments of variables hidden in the following text.\n\n"
    shown = f"{introduction}{solved}{_variable_question(values[1])[0]} "
    shown += f"{_variable_question(values[1])[1]} {', '.join(names[HOPS + 1 :])}.\n\n"
    question, prefix = _variable_question(values[0])

    def build(steps):
        text = haystack.hidden(haystack.noise, steps, list(zip(places, lines, strict=True)))
        return asked(f"{shown}{introduction}{text}{question}", prefix)

    prompt = build(most_steps(build, measure, length, VARIABLE_BUDGET, "variables"))
    return Sample(prompt, names[: HOPS + 1], VARIABLE_BUDGET, places[0])


def _variable_question(value):
    return (
        f"Question: find all variables that are assigned the value {value} in the text above.",
        f"Answer: the variables with the value {value}, {HOPS + 1} in all, are:",
    )


def _names(dice, count):
    found: list[str] = []
    while len(found) < count:
        name = "".join(dice.choice(_LETTERS) for _ in range(5))
        if name not in found:
            found.append(name)
    return found


def _chain(names, value):
    first, *rest = names
    lines = [f"VAR {first} = {value}\n"]
    return [
        *lines,
        *(f"VAR {b} = VAR {a}\n" for a, b in zip(names[:-1], rest, strict=True)),
    ]


def common_words(seed: int, number: int, length: int, depth, measure: Measure) -> Sample:
    """A numbered list in which some words come often: which?"""
    dice, drawn = Dice("ruler", "common", seed, length, number), Words("common", seed, number)
    often, seldom = (6, 1) if length < _SHORT else (30, 3)
    common = [drawn[i] for i in range(WANTED)]
    shown_common = [drawn[WANTED + i] for i in range(WANTED)]
    shown_rest = [drawn[2 * WANTED + i] for i in range(WANTED)]
    question = f"Question: which are the {WANTED} most common words in the list above?"
    prefix = f"Answer: the {WANTED} most common words in the list are:"
    introduction = "Below is a numbered list of words. Some of them appear more often.\n"
    solved = _numbered(dice.shuffled([*3 * shown_common, *shown_rest]))
    shown = f"{introduction}{solved}\n{question} {prefix} {' '.join(shown_common)}\n\n"

    def build(steps):
        rest = [drawn[3 * WANTED + i] for i in range(steps)]
        order = Dice("ruler", "common order", seed, length, number, steps)
        listed = _numbered(order.shuffled([*often * common, *seldom * rest]))
        return asked(f"{shown}{introduction}{listed}\n{question}", prefix)

    prompt = build(most_steps(build, measure, length, COMMON_BUDGET, "common_words"))
    return Sample(prompt, common, COMMON_BUDGET)


def _numbered(listed: Iterable[str]):
    return " ".join(f"{i}. {word}" for i, word in enumerate(listed, 1))


def frequent_words(seed: int, number: int, length: int, depth, measure: Measure) -> Sample:
    """Invented words whose number falls with the square of their rank: ranks 2 to 4?"""
    drawn = Words("frequent", seed, number)
    introduction = (
        "Read the following coded text and keep track of how often each coded word appears.\n\n"
    )
    question = "Question: ignoring the dots, which are the three most frequent coded words above?"
    prefix = "Answer: the three most frequent coded words are:"

    def build(steps):
        scale, listed = 60 + steps, []
        for rank in range(1, int(scale**0.5) + 1):
            word = "..." if rank == 1 else drawn[rank]
            listed += [word] * (scale // rank**2)
        order = Dice("ruler", "frequent order", seed, length, number, steps)
        return asked(f"{introduction}{' '.join(order.shuffled(listed))}\n\n{question}", prefix)

    prompt = build(most_steps(build, measure, length, FREQUENT_BUDGET, "frequent_words"))
    return Sample(prompt, [drawn[rank] for rank in (2, 3, 4)], FREQUENT_BUDGET)


def documents(seed: int, number: int, length: int, depth, measure: Measure) -> Sample:
    """Numbered fact sheets of places: one fact of one of them."""
    dice = Dice("ruler", "documents", seed, length, number)
    drawn = Words("documents", seed)
    depth = haystack.even_depth(dice) if depth is None else depth
    sheet = _Sheet(drawn, number % 200)
    what = dice.choice(("founder", "dish"))
    question = f"Question: {sheet.question(what)}"
    introduction = "Answer the question from the documents below. Give the answer only.\n\n"

    def build(steps):
        place = round(depth * steps)
        sheets = [_Sheet(drawn, 200 + i) for i in range(steps)]
        sheets.insert(place, sheet)
        text = "\n".join(f"Document {i}: {each.text}" for i, each in enumerate(sheets, 1))
        return asked(f"{introduction}{text}\n\n{question}", "Answer:")

    prompt = build(most_steps(build, measure, length, DOCUMENT_BUDGET, "documents"))
    shared = prompt.text.index(sheet.text)
    return Sample(prompt, sheet.answers(what), DOCUMENT_BUDGET, depth, ("\n",), {}, shared)


class _Sheet:
    """What there is to know of one made-up place; its names are nobody else's."""

    def __init__(self, drawn, number):
        dice = Dice("sheet", number)
        self._place = drawn[3 * number].capitalize()
        self._surname = drawn[3 * number + 1].capitalize()
        self._first = dice.choice(words.PEOPLE)
        self._dish = drawn[3 * number + 2]
        verb, noun = dice.choice(words.VERBS), dice.choice(words.NOUNS)
        self.text = (
            f"{self._place} is a {dice.choice(words.ADJECTIVES)} village with "
            f"{dice.between(100, 999)} houses. Its founder was {self._first} {self._surname}, who "
            f"{verb} its first {noun}. Its dish, {self._dish}, is eaten with "
            f"{dice.choice(words.NOUNS)} bread."
        )

    def question(self, what):
        if what == "founder":
            return f"who founded {self._place}?"
        return f"what is the dish of {self._place} called?"

    def answers(self, what):
        if what == "founder":
            return [f"{self._first} {self._surname}", self._surname]
        return [self._dish]


def _all(sample: Sample, answer: str) -> dict[str, float]:
    return {"score": share_found(sample.expected, answer)}


def _any(sample: Sample, answer: str) -> dict[str, float]:
    return {"score": any_found(sample.expected, answer)}


VARIABLES = Task("variables", variables, _all)
COMMON = Task("common_words", common_words, _all)
FREQUENT = Task("frequent_words", frequent_words, _all)
DOCUMENTS = Task("documents", documents, _any, depths=True)
