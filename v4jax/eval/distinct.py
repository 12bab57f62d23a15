"""Endless words and numbers of one form, none twice and none part of another."""

from v4jax.eval import words
from v4jax.eval.dice import Dice

_SYLLABLES = tuple(c + v for c in "bdfgjklmnprstvz" for v in "aeiou")


class Distinct:
    """Values numbered from 0, each another: a walk through all values in equal strides.

    Args:
      names: of the draws. size: how many values there are.
    """

    def __init__(self, size: int, *names):
        dice = Dice("distinct", *names)
        self._size, self._start = size, dice.below(size)
        self._stride = dice.below(size)
        while not _coprime(self._stride, size):
            self._stride = dice.below(size)

    def __getitem__(self, number: int) -> int:
        if number >= self._size:
            raise ValueError(f"value {number} of {self._size}")
        return (self._start + number * self._stride) % self._size


def _coprime(a, b):
    while b:
        a, b = b, a % b
    return a == 1


class Words:
    """Invented words of three syllables, six letters each."""

    def __init__(self, *names):
        self._walk = Distinct(len(_SYLLABLES) ** 3, "words", *names)

    def __getitem__(self, number: int) -> str:
        value, base = self._walk[number], len(_SYLLABLES)
        return "".join(_SYLLABLES[value // base**i % base] for i in range(3))


class Keys:
    """An adjective and two nouns, such as silent-oak-fiddle."""

    def __init__(self, *names):
        a, n = len(words.ADJECTIVES), len(words.NOUNS)
        self._walk = Distinct(a * n * n, "keys", *names)

    def __getitem__(self, number: int) -> str:
        value, nouns = self._walk[number], words.NOUNS
        first, rest = divmod(value, len(nouns) ** 2)
        second, third = divmod(rest, len(nouns))
        return f"{words.ADJECTIVES[first]}-{nouns[second]}-{nouns[third]}"


class Numbers:
    """Numbers of seven digits."""

    def __init__(self, *names):
        self._walk = Distinct(9_000_000, "numbers", *names)

    def __getitem__(self, number: int) -> str:
        return str(1_000_000 + self._walk[number])


class Uuids:
    """32 hexadecimal digits each; of 2^128, so that none comes twice."""

    def __init__(self, *names):
        self._names = names

    def __getitem__(self, number: int) -> str:
        return Dice("uuids", *self._names, number).uuid()
