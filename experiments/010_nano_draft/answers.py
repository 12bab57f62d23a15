"""Text that nano itself wrote, for its draft to learn from: one .npy file of ids an answer.

    python experiments/010_nano_draft/answers.py [BATCHES]

A prompt is a piece of a Python source ("code"), or such a piece with facts and questions between
its lines ("facts"), as nano's own text was made. Three batches in four are drawn at temperature 1,
the fourth is greedy. Documents that nano's training kept apart give no prompts.
"""

import random
import sys
import time
from pathlib import Path

import numpy as np

import v4jax
from v4jax.datasets import files

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "000_nano"))
import text  # noqa: E402

ANSWERS = HERE / "runs" / "answers"
HELD_OUT = 0.05
ROWS, PROMPT, LENGTH = 64, 96, 512
DOMAINS = ("code", "facts")


def prompts(domain: str, held_out: bool, count: int, length: int, rng: random.Random):
    """Prompts of exactly `length` ids, each from a random line of a random document on."""
    tokenizer = v4jax.Tokenizer("nano")
    documents = [
        document.pieces[0][0]
        for document in files.python_documents()
        if files.is_held_out(document.name, HELD_OUT) == held_out
    ]
    found = []
    while len(found) < count:
        lines = rng.choice(documents).split("\n")
        source = "\n".join(lines[rng.randrange(len(lines)) :][:length])
        if domain == "facts":
            source = "".join(piece for piece, _ in text.with_facts(source, rng)).lstrip("\n")
        ids = tokenizer.encode(source)
        if len(ids) >= length:
            found.append(ids[:length])
    return found


def main(batches: int):
    ANSWERS.mkdir(parents=True, exist_ok=True)
    model, params = v4jax.load("nano", dtype="float32", weights="float32")
    for batch in range(batches):
        began, rng = time.perf_counter(), random.Random(batch)
        asked = [p for d in DOMAINS for p in prompts(d, False, ROWS // 2, PROMPT, rng)]
        temperature = 0.0 if batch % 4 == 3 else 1.0
        options = {"max_new_tokens": LENGTH - PROMPT, "temperature": temperature, "seed": batch}
        made = v4jax.generate(model, params, asked, **options)
        for row, (prompt, answer) in enumerate(zip(asked, made.tokens, strict=True)):
            name = f"{DOMAINS[row // (ROWS // 2)]}_{batch:03d}_{row:03d}.npy"
            np.save(ANSWERS / name, np.array([*prompt, *answer], np.uint16))
        seconds = time.perf_counter() - began
        print(f"batch {batch}: {seconds:.1f} s, {made.tokens_per_second:.0f} tokens/s", flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]) if sys.argv[1:] else 24)
