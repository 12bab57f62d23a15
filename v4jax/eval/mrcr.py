"""MRCR-style: one of several answers to the same request, given again from a long chat."""

import difflib

from v4jax.eval import words
from v4jax.eval.dice import Dice
from v4jax.eval.fit import most_steps
from v4jax.eval.sample import Measure, Prompt, Sample, Task

NEEDLES = (2, 4, 8)
RIGHT = 0.95  # of the ratio, from which on a text counts as given again
_FORMATS = ("poem", "news article", "short scene", "letter", "riddle", "speech", "blog post")
_ORDINALS = ("first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth")
_MARK = "abcdefghijkmnopqrstuvwxyzABCDEFGHJKLMNPQRSTUVWXYZ23456789"
_HUGE = 64  # an answer of so many times the truth's length has a ratio below 0.04


def task(needles: int) -> Task:
    """So many of the requests are the same one."""

    def make(seed: int, number: int, length: int, depth, measure: Measure) -> Sample:
        return _make(needles, seed, number, length, measure)

    return Task(f"mrcr_{needles}", make, _score, chance=0.02)


def _make(needles, seed, number, length, measure):
    dice = Dice("mrcr", needles, seed, length, number)
    kind = (dice.choice(_FORMATS), dice.choice(words.NOUNS))
    texts = [_text(Dice("mrcr needle", seed, length, number, i), *kind) for i in range(needles)]
    wanted = dice.below(needles)
    mark = "".join(dice.choice(_MARK) for _ in range(10))
    places = sorted(dice.sample(range(40), needles))
    question = (
        f"Begin your answer with {mark} and, right behind it, repeat the "
        f"{_ORDINALS[wanted]} {kind[0]} about {kind[1]} of this conversation, word for word. "
        "Write nothing else."
    )
    alone = Prompt(({"role": "assistant", "content": mark + texts[wanted]},))
    budget = measure(alone) + 16

    def build(steps):
        turns = [_other(seed, number, i, kind) for i in range(steps)]
        at = [round(place / 39 * steps) for place in places]
        for i in reversed(range(needles)):
            turns.insert(at[i], (kind, texts[i]))
        said = [turn for (what, about), text in turns for turn in _turns(what, about, text)]
        return Prompt((*said, {"role": "user", "content": question}))

    prompt = build(most_steps(build, measure, length, budget, f"mrcr_{needles}"))
    return Sample(prompt, [mark, texts[wanted]], budget, places[wanted] / 39)


def _turns(what, about, text):
    yield {"role": "user", "content": f"Write a {what} about {about}."}
    yield {"role": "assistant", "content": text}


def _other(seed, number, i, kind):
    """Another request, often of the same form or on the same thing, and its answer."""
    dice = Dice("mrcr other", seed, number, i)
    what, about = dice.choice(_FORMATS), dice.choice(words.NOUNS)
    if dice.below(2):
        about = kind[1]
    if (what, about) == kind:
        what = _FORMATS[(_FORMATS.index(what) + 1) % len(_FORMATS)]
    return (what, about), _text(dice, what, about)


def _text(dice, what, about):
    lines = [f"A {what}: the {dice.choice(words.ADJECTIVES)} {about}."]
    for _ in range(dice.between(4, 7)):
        person, place = dice.choice(words.PEOPLE), dice.choice(words.PLACES)
        lines.append(
            f"{dice.choice(words.TIMES)}, {person} of {place} {dice.choice(words.VERBS)} the "
            f"{dice.choice(words.ADJECTIVES)} {about} and a {dice.choice(words.NOUNS)}."
        )
    return "\n".join(lines)


def ratio(answer: str, mark: str, truth: str) -> float:
    """How much of the true text was given again, 0 to 1; 0 without the mark in front."""
    if not answer.startswith(mark):
        return 0.0
    rest = answer.removeprefix(mark)
    matcher = difflib.SequenceMatcher(None, rest, truth)
    if len(rest) > _HUGE * max(len(truth), 1):
        return matcher.real_quick_ratio()  # an upper bound, since the exact one would take minutes
    return matcher.ratio()


def _score(sample: Sample, answer: str) -> dict[str, float]:
    found = ratio(answer, *sample.expected)
    return {"score": found, "repeated": float(found > RIGHT)}
