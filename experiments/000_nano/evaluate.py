"""How well nano and its rival read files they have not seen, and whether they find a needle.

    python experiments/000_nano/evaluate.py [NAME=CHECKPOINT ...]
    python experiments/000_nano/evaluate.py --draw

By default of nano, of its first run and of the rival, as exported. Adds to held_out.json and draws
needle.png here; with --draw it only draws what held_out.json has.
"""

import functools
import json
import lzma
import math
import sys
import zlib
from pathlib import Path

import config
import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import text as facts
from tqdm import tqdm

import v4jax
from v4jax.datasets import files
from v4jax.datasets.config import DataConfig
from v4jax.datasets.rows import TextRows, take
from v4jax.datasets.source import open_source
from v4jax.train import evaluate
from v4jax.train.batch import make_batch

matplotlib.use("Agg")
import matplotlib.pyplot as plt

HERE = Path(__file__).parent
RUNS = {
    "nano": "recall",
    "nano_first_run": "nano_0",
    "baseline": "baseline_0",
    "baseline_second_run": "baseline_recall",
}
RUNS = {name: HERE / "runs" / run / "model" for name, run in RUNS.items()}
LABELS = {
    "nano": "nano, second run",
    "nano_first_run": "nano, first run",
    "baseline": "the rival, first run",
    "baseline_second_run": "the rival, second run",
}
HELD_OUT = config.get_config().data.held_out  # files are told apart by their names
LENGTHS = (512, 4096)
NEEDLE_LENGTHS = (512, 1024, 2048, 4096, 8192)
TRIALS = 40


def main(arguments):
    if arguments == ["--draw"]:
        draw(json.loads((HERE / "held_out.json").read_text()))
        return
    checkpoints = dict(a.split("=", 1) for a in arguments) or RUNS
    out = HERE / "held_out.json"
    results = json.loads(out.read_text()) if out.exists() else {}
    results["compressors_bits_per_byte"] = compressors()
    for name, directory in checkpoints.items():
        model, variables = v4jax.load(str(directory))
        tokenizer = v4jax.Tokenizer(directory)
        data = DataConfig("python", tokenizer=str(directory), held_out=HELD_OUT)
        source = open_source(data, model.config)
        run = jax.jit(functools.partial(evaluate.sums, model))
        last = jax.jit(functools.partial(last_logits, model))
        found = {str(n): bits_per_byte(run, variables, source, n) for n in LENGTHS}
        needles = {str(n): needle(last, variables, source, tokenizer, n) for n in NEEDLE_LENGTHS}
        results[name] = {"bits_per_byte": found, "needle_found": needles}
        results[name]["first_rows_nats_per_token"] = first_rows(run, variables, source)
        print(name, json.dumps(results[name]))
    out.write_text(json.dumps(results, indent=1) + "\n")
    draw(results)


def compressors():
    """Of the held-out text alone, and as what it adds to the training text before it."""
    documents = files.python_documents()
    kept = [files.is_held_out(d.name, HELD_OUT) for d in documents]
    texts = [d.pieces[0][0].encode() for d in documents]
    train = b"".join(t for t, k in zip(texts, kept, strict=True) if not k)
    held_out = b"".join(t for t, k in zip(texts, kept, strict=True) if k)
    xz = functools.partial(lzma.compress, preset=9 | lzma.PRESET_EXTREME)
    zipped = functools.partial(zlib.compress, level=9)
    found = {}
    for name, squeeze in (("zlib", zipped), ("xz", xz)):
        alone, both = len(squeeze(held_out)), len(squeeze(train + held_out))
        found[name] = 8 * alone / len(held_out)
        found[f"{name}_after_training_text"] = 8 * (both - len(squeeze(train))) / len(held_out)
    return found


def bits_per_byte(run, variables, source, length):
    """Rows side by side, each read from its own beginning only."""
    of = TextRows(source.held_out, 0)
    total = np.zeros(3)
    rows = (source.held_out.ids.size - length) // length
    for number in tqdm(range(rows), desc=f"{length} tokens", unit="row", disable=None):
        batch = make_batch(*take(of, range(number, number + 1), 0, length, 1), 1)
        total += jax.device_get(run(variables, batch))
    targets = source.held_out.ids.size - source.held_out.starts.size
    return total[0] / total[2] / math.log(2) * targets / source.held_out_bytes


def first_rows(run, variables, source):
    """What tests/test_nano.py measures again."""
    batch = make_batch(*take(TextRows(source.held_out, 0), range(8), 0, 512, 1), 1)
    nats, _, count = jax.device_get(run(variables, batch))
    return float(nats / count)


def last_logits(model, variables, ids_BT):
    return model.apply(variables, ids_BT, logits="last").logits[:, -1]


def needle(last, variables, source, tokenizer, length):
    """How many of the answers are the likeliest word: of words of one token, in the file format of
    text.py, at a place drawn evenly from a haystack of held-out code."""
    rng = np.random.default_rng(length)
    words = [w for w in facts.WORDS if len(tokenizer.encode(f" {w}")) == 1]
    right = 0
    for _ in tqdm(range(TRIALS), desc=f"needle in {length}", unit="trial", disable=None):
        key, value = rng.choice(words, 2, replace=False)
        told = tokenizer.encode(f"\n{facts.remember(key, value)}\n")
        asked = tokenizer.encode(f"\n{facts.recall(key)}")
        hay = length - len(told) - len(asked)
        start = rng.integers(source.held_out.ids.size - hay)
        at = rng.integers(hay + 1)
        before, after = np.split(source.held_out.ids[start : start + hay], [at])
        ids = np.concatenate([before, told, after, asked]).astype(np.int32)
        (answer,) = tokenizer.encode(f" {value}")
        right += int(jnp.argmax(last(variables, ids[None])[0]) == answer)
    return right / TRIALS


def draw(results):
    figure, axis = plt.subplots(figsize=(7, 3.6), layout="constrained")
    measured = {name: results[name]["needle_found"] for name in RUNS if name in results}
    for (name, found), marker in zip(measured.items(), "osxd", strict=False):  # three lie together
        lengths, percent = [int(n) for n in found], [100 * share for share in found.values()]
        axis.plot(lengths, percent, marker=marker, fillstyle="none", label=LABELS[name])
    axis.axvline(4096, color="grey", linestyle=":", label="longest row in training")
    axis.axhline(100 / len(facts.WORDS), color="grey", linewidth=0.7, label="a guess")
    axis.set(xscale="log", ylim=(-4, 104), xlabel="context, tokens", ylabel="needles found, %")
    axis.set_title(f"One fact in held-out code, asked for at the end ({TRIALS} per point)")
    axis.set_xticks(NEEDLE_LENGTHS, [f"{n:,}" for n in NEEDLE_LENGTHS])
    axis.minorticks_off()
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8, loc="center left")
    figure.savefig(HERE / "needle.png", dpi=110)


if __name__ == "__main__":
    main(sys.argv[1:])
