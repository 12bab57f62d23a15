"""The text of nano: the standard library's sources, with facts to remember put between their lines.

    python experiments/000_nano/text.py

writes experiments/000_nano/runs/text, a file for a file. Source code hardly ever asks for a word
of thousands of tokens ago; these lines do:

    # remember: server = thread
    ...
    # recall: server = thread
"""

import math
import random
import shutil
from pathlib import Path

from v4jax.datasets import files

OUT = Path(__file__).parent / "runs" / "text"
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


def remember(key: str, value: str) -> str:
    return f"# remember: {key} = {value}"


def recall(key: str, value: str = "") -> str:
    """The question with its answer, or without."""
    return f"# recall: {key} =" + (f" {value}" if value else "")


def with_facts(text: str, rng: random.Random) -> str:
    """A file with facts in it, no key twice until all are used, and one or two questions to each.

    Half of all questions are within 17 lines: their distances are even on a logarithmic scale.
    """
    lines = text.split("\n")
    added: dict[int, list[str]] = {}
    keys: list[str] = []
    for at in range(len(lines)):
        if rng.random() > 1 / BETWEEN:
            continue
        keys = keys or rng.sample(WORDS, len(WORDS))
        key, value = keys.pop(), rng.choice(WORDS)
        added.setdefault(at, []).append(remember(key, value))
        for _ in range(rng.randint(1, 2)):
            distance = int(math.exp(rng.uniform(0, math.log(FARTHEST))))
            added.setdefault(at + distance, []).append(recall(key, value))
    return "\n".join(line for at, own in enumerate(lines) for line in (*added.get(at, ()), own))


def main():
    shutil.rmtree(OUT, ignore_errors=True)
    for document in files.python_documents():
        out = OUT / document.name
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(with_facts(document.pieces[0][0], random.Random(document.name)), "utf-8")


if __name__ == "__main__":
    main()
