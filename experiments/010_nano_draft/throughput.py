"""Tokens per second of eight requests at once: plain, with drafts, and transformers' padded batch.

    v4jax convert v4jax/data/nano DIR --to transformers
    python experiments/010_nano_draft/throughput.py DIR [RUN]

All have nano's weights in float32 and take turns; requests are held-out code, greedy. RUN has a
trained DSpark draft (config.py). Writes throughput.json.
"""

import json
import random
import statistics
import sys
import time
from pathlib import Path

import answers
import torch
from transformers import AutoModelForCausalLM

import v4jax

HERE = Path(__file__).parent
REQUESTS, PROMPT, NEW, TURNS = 8, 1024, 128, 3


def engines(run):
    """By name."""
    nano = v4jax.load("nano", dtype="float32", weights="float32")
    wanted = {"plain": (nano, None, None)}
    wanted |= {f"MTP, {count}": (nano, "mtp", count) for count in (1, 2)}
    if run is not None:
        drafted = v4jax.load(Path(run) / "model", dtype="float32", weights="float32")
        wanted["DSpark, 5"] = (drafted, "dspark", None)
    options = {"slots": REQUESTS, "max_length": PROMPT + NEW}
    return {
        name: v4jax.Engine(*loaded, draft=draft, draft_tokens=count, **options)
        for name, (loaded, draft, count) in wanted.items()
    }


def main(rival, run):
    asked = answers.prompts("code", True, REQUESTS, PROMPT, random.Random(2))
    made, theirs = engines(run), AutoModelForCausalLM.from_pretrained(rival, dtype=torch.float32)
    batch = torch.tensor(asked)
    runs = {name: lambda e=e: e.generate(asked, max_new_tokens=NEW) for name, e in made.items()}
    options = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False}
    ones = torch.ones_like(batch)
    runs["transformers"] = lambda: theirs.generate(batch, attention_mask=ones, **options)
    seconds, accepted = {name: [] for name in runs}, {}
    for turn in range(TURNS + 1):  # the first one compiles
        for name, once in runs.items():
            began = time.perf_counter()
            result = once()
            if turn:
                seconds[name].append(time.perf_counter() - began)
            if name in made and result.drafted is not None and sum(result.drafted):
                accepted[name] = round(sum(result.accepted) / sum(result.drafted), 3)
    found = {
        name: {
            "tokens_per_second": round(REQUESTS * NEW / statistics.median(times), 1),
            "accepted": accepted.get(name),
        }
        for name, times in seconds.items()
    }
    (HERE / "throughput.json").write_text(json.dumps(found, indent=2) + "\n")
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2] if sys.argv[2:] else None)
