"""The texts of nano: the standard library's sources, facts to remember put between their lines.

    python experiments/000_nano/text.py

Source code hardly ever asks for a word of thousands of tokens ago; these lines do:

    # remember: server = thread
    ...
    # recall: server = thread

It writes runs/text, a file for a file, where they are text like any other, and runs/recall_text,
where of these lines the answers alone are targets. There facts.jsonl has documents of nothing else,
far.jsonl and long.jsonl facts between lines of code and questions at the end.
"""

import itertools
import json
import math
import random
import shutil
from collections.abc import Iterable
from pathlib import Path

import config

from v4jax.datasets import files

RUNS = Path(__file__).parent / "runs"
# Words of the library's own, most of them one token each.
WORDS = """address argument array body bound buffer bytes cache call check class client code command
count data date default depth digest error event file filename flag format frame function group
handler header host import index input instance item key length level limit line list lock locale
match message method mode module name number object offset option order output package parent parser
path pattern port position process prefix queue range reader record request response result root
rule scope section server session signal size socket source stack start state string suffix symbol
table target task test text thread time token type url value version width window word writer"""
WORDS = tuple(WORDS.split())
BETWEEN = 10  # lines from one fact to the next, on average
FARTHEST = 300  # lines from a fact to its question: some 3,000 tokens
FACT_DOCUMENTS, MOST_FACTS = 2000, 24
FAR_DOCUMENTS, FAR_LINES = 1500, (1, 25)  # of code before the questions
LONG_DOCUMENTS, LONG_LINES = 500, (100, 280)

ANSWER = 20.0  # what an answer counts as a target; a token of code counts 1

Pieces = list[tuple[str, float]]  # of a document, and what each counts as a target


def remember(key: str, value: str) -> str:
    return f"# remember: {key} = {value}"


def recall(key: str) -> str:
    """The question without its answer."""
    return f"# recall: {key} ="


def told(key: str, value: str) -> Pieces:
    return [(f"\n{remember(key, value)}", 0.0)]


def asked(key: str, value: str) -> Pieces:
    return [(f"\n{recall(key)}", 0.0), (f" {value}", ANSWER)]


def with_facts(text: str, rng: random.Random) -> Pieces:
    """A file with facts in it, no key twice until all are used, and one or two questions to each.

    Half of all questions are within 17 lines: their distances are even on a logarithmic scale.
    """
    lines = text.split("\n")
    added: dict[int, Pieces] = {}
    keys: list[str] = []
    for at in range(len(lines)):
        if rng.random() > 1 / BETWEEN:
            continue
        keys = keys or rng.sample(WORDS, len(WORDS))
        key, value = keys.pop(), rng.choice(WORDS)
        added.setdefault(at, []).extend(told(key, value))
        for _ in range(rng.randint(1, 2)):
            distance = int(math.exp(rng.uniform(0, math.log(FARTHEST))))
            added.setdefault(at + distance, []).extend(asked(key, value))
    return merged(
        piece for at, line in enumerate(lines) for piece in (*added.get(at, ()), (f"\n{line}", 1.0))
    )


def only_facts(rng: random.Random) -> Pieces:
    """Facts and about three questions to each; few facts are as likely as many."""
    count = int(math.exp(rng.uniform(0, math.log(MOST_FACTS + 1))))
    facts = [(key, rng.choice(WORDS)) for key in rng.sample(WORDS, count)]
    pieces: Pieces = []
    known, questions = 0, count * rng.randint(2, 4)
    while known < count or questions:
        if known < count and (not known or not questions or rng.random() < 0.5):
            pieces += told(*facts[known])
            known += 1
        else:
            pieces += asked(*rng.choice(facts[:known]))
            questions -= 1
    return [*pieces, ("\n", 0.0)]


def far(sources: list[list[str]], lines: tuple[int, int], rng: random.Random) -> Pieces:
    """Facts put between lines of code, and at the end a question to each: answers alone count."""
    count = int(math.exp(rng.uniform(math.log(lines[0]), math.log(lines[1] + 1))))
    source = rng.choice([source for source in sources if len(source) > count])
    start = rng.randrange(len(source) - count)
    facts = [(key, rng.choice(WORDS)) for key in rng.sample(WORDS, rng.randint(4, 16))]
    body = [(f"\n{line}", 0.0) for line in source[start : start + count]]
    for fact in facts:
        body[(at := rng.randint(0, len(body))) : at] = told(*fact)
    for fact in rng.sample(facts, len(facts)):
        body += asked(*fact)
    return [*merged(body), ("\n", 0.0)]


def merged(pieces: Iterable[tuple[str, float]]) -> Pieces:
    """Neighbours of a kind as one."""
    groups = itertools.groupby(pieces, key=lambda piece: piece[1])
    return [("".join(string for string, _ in group), kind) for kind, group in groups]


def main():
    plain, masked = RUNS / "text", RUNS / "recall_text"
    for directory in (plain, masked):
        shutil.rmtree(directory, ignore_errors=True)
        directory.mkdir(parents=True)
    lines, sources = [], []
    for document in files.python_documents():
        pieces = with_facts(document.pieces[0][0], random.Random(document.name))
        out = plain / document.name
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text("".join(string for string, _ in pieces).removeprefix("\n"), "utf-8")
        lines.append({"name": document.name, "text": pieces})
        if not files.is_held_out(document.name, config.get_config().data.held_out):
            sources.append(document.pieces[0][0].split("\n"))
    write(masked / "code.jsonl", lines)
    rng = random.Random(0)
    write(masked / "facts.jsonl", [{"text": only_facts(rng)} for _ in range(FACT_DOCUMENTS)])
    for name, number, of in (
        ("far", FAR_DOCUMENTS, FAR_LINES),
        ("long", LONG_DOCUMENTS, LONG_LINES),
    ):
        write(masked / f"{name}.jsonl", [{"text": far(sources, of, rng)} for _ in range(number)])


def write(path, documents):
    path.write_text("".join(json.dumps(document) + "\n" for document in documents), "utf-8")


if __name__ == "__main__":
    main()
