"""Aggregation: orders told one by one between other sentences; how many, how much, whose most?"""

import collections
import re

from v4jax.eval import haystack, words
from v4jax.eval.dice import Dice
from v4jax.eval.fit import most_steps
from v4jax.eval.sample import Measure, Sample, Task, asked

BUDGET = 32
_PLACES, _GOODS, _BUYERS = words.PLACES[:6], words.NOUNS[:8], words.PEOPLE[:8]
_NUMBER = re.compile(r"-?\d+")
_FEWEST = 6  # orders


def tasks() -> list[Task]:
    """Counts, sums and the buyer with the most, each under a filter."""
    return [
        Task("count", _maker("count"), _score_number, chance=0.3),
        Task("sum", _maker("sum"), _score_number, chance=0.05),
        Task("most", _maker("most"), _score_name, chance=0.2),
    ]


def _maker(what):
    def make(seed: int, number: int, length: int, depth, measure: Measure) -> Sample:
        return _make(what, seed, number, length, measure)

    return make


def _make(what, seed, number, length, measure):
    place = Dice("aggregation", what, seed, length, number).choice(_PLACES)
    prose = haystack.essay(seed)
    introduction = "Read the following accounts of a market. Numbers are pieces and crowns.\n\n"
    question, prefix = _question(what, place)

    def orders(steps):
        return _orders((what, seed, length, number), _FEWEST + steps, place, what)

    def build(steps):
        told = [_told(order, i) + prose(i) for i, order in enumerate(orders(steps))]
        return asked(f"{introduction}{''.join(told)}\n\n{question}", prefix)

    steps = most_steps(build, measure, length, BUDGET, what)
    expected = _truth(what, orders(steps), place)
    return Sample(build(steps), [str(expected)], BUDGET, stop=("\n",))


def _orders(names, count, place, what):
    """(buyer, place, goods, pieces, crowns) each; one buyer has the most, and another the sum."""
    found = []
    for i in range(count):
        dice = Dice("order", *names, i)
        where = place if i < 2 else dice.choice(_PLACES)
        pieces, crowns = dice.between(2, 90), dice.between(10, 900)
        found.append((dice.choice(_BUYERS), where, dice.choice(_GOODS), pieces, crowns))
    ranking = _paid(found, place).most_common(2)
    if what == "most" and len(ranking) > 1 and ranking[0][1] == ranking[1][1]:
        buyer, where, goods, pieces, crowns = found[0]
        found[0] = (ranking[0][0], where, goods, pieces, crowns + 1000)
    return found


def _paid(orders, place):
    paid: collections.Counter[str] = collections.Counter()
    for buyer, where, _, _, crowns in orders:
        if where == place:
            paid[buyer] += crowns
    return paid


def _told(order, number):
    buyer, where, goods, pieces, crowns = order
    forms = (
        f"{buyer} came to the market of {where} and paid {crowns} crowns for {pieces} pieces of "
        f"{goods}. ",
        f"At {where}, {pieces} pieces of {goods} went to {buyer} for {crowns} crowns. ",
        f"For {crowns} crowns {buyer} took {pieces} pieces of {goods} home from {where}. ",
    )
    return forms[number % len(forms)]


def _question(what, place):
    if what == "count":
        return f"Question: how many purchases were made at {place}?", "Answer: the number is"
    if what == "sum":
        return f"Question: how many crowns were paid at {place} in all?", "Answer: the sum is"
    return f"Question: who paid the most crowns at {place} in all?", "Answer: it was"


def _truth(what, orders, place):
    paid = _paid(orders, place)
    if what == "count":
        return sum(where == place for _, where, *_ in orders)
    return sum(paid.values()) if what == "sum" else paid.most_common(1)[0][0]


def _score_number(sample: Sample, answer: str) -> dict[str, float]:
    """The first number of the answer, which may have commas between thousands."""
    found = _NUMBER.search(re.sub(r"(?<=\d),(?=\d{3})", "", answer))
    if found is None:
        return {"score": 0.0, "closeness": 0.0}
    truth = int(sample.expected[0])
    if len(found[0]) > 18:
        return {"score": 0.0, "closeness": 0.0}
    off = abs(int(found[0]) - truth)
    return {"score": float(off == 0), "closeness": max(0.0, 1 - off / max(truth, 1))}


def _score_name(sample: Sample, answer: str) -> dict[str, float]:
    """The first of the buyers whom the answer names."""
    names = re.findall(r"\w+", answer)
    first = next((name for name in names if name in _BUYERS), None)
    return {"score": float(first == sample.expected[0])}
