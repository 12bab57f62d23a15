"""An experiment: DIR/sweep.py names its runs, each a config with some fields changed.

    CONFIG = "config.py"                     # beside it, or a path from the working directory
    RUNS = {"muon": {}, "adamw": {"optimizer.matrices": "adamw"}}    # "config": another file
    SEEDS = (0, 1, 2)                        # each sets seed and data.seed

Each run is a child process, `v4jax train` in RUNS/NAME_SEED: killed, the sweep goes on when run
again. At the end DIR/results.json, DIR/table.md and DIR/curves.png.
"""

import importlib.util
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from v4jax.errors import InputError
from v4jax.train import curves

SHOWN = ("loss", "held_out", "held_out_bits_per_byte", "tokens_per_second", "minutes")


def sweep(folder: Path, runs: Path, steps: int | None = None) -> str:
    """Runs all that is not complete, writes the results and returns the table."""
    experiment = _read(folder)
    found: dict[str, list[dict[str, Any]]] = {}
    for seed in experiment.SEEDS:  # all runs of a seed first: stopped early, they can be compared
        for name, changes in experiment.RUNS.items():
            workdir = runs / f"{name}_{seed}"
            fields = {k: v for k, v in changes.items() if k != "config"}
            config = _file(folder, changes.get("config", experiment.CONFIG))
            _train(config, workdir, fields | {"seed": seed, "data.seed": seed}, steps)
            found.setdefault(name, []).append(curves.lines_of(workdir))
    results = {
        name: [curves.summary(lines) for lines in of_seeds] for name, of_seeds in found.items()
    }
    table = _table(results)
    (folder / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    (folder / "table.md").write_text(table + "\n")
    drawn = {f"{n} {s}": lines for n, many in found.items() for s, lines in enumerate(many)}
    curves.draw(drawn, folder / "curves.png")
    return table


def _read(folder):
    path = folder / "sweep.py"
    if not path.is_file():
        raise InputError(f"{folder}: has no sweep.py; give a folder such as experiments/NNN_name")
    spec = importlib.util.spec_from_file_location("v4jax_sweep", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    missing = [name for name in ("CONFIG", "RUNS", "SEEDS") if not hasattr(module, name)]
    if missing:
        raise InputError(f"{path}: has no {', '.join(missing)}; expected CONFIG, RUNS and SEEDS")
    return module


def _file(folder, name):
    return folder / name if (folder / name).is_file() else Path(name)


def _train(config, workdir, changes, steps):
    command = [sys.executable, "-m", "v4jax.cli.main", "train", f"--config={config}"]
    command += [f"--workdir={workdir}"] + ([f"--steps={steps}"] if steps else [])
    command += [f"--config.{key}={value}" for key, value in changes.items()]
    print(f"v4jax sweep: {workdir.name}", file=sys.stderr)
    status = subprocess.run(command, stdout=sys.stderr, check=False).returncode
    if status:
        raise InputError(
            f"the run {workdir} ended with status {status}; mend what it says and run the sweep "
            "again: runs that are complete are not run again"
        )


def _table(results):
    """Mean and standard deviation over seeds, a line a run."""
    lines = ["| run | " + " | ".join(SHOWN) + " |", "|---" * (len(SHOWN) + 1) + "|"]
    for name, of_seeds in results.items():
        cells = []
        for field in SHOWN:
            values = [seed[field] for seed in of_seeds if field in seed]
            spread = f" ± {statistics.stdev(values):.2g}" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.4g}{spread}" if values else "-")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)
