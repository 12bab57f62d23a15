"""What needles are hidden in: unit number i of a haystack is the same at every length."""

import functools
from collections.abc import Callable, Sequence

from v4jax.eval import words
from v4jax.eval.dice import Dice

Units = Callable[[int], str]  # number -> text, its separator included

NOISE = (
    "The path runs along the river. The water is cold. A boat lies on the bank. "
    "The wind comes and goes. Away we walk and back again.\n"
)
_KEPT = 1 << 17  # units that are kept for the next sample
PLACES = 40  # even depths from which needles' places are drawn, none twice


def noise(number: int) -> str:
    """One short paragraph, again and again."""
    return NOISE


def essay(seed: int) -> Units:
    """Running prose, a sentence a unit."""
    return functools.partial(_essay, seed)


def code(seed: int) -> Units:
    """Lines of Python, a short function or class a unit."""
    return functools.partial(_code, seed)


def even_depth(dice: Dice) -> float:
    """One of the even depths."""
    return dice.below(PLACES) / (PLACES - 1)


def depths(dice: Dice, count: int) -> list[float]:
    """So many different even depths, ascending; more than there are fall between them."""
    steps = max(PLACES, count)
    return sorted(place / (steps - 1) for place in dice.sample(range(steps), count))


def hidden(units: Units, count: int, needles: Sequence[tuple[float, str]]) -> str:
    """So many units with needles at their depths; each depth 0 to 1, in order.

    A needle at depth 0 is before all units, at 1 behind all.
    """
    pieces, at = [], 0
    for depth, needle in sorted(needles, key=lambda each: each[0]):
        place = round(depth * count)
        pieces += [units(i) for i in range(at, place)]
        pieces.append(needle)
        at = place
    return "".join([*pieces, *(units(i) for i in range(at, count))])


@functools.lru_cache(_KEPT)
def _essay(seed, number):
    return _sentence(Dice("essay", seed, number)) + ("\n" if number % 7 == 6 else " ")


@functools.lru_cache(_KEPT)
def _code(seed, number):
    return _function(Dice("code", seed, number))


def _sentence(dice):
    person, verb = dice.choice(words.PEOPLE), dice.choice(words.VERBS)
    adjective, noun = dice.choice(words.ADJECTIVES), dice.choice(words.NOUNS)
    other, third = dice.choice(words.NOUNS), dice.choice(words.NOUNS)
    place, when = dice.choice(words.PLACES), dice.choice(words.TIMES)
    forms = (
        f"{when}, {person} {verb} the {adjective} {noun} near the {other}.",
        f"Nobody in {place} {verb} a {noun} before {person} brought the {adjective} {other}.",
        f"The {adjective} {noun} of {place} stood between the {other} and the {third}.",
        f"{person} {verb} every {noun} in {place}, except the one beside the {adjective} {other}.",
        f"{when}, the people of {place} {verb} a {noun} and a {third}.",
        f"It was {person} who {verb} the {noun}, though the {adjective} {other} came first.",
    )
    return dice.choice(forms)


def _function(dice):
    one, two, three = dice.sample(words.CODE_WORDS, 3)
    four, five = dice.sample(words.NOUNS, 2)
    number = dice.between(1, 64)
    forms = (
        f"    def {one}_{four}(self, {two}):\n        if self.{two} is None:\n"
        f"            return {number}\n        return self._{one}({two}, {number})\n",
        f"def {four}_{one}({two}, {three}={number}):\n    {five} = []\n"
        f"    for i in range({three}):\n        {five}.append({two}[i])\n    return {five}\n",
        f"    def set_{two}(self, {five}):\n        self._{two} = {five}\n"
        f"        self.{four}_{three} = len({five}) + {number}\n",
        f"try:\n    import _{four}\nexcept ImportError:\n    _{four} = None\n",
        f"class {four.capitalize()}{one.capitalize()}({three.capitalize()}Error):\n"
        f'    """Raised when the {five} has no {two}."""\n',
        f"    while {four} < {number}:\n        {four} += self.{one}({two})\n"
        f"        if not {four}:\n            break\n",
    )
    return dice.choice(forms)
