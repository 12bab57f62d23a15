"""Trains the small checkpoint that comes with v4jax, on the Python standard library's sources.

    python experiments/000_nano/train.py --minutes 20 --out v4jax/data/nano

One command from nothing to the checkpoint: tokenizer, training by the clock, weights rounded to
their stored form towards the end, export, held-out loss of what was exported. Figures and the curve
go to this folder. Stopped early (Ctrl-C), it leaves everything as it was.
"""

import csv
import functools
import json
import math
import platform
import time
from pathlib import Path

import corpus
import jax
import jax.numpy as jnp
import numpy as np
import objective
import optax
import storage
from absl import app, flags
from flax import struct
from tqdm import tqdm

import v4jax
from v4jax.model.transformer import Transformer

HERE = Path(__file__).parent
FLAGS = flags.FLAGS
flags.DEFINE_float("minutes", 20.0, "Time for everything, from the tokenizer to the last figure")
flags.DEFINE_integer("steps", None, "Train so many steps instead, however long they take")
flags.DEFINE_string("out", None, "Directory of the checkpoint; replaced when it is whole")
flags.DEFINE_string("figures", str(HERE), "Directory of metrics.csv, results.json and curve.png")
flags.DEFINE_integer("batch", 4, "Rows a step")
flags.DEFINE_integer("length", 512, "Tokens a row")
flags.DEFINE_float("learning_rate", 6e-3, "Peak, of Muon and AdamW alike")
flags.DEFINE_integer("seed", 0, "Of the weights, the order of the text and the hash tables")
flags.mark_flag_as_required("out")

WARM_UP = 0.03  # parts of the run; the learning rate then falls in a straight line to LAST_RATE
LAST_RATE = 0.02
ROUNDED_PART = 0.2  # the end of the run, with the weights in use rounded to their stored form
AFTER_TRAINING = 0.07  # part of the time that is kept for export and evaluation
SAMPLES = 10  # times that the loss of the first held-out rows is taken along the way
EVALUATED_ROWS = 8
BIAS_STEP = 1e-3


@struct.dataclass
class State:
    """All that a step changes."""

    params: dict
    buffers: dict
    moments: optax.OptState


def main(_):
    started = time.perf_counter()
    files = corpus.source_files()
    seen = [text for name, text in files.items() if not corpus.is_held_out(name)]
    held_out = [text for name, text in files.items() if corpus.is_held_out(name)]
    config = v4jax.get_config("nano")
    tokenizer = corpus.train_tokenizer(seen, config.vocab_size)
    stream = corpus.detach_spaces(corpus.encode(seen, tokenizer), tokenizer, FLAGS.seed)
    rows = corpus.held_out_rows(corpus.encode(held_out, tokenizer), FLAGS.length + 1)
    held_out_bytes = sum(len(text.encode()) for text in held_out)

    model = Transformer(config, dtype="float32")
    state, optimizer = fresh_state(model, stream)
    step = jax.jit(functools.partial(train_step, model, optimizer, storage.roles(model)))
    end = started + FLAGS.minutes * 60 * (1 - AFTER_TRAINING)
    state, metrics = train(step, state, stream, end, functools.partial(evaluate, model, rows=rows))

    variables = {"params": state.params, "buffers": state.buffers}
    kept = variables | {"params": storage.stored(state.params, storage.roles(model))}
    storage.export(Path(FLAGS.out), config, kept, tokenizer)
    tokens = rows.size - len(rows)
    results = {
        "parameters": sum(x.size for x in jax.tree.leaves(state.params)),
        "bytes": sum(path.stat().st_size for path in Path(FLAGS.out).iterdir()),
        "steps": metrics[-1]["step"],
        "tokens": metrics[-1]["step"] * FLAGS.batch * FLAGS.length,
        "text_tokens": int(stream.size),
        "training_seconds": metrics[-1]["seconds"],
        "held_out_tokens": tokens,
        "python": platform.python_version(),
        "jax": jax.__version__,
    }
    for name, (held_model, held_variables) in forms(model, variables).items():
        nats = evaluate(held_model, held_variables, rows)
        results[f"{name}_nats_per_token"] = nats
        results[f"{name}_bits_per_byte"] = nats / math.log(2) * tokens / held_out_bytes
        results[f"{name}_sample"] = evaluate(held_model, held_variables, rows, EVALUATED_ROWS)
    results["minutes"] = (time.perf_counter() - started) / 60
    write_figures(Path(FLAGS.figures), metrics, results)
    print(json.dumps(results, indent=2))


def fresh_state(model, stream):
    """Fresh weights, with hash tables made for this text, and the optimizer."""
    variables = jax.jit(model.init)(jax.random.key(FLAGS.seed))
    config = model.config
    count_V = np.bincount(stream, minlength=config.vocab_size)

    def table(path, leaf):
        if path[-1].key != "tid2eid":
            return leaf
        layer = int(path[0].key.removeprefix("layers_"))
        experts, k = config.n_routed_experts, config.num_experts_per_tok
        return jnp.asarray(corpus.hash_table(count_V, experts, k, FLAGS.seed + layer))

    buffers = jax.tree_util.tree_map_with_path(table, variables["buffers"])
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.contrib.muon(
            1.0,  # the rate of the moment is multiplied in by the step
            weight_decay=0.1,
            adam_b2=0.95,
            adam_weight_decay=0.1,
            consistent_rms=0.18,
            muon_weight_dimension_numbers=muon_axes,
        ),
    )
    return State(variables["params"], buffers, optimizer.init(variables["params"])), optimizer


def muon_axes(params):
    """Muon's reduction and output axes for matrices [..., out, in]; None for AdamW's leaves."""

    def axes(path, leaf):
        tables = path[0].key in ("embed", "head") or path[-1].key == "ape"
        if leaf.ndim < 2 or tables:
            return None
        return optax.contrib.MuonDimensionNumbers(reduction_axis=-1, output_axis=-2)

    return jax.tree_util.tree_map_with_path(axes, params)


def train_step(model, optimizer, role_of, state, rows_BT, rate, rounding):
    """One step; with `rounding` the gradients are those at the weights as they would be stored."""
    params = jax.lax.cond(
        rounding, lambda p: storage.rounded(p, role_of), lambda p: p, state.params
    )
    grads, noted, loads = objective.gradients(model, params, state.buffers, rows_BT)
    updates, moments = optimizer.update(grads, state.moments, state.params)
    new = jax.tree.map(lambda w, update: w + rate * update, state.params, updates)
    return State(new, balanced(state.buffers, loads), moments), noted


def balanced(buffers, loads):
    """The buffers with each router's bias moved towards the experts that got too few tokens."""

    def move(path, leaf):
        layer = path[0].key.removeprefix("layers_")
        if path[-1].key != "bias" or not layer.isdecimal():
            return leaf
        load = loads[int(layer)]
        return leaf + BIAS_STEP * jnp.sign(load.mean() - load)

    return jax.tree_util.tree_map_with_path(move, buffers)


def train(step, state, stream, end, sample):
    """Trains until `end`, or for --steps; the state and a row of figures a step."""
    feed = corpus.batches(stream, FLAGS.batch, FLAGS.length + 1, FLAGS.seed)
    scalars = (jnp.float32(0), jnp.bool(False))
    step = step.lower(state, jnp.asarray(next(feed)), *scalars).compile()
    begin, metrics, sampled = time.perf_counter(), [], 0
    layout = "{percentage:3.0f}%|{bar}| {elapsed}<{remaining}{postfix}"
    with tqdm(total=1.0, bar_format=layout) as bar:
        while bar.n < 1.0:
            rate = FLAGS.learning_rate * schedule(bar.n)
            rounding = bar.n >= 1 - ROUNDED_PART
            tick = time.perf_counter()
            state, noted = step(state, jnp.asarray(next(feed)), jnp.float32(rate), rounding)
            row = {"step": len(metrics) + 1, "rate": rate, "rounding": int(rounding)}
            row |= {name: float(value) for name, value in noted.items()}
            if not math.isfinite(row["loss"]):
                raise FloatingPointError(f"the loss is {row['loss']} at step {row['step']}")
            now = time.perf_counter()
            row["tokens_per_second"] = FLAGS.batch * FLAGS.length / (now - tick)
            row["seconds"] = now - begin
            row["held_out"] = ""
            if bar.n * SAMPLES >= sampled:
                variables = {"params": state.params, "buffers": state.buffers}
                row["held_out"] = sample(variables, limit=EVALUATED_ROWS)
                sampled += 1
            metrics.append(row)
            done = row["step"] / FLAGS.steps if FLAGS.steps else (now - begin) / (end - begin)
            bar.set_postfix_str(f"loss {row['loss']:.3f}, {row['tokens_per_second']:.0f} tokens/s")
            bar.update(min(done, 1.0) - bar.n)
    return state, metrics


def schedule(part):
    """The learning rate at a part of the run, as a part of its peak."""
    return min(1.0, (part + 1e-3) / WARM_UP) * (1 - (1 - LAST_RATE) * part)


@functools.partial(jax.jit, static_argnums=0)
def _total_nats(model, variables, rows_BT):
    logits = model.apply(variables, rows_BT[:, :-1]).logits
    return objective.cross_entropy(logits, rows_BT[:, 1:]).sum()


def evaluate(model, variables, rows, limit=None):
    """Nats a token of held-out rows, each read from its own beginning only."""
    rows = rows[:limit]
    total = 0.0
    for at in range(0, len(rows), EVALUATED_ROWS):
        part = rows[at : at + EVALUATED_ROWS]
        total += float(_total_nats(model, variables, jnp.asarray(part)))
    return total / (rows.size - len(rows))


def forms(model, variables):
    """What is evaluated at the end: the float32 masters, and the checkpoint as users load it."""
    return {"float32": (model, variables), "stored": v4jax.load(FLAGS.out)}


def write_figures(folder, metrics, results):
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "metrics.csv", "w", newline="") as file:
        table = csv.DictWriter(file, metrics[0].keys())
        table.writeheader()
        table.writerows(metrics)
    (folder / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    try:
        import matplotlib.pyplot as plt
    except ImportError:  # the curve is an extra: pip install "v4jax[plot]"
        return
    figure, axes = plt.subplots(figsize=(7, 4))
    steps = [row["step"] for row in metrics]
    axes.plot(steps, [row["loss"] for row in metrics], linewidth=0.7, label="training")
    sampled = [(row["step"], row["held_out"]) for row in metrics if row["held_out"] != ""]
    axes.plot(*zip(*sampled, strict=True), "o-", label="held out (8 rows)")
    first = next((row["step"] for row in metrics if row["rounding"]), None)
    if first is not None:
        axes.axvline(first, color="grey", linestyle=":", label="weights rounded from here")
    axes.set(xlabel="step", ylabel="nats a token", title="nano on the standard library")
    axes.legend()
    figure.savefig(folder / "curve.png", dpi=120, bbox_inches="tight")


if __name__ == "__main__":
    app.run(main)
