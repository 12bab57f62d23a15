"""The engine on this CPU, versus transformers' `generate` on one padded batch of the same weights.

    python tools/bench_engine.py [--rival=false] [--out FILE.jsonl]

Three figures, medians of --repeats runs in turns after a warm-up: tokens per second of 8 requests,
a decode round of the engine versus its program alone, and the first token behind a stored prefix
versus a cold one.
"""

import json
import tempfile
import time

import bench_cpu
import bench_history
import jax
import numpy as np
from absl import app, flags

import v4jax

# bench_cpu declares --rival, --repeats and --out.
SLOTS = flags.DEFINE_integer("slots", 8, "Requests at once.")
PROMPT = flags.DEFINE_integer("prompt", 1024, "Tokens of each prompt.")
NEW = flags.DEFINE_integer("new", 128, "Tokens of each answer.")
PREFIX = flags.DEFINE_integer("prefix", 4096, "Tokens of the stored prefix; 0 leaves it out.")


def prompts_of(count, length):
    rng = np.random.default_rng(0)
    return rng.integers(0, bench_cpu.SIZES["vocab_size"], (count, length)).tolist()


def throughput(model, params, theirs):
    """Seconds of all requests."""
    prompts = prompts_of(SLOTS.value, PROMPT.value)
    engine = v4jax.Engine(
        model, params, slots=SLOTS.value, max_length=PROMPT.value + NEW.value, draft=None
    )
    runs = {"engine": lambda: engine.generate(prompts, max_new_tokens=NEW.value)}
    if theirs is not None:
        import torch

        batch = torch.tensor(prompts)
        options = {"max_new_tokens": NEW.value, "min_new_tokens": NEW.value, "do_sample": False}
        ones = torch.ones_like(batch)
        runs["transformers"] = lambda: theirs.generate(batch, attention_mask=ones, **options)
    seconds = bench_cpu.median_seconds(runs)
    tokens = SLOTS.value * NEW.value
    return engine, {f"{name}_tokens_per_second": tokens / s for name, s in seconds.items()}


def scheduling(engine, model, params):
    """Seconds of a decode round: the engine's steps, and its program alone."""
    loop, steps = engine._loop, 20
    streams = [
        engine.submit(v4jax.Request([1 + i], max_new_tokens=NEW.value * 8))
        for i in range(SLOTS.value)
    ]
    while loop.scheduler.busy < SLOTS.value or loop.scheduler.reading:
        engine.step()
    programs, draws = engine._programs, jax.tree.map(np.copy, loop._draws)
    draws.active[:] = True
    drafts, limit = programs.no_drafts()

    def of_engine():
        for _ in range(steps):
            engine.step()
        jax.block_until_ready(loop._lane.anchor_S)

    def alone():
        for _ in range(steps):
            _, loop._lane = programs.verify(loop._lane, drafts, limit, draws, False, 1)
        jax.block_until_ready(loop._lane.anchor_S)

    seconds = bench_cpu.median_seconds({"round": of_engine, "program": alone})
    for stream in streams:
        stream.cancel()
        stream.result()
    return {f"{name}_seconds": s / steps for name, s in seconds.items()}


def prefix(model, params):
    """Seconds to the first token of a prompt, read whole and behind its stored prefix."""
    cache = v4jax.PrefixCache()
    options = {"slots": 1, "max_length": PREFIX.value + 256, "draft": None}
    cold = v4jax.Engine(model, params, **options)
    warm = v4jax.Engine(model, params, prefix_cache=cache, **options)
    prompt = prompts_of(1, PREFIX.value + 64)[0]
    request = v4jax.Request(prompt, max_new_tokens=1)
    runs = {
        "cold": lambda: cold.submit(request).result(),
        "warm": lambda: warm.submit(request).result(),
    }
    runs["warm"]()
    seconds = bench_cpu.median_seconds(runs)
    cached = warm.submit(request).result().cached_tokens
    return {f"{name}_first_token_seconds": s for name, s in seconds.items()} | {"cached": cached}


def main(_):
    with tempfile.TemporaryDirectory() as folder:
        theirs = bench_cpu.write_checkpoint(folder)
        model, params = v4jax.load(folder)
    if not bench_cpu.RIVAL.value:
        theirs = None
    began = time.time()
    engine, row = throughput(model, params, theirs)
    print(json.dumps(row), flush=True)
    row |= scheduling(engine, model, params)
    if PREFIX.value:
        row |= prefix(model, params)
    row |= {"what": "engine", "slots": SLOTS.value, "prompt": PROMPT.value, "new": NEW.value}
    print(json.dumps(row | {"minutes": (time.time() - began) / 60}), flush=True)
    if bench_cpu.OUT.value:
        with open(bench_cpu.OUT.value, "a") as file:
            file.write(json.dumps(bench_history.origin() | row) + "\n")


if __name__ == "__main__":
    app.run(main)
