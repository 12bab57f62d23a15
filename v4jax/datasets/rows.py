"""Rows of a fixed length out of a source, each by its number: that is the whole position.

Which tokens a row has follows from seed, stage and number alone, so a run goes on exactly where it
stopped, and processes that take different numbers never overlap. (grain would bring processes and
prefetching for work that is a slice of an array.)
"""

import functools
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np

from v4jax.datasets import synthetic
from v4jax.datasets.tokenize import Tokens
from v4jax.errors import InputError


class Row(NamedTuple):
    """Ids, the document of each, and how much it counts as a target: all [X]."""

    ids: np.ndarray
    documents: np.ndarray
    counts: np.ndarray


@runtime_checkable
class Rows(Protocol):
    """Where rows come from: each by its number, whatever it is cut from or made of."""

    def check(self, length: int, ahead: int) -> None:
        """Refuses a length in which there is no row."""

    def row(self, number: int, stage: int, length: int, ahead: int) -> Row:
        """Row `number` of a stage: `length` tokens and the `ahead` behind them."""


class TextRows:
    """Every pass over the text cuts it at another offset and takes the rows in another order."""

    def __init__(self, tokens: Tokens, seed: int):
        self.tokens, self.seed = tokens, seed

    def check(self, length: int, ahead: int) -> None:
        """Refuses a text in which no row fits, wherever the cut falls."""
        needed = 2 * length - 1 + ahead
        if self.tokens.ids.size < needed:
            raise InputError(
                f"the data has {self.tokens.ids.size} tokens and no complete row of {length}: "
                f"expected at least {needed}; give more text or a smaller length"
            )

    def row(self, number: int, stage: int, length: int, ahead: int) -> Row:
        """Row `number` of a stage: `length` tokens and the `ahead` behind them."""
        size = self.tokens.ids.size
        # The same number of rows in every pass, whatever its offset.
        rows = (size - (length - 1) - ahead) // length
        epoch, place = divmod(number, rows)
        offset, order = _pass(self.seed, stage, epoch, rows, length)
        start = int(offset + length * order[place])
        at = slice(start, start + length + ahead)
        places = np.arange(at.start, at.stop)
        documents = np.searchsorted(self.tokens.starts, places, side="right")
        return Row(self.tokens.ids[at], documents.astype(np.int32), self.tokens.counts[at])


class SyntheticRows:
    """Every row is a task of its own."""

    def __init__(self, kind: str, vocab_size: int, seed: int):
        self.kind, self.vocab_size, self.seed = kind, vocab_size, seed

    def check(self, length: int, ahead: int) -> None:
        if length < synthetic.SHORTEST:
            raise InputError(
                f"a {self.kind} task has no room in {length} tokens; expected at least "
                f"{synthetic.SHORTEST}"
            )

    def row(self, number: int, stage: int, length: int, ahead: int) -> Row:
        rng = np.random.default_rng([self.seed, stage, number])
        ids, counts = synthetic.TASKS[self.kind](rng, length + ahead, self.vocab_size)
        return Row(ids.astype(np.int32), np.zeros(ids.size, np.int32), counts)


@functools.lru_cache(maxsize=4)
def _pass(seed, stage, epoch, rows, length):
    rng = np.random.default_rng([seed, stage, epoch])
    return rng.integers(length), rng.permutation(rows)


def take(source: Rows, numbers: range, stage: int, length: int, ahead: int) -> Row:
    """Several rows, stacked."""
    rows = [source.row(number, stage, length, ahead) for number in numbers]
    return Row(*(np.stack(parts) for parts in zip(*rows, strict=True)))
