"""Run an experiment: every changed config a child process that can resume; a table and a plot."""

import sys
from pathlib import Path

from absl import flags

from v4jax.cli import compilation_cache, worker_flags
from v4jax.errors import InputError

FLAGS = flags.FLAGS


def define_flags():
    """Declares the flags of this subcommand."""
    flags.DEFINE_string("runs", None, "Directory of the runs; default: DIR/runs")
    flags.DEFINE_integer("steps", None, "Stop every run at this step", lower_bound=1)
    compilation_cache.define_flag("RUNS/compiled")
    flags.DEFINE_integer("jobs", 1, "Runs at a time, each on its part of the cores", lower_bound=1)
    worker_flags.define_flags("--jobs at a time, by this process")


def run(directory: str) -> int:
    """Runs what is left to run and writes the result; the exit status."""
    from v4jax.train import sweep

    worker_flags.check()
    if FLAGS.executor != worker_flags.LOCAL and FLAGS["jobs"].present:
        raise InputError(
            f"--jobs is given with --executor {FLAGS.executor}; expected --workers there"
        )
    compilation_cache.begin(default=False)
    folder = Path(directory)
    runs = Path(FLAGS.runs) if FLAGS.runs else folder / "runs"

    def workers(make):
        return worker_flags.crew(make, 1, lambda said: print(said, file=sys.stderr, flush=True))

    table = sweep.sweep(folder, runs, FLAGS.steps, FLAGS.jobs, workers)
    print(table)
    return 0
