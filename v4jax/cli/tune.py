"""Measure block sizes of the Pallas kernels on this device.

Progress goes to stderr, one summary line to stdout.
"""

import dataclasses
import json
import sys

from absl import flags

from v4jax.cli import compilation_cache
from v4jax.errors import InputError
from v4jax.files.writing import writable_file, writing

FLAGS = flags.FLAGS
OPS = ["sparse_attention", "indexer_topk", "grouped_matmul", "hyper_connections"]


def define_flags():
    """Declares the flags of this subcommand."""
    flags.DEFINE_string("out", None, "JSON file for the table; V4JAX_BLOCKS puts it in force")
    flags.DEFINE_multi_enum("op", OPS, OPS, "Operation to tune (default: all)")
    flags.DEFINE_integer("most", None, "Candidates of an operation to try at most", lower_bound=1)
    flags.DEFINE_boolean("tiny", False, "Small sizes, interpreted on a CPU: to try the command out")
    compilation_cache.define_flag()


def run() -> int:
    """Tunes, writes the table and says how many candidates ran; the exit status."""
    if not FLAGS.out:
        raise InputError("--out is missing; expected a file")
    writable_file(FLAGS.out, "--out")  # the end of an hour is no time to find out
    compilation_cache.begin()
    import tqdm

    from v4jax.files.atomic import write_atomically
    from v4jax.kernels import blocks
    from v4jax.kernels.bench import tune

    platform = _platform()
    count = sum(len(tune.candidates(platform, op)[: FLAGS.most]) for op in FLAGS.op)
    ran = []
    with tqdm.tqdm(total=count, unit="trial", disable=None) as bar:

        def report(trial):
            ran.append(trial)
            result = trial.failure or f"{1e3 * trial.score:.3f} ms"
            bar.write(f"{trial.op} {trial.sizes}: {result}", file=sys.stderr)
            bar.update()

        table = tune.tune(platform, FLAGS.op, report, FLAGS.tiny, FLAGS.most)
    chip = blocks.chip(platform)
    text = json.dumps({chip: dataclasses.asdict(table)}, indent=2) + "\n"
    with writing(FLAGS.out):
        write_atomically(FLAGS.out, text.encode())
    good = sum(not trial.failure for trial in ran)
    print(f"{good} of {len(ran)} candidates ran on {chip}: {FLAGS.out}")
    return 0


def _platform():
    """ "tpu" or "cuda", of this process's device."""
    import jax

    platform = jax.devices()[0].platform
    found = {"tpu": "tpu", "gpu": "cuda", "cpu": "cuda" if FLAGS.tiny else None}.get(platform)
    if found is None:
        raise InputError(
            f"this process has {platform} devices; v4jax tune measures on a TPU or GPU "
            "(--tiny tries the command out on a CPU)"
        )
    return found
