"""Plans every cell of the table, writes it and draws cells.png: `python make_table.py [CELL ...]`.

A cell is a process of its own, so that its peak memory is its own; one that is done already is not
done again (delete its file in cells/ for that). Without names all of them; --table only writes and
draws.
"""

import json
import pathlib
import subprocess
import sys

HERE = pathlib.Path(__file__).parent
CELLS = HERE / "cells"
MILLION = 1 << 20

# Training: the report's batch (75.5 M and 94.4 M tokens) as rows. Slices are v5p's.
JOBS = {
    "flash_decode_128k": ("flash", "decode", 131072, 128),
    "flash_decode_1m": ("flash", "decode", MILLION, 8),
    "flash_prefill_1m": ("flash", "prefill", MILLION, 1),
    "flash_train_4k": ("flash", "train", 4096, 18432),
    "flash_train_64k": ("flash", "train", 65536, 1152),
    "flash_train_1m": ("flash", "train", MILLION, 72),
    "pro_decode_128k": ("pro", "decode", 131072, 128),
    "pro_decode_1m": ("pro", "decode", MILLION, 8),
    "pro_prefill_1m": ("pro", "prefill", MILLION, 1),
    "pro_train_4k": ("pro", "train", 4096, 23040),
    "pro_train_64k": ("pro", "train", 65536, 1440),
    "pro_train_1m": ("pro", "train", MILLION, 90),
}
# Where each was found to fit, so that it needs no search: slice, mesh and what else was set.
FOUND = {
    "flash_decode_128k": ("v5p:2x2x1", "expert=4", "--numerics", "native"),
    "flash_decode_1m": ("v5p:2x2x1", "expert=4", "--numerics", "native"),
    "flash_prefill_1m": ("v5p:2x2x4", "expert=16", "--waves", "8"),
    "flash_train_4k": ("v5p:4x4x8", "fsdp=16,expert=8", "--parts", "144"),
    "flash_train_64k": ("v5p:4x4x8", "expert=8,sequence=16", "--parts", "144"),
    "flash_train_1m": ("v5p:4x8x8", "expert=8,sequence=32", "--parts", "72"),
    "pro_decode_128k": ("v5p:2x2x4", "expert=8,tensor=2", "--numerics", "native"),
    "pro_decode_1m": ("v5p:2x2x4", "expert=4,tensor=4", "--numerics", "native"),
    "pro_prefill_1m": ("v5p:2x4x4", "expert=32", "--waves", "16"),
    "pro_train_4k": ("v5p:8x8x16", "fsdp=16,expert=16,sequence=4", "--parts", "90"),
    "pro_train_64k": ("v5p:8x8x16", "expert=16,sequence=64", "--parts", "90"),
    "pro_train_1m": ("v5p:8x8x16", "expert=16,sequence=64", "--parts", "90"),
}


def main(names):
    CELLS.mkdir(exist_ok=True)
    for name in names or JOBS:
        if not _path(name).exists():
            _plan(name)
    report()


def _path(name):
    return CELLS / f"{name}.json"


def command(name):
    """The command line of a cell."""
    config, mode, context, batch = JOBS[name]
    topology, mesh, *more = FOUND[name]
    job = ["--config", config, "--mode", mode, "--context", str(context), "--batch", str(batch)]
    return ["v4jax", "plan", *job, "--topology", topology, "--mesh", mesh, *more]


def _plan(name):
    words = [sys.executable, "-m", "v4jax.cli.main", *command(name)[1:], "--format", "json"]
    print(" ".join(command(name)), file=sys.stderr)
    done = subprocess.run(words, stdout=subprocess.PIPE, text=True, check=False)
    if done.stdout:
        _path(name).write_text(done.stdout)


def report():
    """table.md and cells.png, of the cells that are done."""
    (HERE / "table.md").write_text(table())
    draw({name: json.loads(_path(name).read_text()) for name in JOBS if _path(name).exists()})


def table():
    """All cells that are done, as a Markdown table."""
    head = (
        "step", "slice", "mesh", "weights + optimizer + cache", "temporaries", "peak", "left",
        "exchanged", "compute / memory / interconnect", "at least", "compiled in",
    )  # fmt: skip
    rows = [
        _row(name, json.loads(_path(name).read_text())) for name in JOBS if _path(name).exists()
    ]
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def draw(plans):
    """Memory of a device by what takes it, and the three terms of a step's time."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4.8), layout="constrained")
    memory, time = figure.subplots(1, 2, sharey=True)
    labels = [f"{name.replace('_', ' ')}, {plan['devices']} chips" for name, plan in plans.items()]
    left = [0.0] * len(plans)
    for kind in ("weights", "optimizer", "cache", "temporaries"):
        gigabytes = [(plan["per_device"][kind] or 0) / 1e9 for plan in plans.values()]
        memory.barh(labels, gigabytes, left=left, label=kind)
        left = [a + b for a, b in zip(left, gigabytes, strict=True)]
    capacity = max(plan["per_device"]["capacity"] for plan in plans.values()) / 1e9
    memory.axvline(capacity, color="black", linestyle=":", label=f"capacity, {capacity:.1f} GB")
    memory.set(title="Memory of a device", xlabel="GB", xlim=(0, 1.02 * capacity))
    for term, mark in (("compute", "o"), ("memory", "s"), ("interconnect", "^")):
        time.plot([plan["seconds"][term] for plan in plans.values()], labels, mark, label=term)
    time.set(title="Least time of a step, by term", xlabel="seconds", xscale="log")
    for panel in (memory, time):
        panel.grid(alpha=0.3, axis="x")
        panel.legend(fontsize=8)
    memory.invert_yaxis()
    figure.suptitle("Steps of Flash and Pro on v5p slices, as compiled and counted", fontsize=12)
    figure.savefig(HERE / "cells.png", dpi=110)


def _row(name, plan):
    device, seconds = plan["per_device"], plan["seconds"]
    mesh = ", ".join(f"{axis} {size}" for axis, size in plan["mesh"].items() if size > 1)
    if plan["microbatches"] > 1:
        mesh += f"; {plan['microbatches']} microbatches"
    if plan.get("waves", 1) > 1:
        mesh += f"; {plan['waves']} waves"
    parts = [device[kind] / 1e9 for kind in ("weights", "optimizer", "cache")]
    sent = sum(row["bytes"] for row in plan["collectives"])
    terms = " / ".join(_time(seconds[term]) for term in ("compute", "memory", "interconnect"))
    fits = device["peak"] is not None
    left = device["capacity"] - (device["peak"] or 0)
    return (
        f"{name.replace('_', ' ')}, {plan['batch']} rows",
        f"{plan['topology']} ({plan['devices']})",
        mesh,
        " + ".join(f"{part:.1f}" for part in parts),
        f"{device['temporaries'] / 1e9:.1f}" if fits else "-",
        f"{device['peak'] / 1e9:.1f}" if fits else "does not fit",
        f"{left / 1e9:.1f} ({100 * left / device['capacity']:.0f} %)" if fits else "-",
        f"{sent / 1e9:.3g}",
        terms,
        _time(plan["seconds_estimate"]),
        f"{_compiled(plan)}, {plan['host_bytes'] / 1e9:.1f} GB",
    )


def _compiled(plan):
    """Seconds of the clock and, where they were noted, of processors."""
    processor = plan.get("compile_processor_seconds")
    return f"{plan['compile_seconds']:.0f} s" + (f" ({processor:.0f} s)" if processor else "")


def _time(seconds):
    return f"{seconds:.3g} s" if seconds >= 1 else f"{1e3 * seconds:.3g} ms"


if __name__ == "__main__":
    if sys.argv[1:] == ["--table"]:
        report()
    else:
        main(sys.argv[1:])
