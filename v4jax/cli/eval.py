"""Evaluate a checkpoint or an endpoint: long context, tool calls, latency, cost, data controls.

Records go to --out as they are made: the same command again goes on where the last one ended. A
table goes to stdout (or, with --format json, the summary), progress to stderr.
"""

import json
import os
import sys
from pathlib import Path

import tqdm
from absl import flags

import v4jax
from v4jax.cli import compilation_cache
from v4jax.errors import InputError
from v4jax.eval import sample as sample_lib
from v4jax.eval import suites
from v4jax.eval.records import Records
from v4jax.eval.suite import run as run_suite
from v4jax.eval.summary import as_table, summarize, write_summary

FLAGS = flags.FLAGS
KEY = "V4JAX_API_KEY"


def define_flags():
    """Declares the flags of this subcommand."""
    flags.DEFINE_string("checkpoint", "nano", "Checkpoint directory, or the name of a packaged one")
    flags.DEFINE_string("endpoint", None, "URL of an OpenAI-compatible API, in its place")
    flags.DEFINE_string("model", None, "Name of the endpoint's model")
    flags.DEFINE_string("api_key", None, f"Key of the endpoint (default: {KEY}, if it is set)")
    flags.DEFINE_string("tokenizer", None, "Checkpoint whose tokenizer the endpoint's model has")
    flags.DEFINE_float("timeout", 600.0, "Seconds that the endpoint may be silent", lower_bound=0.1)
    flags.DEFINE_string("lengths", None, "Tokens of prompt and answer, as 512,1024")
    flags.DEFINE_integer("samples", 20, "Samples of each task and length")
    flags.DEFINE_string("tasks", "", "Tasks of the suite, as single_1,multikey_2 (default: all)")
    flags.DEFINE_integer("seed", 0, "The same seed makes the same samples")
    flags.DEFINE_enum(
        "style", None, sample_lib.STYLES, "How it is asked (default: as the model can be)"
    )
    flags.DEFINE_integer("concurrency", 1, "Questions under way at a time", lower_bound=1)
    flags.DEFINE_float("minutes", None, "Begin nothing after so long", lower_bound=0.0)
    flags.DEFINE_boolean("prefix_cache", True, "Read prefixes that prompts share once")
    flags.DEFINE_enum("dtype", None, ["float32", "bfloat16"], "Activations (default: the model's)")
    flags.DEFINE_enum("numerics", None, ["native"], "native: the official FP8 and FP4 rounding")
    flags.DEFINE_string("out", None, "Directory of the records (default: evals/SUITE-MODEL)")
    flags.DEFINE_enum("format", "text", ["text", "json"], "json: the summary on stdout")
    compilation_cache.define_flag()


def run(suite: str, *directories: str) -> int:
    """Runs what is left of a suite and reports; the exit status."""
    jobs_of = suites.find(suite)
    if directories:
        raise InputError(f"there is an argument too many, {directories[0][:100]!r}")
    lengths = _lengths(suite)
    compilation_cache.begin()
    target = _target(max(lengths))
    try:
        settings = suites.Settings(lengths, FLAGS.samples, FLAGS.seed, target.style, _tasks())
        jobs = jobs_of(settings)
        with Records(_out(suite, target), _identity(suite, target)) as records:
            left = _work(jobs, target, records)
            summary = summarize(_identity(suite, target), _of(jobs, records))
    finally:
        target.close()
    write_summary(records.directory, summary)
    _print(summary, records.directory, left)
    return 0


def _work(jobs, target, records):
    """Runs the jobs with a bar; how many were left."""
    there = sum(job.key in records.done for job in jobs)
    if there:
        _say(f"{there} of {len(jobs)} records are there already, in {records.directory}")
    deadline = None
    if FLAGS.minutes is not None:
        import time

        deadline = time.monotonic() + 60 * FLAGS.minutes
    with tqdm.tqdm(total=len(jobs), initial=there, unit="sample", disable=None) as bar:

        def progress(record):
            bar.set_postfix_str(f"{record['task']} {record['length']}", refresh=False)
            bar.update()

        return run_suite(jobs, target, records, FLAGS.concurrency, progress, deadline)


def _of(jobs, records):
    """The records of these jobs: the directory may have those of other lengths too."""
    return [records.done[job.key] for job in jobs if job.key in records.done]


def _target(longest):
    if FLAGS.endpoint is None:
        if FLAGS.model is not None:
            raise InputError("--model is given without --endpoint; name a --checkpoint, or both")
        from v4jax.eval.engine_target import EngineTarget

        return EngineTarget(
            FLAGS.checkpoint,
            longest,
            slots=FLAGS.concurrency,
            style=FLAGS.style,
            prefix_cache=FLAGS.prefix_cache,
            dtype=FLAGS.dtype,
            numerics=FLAGS.numerics,
            programs=compilation_cache.programs(),
        )
    return _endpoint(longest)


def _endpoint(longest):
    from v4jax.eval.endpoint import EndpointTarget
    from v4jax.infer.tokenizer import Tokenizer

    if FLAGS["checkpoint"].present:
        raise InputError("--checkpoint and --endpoint are both given; expected one of them")
    if not FLAGS.model:
        raise InputError("--model is missing; expected the name of the endpoint's model")
    target = EndpointTarget(
        FLAGS.endpoint,
        FLAGS.model,
        key=FLAGS.api_key or os.environ.get(KEY),
        style=FLAGS.style or "chat",
        tokenizer=Tokenizer(FLAGS.tokenizer) if FLAGS.tokenizer else None,
        timeout=FLAGS.timeout,
        tell=_say,
    )
    if target.max_length is not None and longest > target.max_length:
        raise InputError(
            f"the longest of --lengths is {longest} tokens, and {FLAGS.model} at {FLAGS.endpoint} "
            f"reads at most {target.max_length}: give shorter ones"
        )
    return target


def _lengths(suite):
    text = FLAGS.lengths if FLAGS.lengths is not None else "512,1024,2048,4096"
    try:
        return tuple(int(part) for part in text.split(",") if part.strip())
    except ValueError as error:
        raise InputError(
            f"--lengths is {text[:100]!r}; expected whole numbers between commas, such as 512,1024"
        ) from error


def _tasks():
    return tuple(part.strip() for part in FLAGS.tasks.split(",") if part.strip())


def _identity(suite, target):
    return {
        "suite": suite,
        "seed": FLAGS.seed,
        "version": v4jax.__version__,
        "tasks": suites.VERSION,
        **target.identity,
    }


def _out(suite, target) -> Path:
    return Path(FLAGS.out or f"evals/{suite}-{target.name.replace('/', '-')}")


def _print(summary, directory, left):
    if FLAGS.format == "json":
        print(json.dumps(summary))
    else:
        print(as_table(summary))
    if left:
        _say(f"{left} samples are left for want of time; the same command goes on with them")
    _say(f"v4jax eval: {directory}")


def _say(sentence):
    print(sentence, file=sys.stderr, flush=True)
