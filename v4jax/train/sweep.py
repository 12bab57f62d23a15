"""An experiment: DIR/sweep.py names its runs, each a config with some fields changed.

    CONFIG = "config.py"                     # next to it, or a path from the working directory
    RUNS = {"muon": {}, "adamw": {"optimizer.matrices": "adamw"}}    # "config": another file
    SEEDS = (0, 1, 2)                        # each sets seed and data.seed

Each run is a child process, `v4jax train` in RUNS/NAME_SEED: killed, the sweep goes on when run
again. At the end DIR/results.json, DIR/table.md and DIR/curves.png. Several runs at once divide the
cores; runs of a config share its compiled programs, in RUNS/compiled. Workers on other machines
have to find all paths where this one does.
"""

import concurrent.futures
import contextlib
import dataclasses
import itertools
import json
import os
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tqdm import tqdm

from v4jax.errors import InputError
from v4jax.files.atomic import write_atomically
from v4jax.files.writing import writable_directory, writing
from v4jax.lifeline import Child
from v4jax.train import config_file, curves
from v4jax.workers.crew import Crew
from v4jax.workers.pool import Make

TRAIN = ("-m", "v4jax.cli.main", "train")
SHOWN = ("loss", "held_out", "held_out_bits_per_byte", "tokens_per_second", "minutes")


def sweep(
    folder: Path,
    runs: Path,
    steps: int | None = None,
    jobs: int = 1,
    workers: Callable[[Make], Crew | None] = lambda make: None,
) -> str:
    """Runs all that is not complete, writes the results and returns the table.

    Args:
      jobs: runs at a time, in this process. workers: gives the crew that runs them instead.
    """
    experiment = _read(folder)
    # At the end of hours is no time to find out.
    writable_directory(runs, "--runs")
    writable_directory(folder, "the experiment's folder")
    # All runs of a seed first: stopped early, they can be compared.
    named = {
        f"{name}_{seed}": (name, seed) for seed in experiment.SEEDS for name in experiment.RUNS
    }
    tasks = [
        _Run(
            run,
            _command(folder, experiment, *of, runs / run, steps),
            str((runs / run).absolute()),
            os.getcwd(),
        )
        for run, of in named.items()
    ]
    _run_all(tasks, jobs, workers)
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in experiment.RUNS}
    for run, (name, _) in named.items():
        found[name].append(curves.lines_of(runs / run))
    results = {
        name: [curves.summary(lines) for lines in of_seeds] for name, of_seeds in found.items()
    }
    table = _table(results)
    for name, text in (("results.json", json.dumps(results, indent=1)), ("table.md", table)):
        with writing(folder / name):
            write_atomically(folder / name, text.encode() + b"\n")
    curves.draw(found, folder / "curves.png")
    return table


def _read(folder):
    path = folder / "sweep.py"
    if not os.path.isfile(path):
        raise InputError(f"{folder}: has no sweep.py; give a folder such as experiments/NNN_name")
    module = config_file.run_file(path)
    missing = [name for name in ("CONFIG", "RUNS", "SEEDS") if not hasattr(module, name)]
    if missing:
        raise InputError(f"{path}: has no {', '.join(missing)}; expected CONFIG, RUNS and SEEDS")
    if not (_is_runs(module.RUNS) and _is_seeds(module.SEEDS)):
        raise InputError(
            f"{path}: RUNS is {module.RUNS!r:.200} and SEEDS {module.SEEDS!r:.200}; expected "
            "{NAME: {FIELD: VALUE}} and whole numbers, at least one of each"
        )
    return module


def _is_runs(runs):
    return isinstance(runs, dict) and runs and all(isinstance(c, dict) for c in runs.values())


def _is_seeds(seeds):
    return isinstance(seeds, tuple | list | range) and seeds and all(type(s) is int for s in seeds)


def _file(folder, name):
    return folder / name if os.path.isfile(folder / name) else Path(name)


def _command(folder, experiment, name, seed, workdir, steps):
    changes = experiment.RUNS[name] | {"seed": seed, "data.seed": seed}
    config = _file(folder, changes.pop("config", experiment.CONFIG))
    found = [f"--config={config}", f"--workdir={workdir}"] + ([f"--steps={steps}"] if steps else [])
    return (*TRAIN, *found, *(f"--config.{key}={value}" for key, value in changes.items()))


@dataclasses.dataclass(frozen=True)
class _Run:
    """One run: its name, what Python is given, and the directories that it works in."""

    name: str
    command: tuple[str, ...]
    workdir: str
    directory: str

    def __str__(self) -> str:
        return f"the run {self.name}"


def _run_all(tasks, jobs, workers):
    """By workers, or by threads of this process; what a run prints is in its log.txt."""
    with contextlib.ExitStack() as stack:
        crew = workers(_Trainer)
        bar = tqdm(total=len(tasks), unit="run", dynamic_ncols=True, disable=None)
        stack.enter_context(bar)

        def done(task, _):
            bar.n += 1
            if bar.disable:  # into a pipe: a line per run instead
                said = f"v4jax sweep: {task.name} is complete, {bar.n} of {len(tasks)}"
                print(said, file=sys.stderr, flush=True)
            bar.set_postfix_str(task.name, refresh=False)
            bar.update(0)

        if crew is None:
            _run_here(tasks, jobs, done)
        else:
            stack.enter_context(crew).run(tasks, done)


def _run_here(tasks, jobs, done):
    """Children of this process, each on its own part of the cores."""
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    parts = itertools.cycle([cores[i::jobs] for i in range(jobs)])

    def divide():
        if jobs <= len(cores):  # a thread's children inherit its cores
            os.sched_setaffinity(0, next(parts))

    with concurrent.futures.ThreadPoolExecutor(jobs, initializer=divide) as pool:
        waiting = {pool.submit(_train, task): task for task in tasks}
        try:
            for each in concurrent.futures.as_completed(waiting):
                done(waiting[each], each.result())
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


class _Trainer:
    """What a worker is."""

    def __call__(self, task: _Run) -> None:
        _train(task)


def _train(task):
    """One run, in a child that ends with this process: nobody else may be training there then."""
    workdir = Path(task.workdir)
    environment = {"JAX_COMPILATION_CACHE_DIR": str(workdir.parent / "compiled")} | os.environ
    log = workdir / "log.txt"
    with writing(log):
        workdir.mkdir(parents=True, exist_ok=True)
        file = log.open("ab")
    command = [sys.executable, *task.command]
    options = {"stdout": file, "stderr": file, "cwd": task.directory}
    with file, Child(command, environment, **options) as child:
        try:
            status = child.wait()
        except BaseException:
            child.kill()
            raise
    if status:
        said = log.read_text(errors="replace").strip().splitlines()[-1:]
        raise InputError(
            f"the run {workdir} ended with status {status}: {''.join(said)}; mend what it says "
            f"(all of it is in {log}) and run the sweep again: complete runs are not run again"
        )


def _table(results):
    """A line per run: mean and standard deviation over seeds.

    At its end the held-out loss less the first run's of the same seed, mean and standard error.
    """
    first = next(iter(results))
    names = [*SHOWN, f"held_out less {first}'s"]
    lines = ["| run | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    for name, of_seeds in results.items():
        cells = []
        for field in SHOWN:
            values = [seed[field] for seed in of_seeds if field in seed]
            spread = f" ± {statistics.stdev(values):.2g}" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.4g}{spread}" if values else "-")
        cells.append(_less(of_seeds, results[first]) if name != first else "")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _less(of_seeds, first):
    pairs = zip(of_seeds, first, strict=False)  # seeds that both have
    both = [(a, b) for a, b in pairs if "held_out" in a.keys() & b.keys()]
    off = [a["held_out"] - b["held_out"] for a, b in both]
    if len(off) < 2:
        return f"{off[0]:+.3f}" if off else "-"
    return f"{statistics.mean(off):+.3f} ± {statistics.stdev(off) / len(off) ** 0.5:.2g}"
