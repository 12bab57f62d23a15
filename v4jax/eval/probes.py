"""Probes of this model's own parts: blocks of 4 and 128 tokens, the window, copies.

They place tokens exactly, so they ask in token ids: of a checkpoint in this process, or of an
endpoint whose tokenizer is given.
"""

import dataclasses
import functools
import time
from collections.abc import Sequence
from typing import Any

from v4jax.eval import haystack, structure, words
from v4jax.eval.dice import Dice
from v4jax.eval.fit import NotPossible, TooShort
from v4jax.eval.sample import Sample, asked
from v4jax.eval.scores import first_line_is, share_found
from v4jax.eval.suite import Job, record_of

WINDOW, BLOCK, SMALL_BLOCK = 128, 128, 4
COPIES = (4, 16, 64, 128, 192)
AROUND = (-24, -16, -8, -4, -2, -1, 0, 1, 2, 4, 8, 16, 24)  # of the window's border
BUDGET = 8
_GRAIN = 1024  # tokens by which a haystack is made


def jobs(seed: int, lengths: Sequence[int], samples: int, style: str = "facts") -> list[Job]:
    """Every offset, both sides of the window's border, both borders of blocks, copies.

    Args:
      samples: of each place; a sample of "offset_128" is one of its 128 places, once each.
    """
    found = []
    for length in lengths:
        for n in range(BLOCK):
            found.append(Job("offset_128", length, n, _At(seed, length, n, n, style)))
        for n in range(SMALL_BLOCK * samples):
            at = _At(seed, length, n, n % SMALL_BLOCK, style, every=SMALL_BLOCK)
            found.append(Job("offset_4", length, n, at))
        for n in range(samples * len(AROUND)):
            away = WINDOW + AROUND[n % len(AROUND)]
            found.append(Job("window", length, n, _At(seed, length, n, 0, style, away=away)))
        for n in range(samples):
            found.append(Job("block_border", length, n, _At(seed, length, n, -3 - n % 4, style)))
        for n in range(samples):
            found.append(Job("indexer_recall", length, n, _Choice(seed, length, n, style)))
    for count in COPIES:
        for n in range(samples):
            found.append(Job(f"copy_{count}", 0, n, _Copy(seed, n, count, style)))
    return found + (structure.jobs(seed, samples) if style == "chat" else [])


@dataclasses.dataclass(frozen=True)
class _At:
    """A needle whose first token is at an exact place.

    Attributes:
      offset: of the place, modulo `every`; the place itself is drawn.
      away: tokens from the needle's last one to the prompt's last one, in place of that.
    """

    seed: int
    length: int
    number: int
    offset: int
    style: str
    every: int = BLOCK
    away: int | None = None

    def __call__(self, target) -> dict[str, Any]:
        dice = Dice("probe", self.seed, self.length, self.number, self.offset, self.every)
        fact, question, value = _fact(dice, self.style)
        first_ids, told, end = target.encode(""), _ids(target, fact), _ids(target, question)
        room = self.length - len(told) - len(end) - len(first_ids) - BUDGET
        if room < 1:
            raise TooShort(f"probes: the length is {self.length} tokens; expected 128 or more")
        hay = _hay(target, self.seed, self.style, room)
        if self.away is not None:
            place = room - max(0, min(room, self.away - len(end)))
        else:
            first = (self.offset - len(first_ids)) % self.every
            place = first + self.every * dice.below(max(1, (room - first) // self.every))
        tokens = [*first_ids, *hay[:place], *told, *hay[place:room], *end]
        place = min(place, room) + len(first_ids)
        answer = target.ask_tokens(tokens, BUDGET, stop=("\n",), seed=self.number, keep=(place,))
        right = first_line_is if self.style == "facts" else _within
        sample = Sample(asked(question), [value], BUDGET, place / max(room, 1))
        away = len(tokens) - place - len(told)
        return record_of(self.seed, sample, answer, {"score": right(value, answer.text)}) | {
            "place": place,
            "mod_4": place % SMALL_BLOCK,
            "mod_128": place % BLOCK,
            "away": away,
        }


@dataclasses.dataclass(frozen=True)
class _Copy:
    """Random words, and their beginning once more: how many of the next tokens are theirs?"""

    seed: int
    number: int
    count: int
    style: str

    def __call__(self, target) -> dict[str, Any]:
        dice = Dice("copy", self.seed, self.number, self.count)
        said = " ".join(dice.choice(words.CODE_WORDS) for _ in range(self.count + 8))
        ids = _ids(target, said)[: self.count + 4]
        tokens = [*target.encode("# "), *ids, *_ids(target, "\n# "), *ids[:4]]
        answer = target.ask_tokens(tokens, self.count, seed=self.number, ends=False)
        expected = target.decode(ids[4:])
        made = _ids(target, answer.text)[: self.count]
        right = sum(a == b for a, b in zip(made, ids[4:], strict=False)) / self.count
        sample = Sample(asked(""), [expected], self.count)
        return record_of(self.seed, sample, answer, {"score": right})


def _ids(target, text):
    """Ids of a text that stands within others."""
    return target.encode(text)[len(target.encode("")) :]


@dataclasses.dataclass(frozen=True)
class _Choice:
    """What the indexer's choice keeps of the attention of a query that looks a needle up."""

    seed: int
    length: int
    number: int
    style: str

    def __call__(self, target) -> dict[str, Any]:
        if not hasattr(target, "loaded"):
            raise NotPossible(
                "indexer_recall looks into the model, so it needs a --checkpoint in this process"
            )
        from v4jax.eval.indexer_recall import recall

        dice = Dice("choice", self.seed, self.length, self.number)
        first, (fact, question, _) = target.encode(""), _fact(dice, self.style)
        told, end = _ids(target, fact), _ids(target, question)
        room = self.length - len(first) - len(told) - len(end)
        place = dice.below(room + 1)
        hay = _hay(target, self.seed, self.style, room)
        began = time.perf_counter()
        tokens = [*first, *hay[:place], *told, *hay[place:], *end]
        model, variables = target.loaded
        found = recall(model, variables, tokens)
        return {
            "seed": self.seed,
            "depth": place / room,
            "prompt_tokens": len(tokens),
            "seconds": round(time.perf_counter() - began, 6),
            **found,
        }


def _fact(dice, style):
    if style == "facts":
        key, value = dice.sample(words.CODE_WORDS, 2)
        return f"# remember: {key} = {value}\n", f"# recall: {key} =", value
    key = f"{dice.choice(words.ADJECTIVES)} {dice.choice(words.NOUNS)}"
    value = dice.digits(7)
    told = f"The special magic number for {key} is: {value}.\n"
    return told, f"\nThe special magic number for {key} is:", value


def _within(value, answer):
    return share_found([value], answer)


def _hay(target, seed, style, room):
    """So many tokens of haystack."""
    return _cached_hay(target, seed, style, -(-room // _GRAIN) * _GRAIN)[:room]


@functools.lru_cache(8)
def _cached_hay(target, seed, style, room):
    units = haystack.code(seed) if style == "facts" else haystack.essay(seed)
    text, number = "", 0
    while len(ids := _ids(target, text)) < room:
        more = 1 + (room - len(ids)) // 8
        text += "".join(units(i) for i in range(number, number + more))
        number += more
    return ids[:room]
