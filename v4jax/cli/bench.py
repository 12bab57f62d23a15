"""Measure the engine on a described load: tokens per second and both waits.

Requests of random tokens come so many at a time, or at random times so many a second. A table goes
to stdout (or one JSON object), progress to stderr, and with --out a picture of both waits.
"""

import json
import sys

from absl import flags

from v4jax.cli import compilation_cache, draft_flags
from v4jax.engine.load import Load
from v4jax.errors import InputError
from v4jax.files.writing import writable_file
from v4jax.tables import percent, table

FLAGS = flags.FLAGS


def define_flags():
    """Declares the flags of this subcommand."""
    flags.DEFINE_string("checkpoint", "nano", "Checkpoint directory, or the name of a packaged one")
    flags.DEFINE_integer("requests", 64, "Requests in all")
    flags.DEFINE_integer("concurrency", 8, "Requests under way at any time")
    flags.DEFINE_float("rate", 0.0, "Arrivals a second at random times, in place of --concurrency")
    flags.DEFINE_integer("prompt_tokens", 512, "Tokens of each prompt")
    flags.DEFINE_integer("new_tokens", 128, "Tokens of each answer")
    flags.DEFINE_float("shared", 0.0, "Share of each prompt that is the same in all, 0 to 1")
    flags.DEFINE_float("temperature", 0.0, "0 takes the most likely token")
    flags.DEFINE_integer("seed", 0, "Of prompts, arrivals and answers")
    flags.DEFINE_integer(
        "slots", None, "Requests decoded together (default: the concurrency, or 8)"
    )
    flags.DEFINE_integer("prefill_chunk", None, "Tokens of a prompt read between two rounds")
    draft_flags.define_flags(rule=True)
    flags.DEFINE_boolean("prefix_cache", False, "Keep prefixes of prompts in memory")
    flags.DEFINE_enum("dtype", None, ["float32", "bfloat16"], "Activations (default: the model's)")
    flags.DEFINE_enum("numerics", None, ["native"], "native: the official FP8 and FP4 rounding")
    flags.DEFINE_enum("format", "text", ["text", "json"], "json: one object on stdout")
    flags.DEFINE_string("out", None, "PNG file for the distribution of the waits")
    compilation_cache.define_flag()


def run() -> int:
    """Loads, compiles, serves the load and reports; the exit status."""
    load = _load()
    if FLAGS.out:
        writable_file(FLAGS.out, "--out", ".png")
    compilation_cache.begin()
    import tqdm

    from v4jax.engine import load as load_lib

    engine = _engine(load)
    print("compiling ...", end="", file=sys.stderr, flush=True)
    print(f" {engine.warm_up():.1f} s", file=sys.stderr)
    with engine, tqdm.tqdm(total=load.requests, unit="request", disable=None) as bar:
        report = load_lib.run(engine, load, bar.update)
    times = report.pop("times")
    if FLAGS.format == "json":
        print(json.dumps({"checkpoint": FLAGS.checkpoint} | report))
    else:
        print(_text(report))
    if FLAGS.out:
        _draw(times, report)
    return 0


def _load():
    # A rate stands in place of the default concurrency.
    concurrency = FLAGS.concurrency
    if FLAGS.rate and not FLAGS["concurrency"].present:
        concurrency = 0
    names = ("requests", "rate", "prompt_tokens", "new_tokens", "shared", "temperature", "seed")
    return Load(concurrency=concurrency, **{name: getattr(FLAGS, name) for name in names})


def _engine(load):
    from v4jax.checkpoints.load import load as load_checkpoint
    from v4jax.engine.engine import Engine
    from v4jax.engine.prefix_cache import PrefixCache

    model, params = load_checkpoint(FLAGS.checkpoint, dtype=FLAGS.dtype, numerics=FLAGS.numerics)
    return Engine(
        model,
        params,
        slots=(load.concurrency or 8) if FLAGS.slots is None else FLAGS.slots,
        max_length=load.prompt_tokens + load.new_tokens,
        prefill_chunk=FLAGS.prefill_chunk,
        draft=draft_flags.draft(),
        draft_rule=FLAGS.draft_rule,
        prefix_cache=PrefixCache() if FLAGS.prefix_cache else None,
        programs=compilation_cache.programs(),
    )


def _text(report):
    rows = [
        [name.replace("_", " "), *(f"{1e3 * value:.1f} ms" for value in report[name].values())]
        for name in ("first_token", "between_tokens")
        if report[name] is not None
    ]
    drafts = report["acceptance"]
    lines = [
        f"{report['output_tokens']} tokens in {report['seconds']:.2f} s: "
        f"{report['tokens_per_second']:.1f} tokens/s, {report['rounds']} rounds",
        table(["", "median", "95 %", "99 %"], rows),
        f"drafts accepted: {'no draft' if drafts is None else percent(drafts)}; prompt tokens from "
        f"the prefix cache: {report['cached_tokens']} of {report['prompt_tokens']}; compilations "
        f"while serving: {report['compilations']}",
    ]
    return "\n".join(lines)


def _draw(times, report):
    """Both waits as the share of requests or tokens that waited no longer."""
    from v4jax import extras

    extras.require("matplotlib", "plot", "drawing")
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    import numpy as np

    figure, axes = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    titles = {"first_token": "Time to the first token", "between_tokens": "Time between tokens"}
    for axis, (name, title) in zip(axes, titles.items(), strict=True):
        values = np.sort(times[name])
        if len(values):
            axis.plot(1e3 * values, 100 * np.arange(1, len(values) + 1) / len(values))
            axis.axvline(1e3 * float(np.median(values)), linestyle=":", color="gray")
        axis.set(title=title, xlabel="milliseconds (dotted: median)", ylabel="share below, %")
        axis.set_ylim(0, 102)
    load = report["load"]
    many = f"{load['concurrency']} at a time" if load["concurrency"] else f"{load['rate']} per s"
    figure.suptitle(
        f"{load['requests']} requests, {many}, {load['prompt_tokens']} + {load['new_tokens']} "
        f"tokens: {report['tokens_per_second']:.0f} tokens/s"
    )
    try:
        figure.savefig(FLAGS.out)
    except OSError as error:
        raise InputError(f"--out {FLAGS.out} cannot be written: {error.strerror}") from error
    print(f"v4jax bench: {FLAGS.out}", file=sys.stderr)
