"""How a prefill scales along the sequence and the expert axis: compiled for 1 to 64 v5p, not run.

Three of Flash's layers (window, CSA, HCA), so that one device holds them; 65,536 tokens in all.
`python scaling.py` compiles what scaling.json lacks and draws scaling.png.
"""

import dataclasses
import json
import pathlib

from v4jax.plan import environment

environment.prepare()

import v4jax  # noqa: E402 (the environment comes first)
from v4jax.config import CSA, HCA, WINDOW  # noqa: E402
from v4jax.plan import compiler, plan, roofline, topology  # noqa: E402
from v4jax.plan.job import Job, layout_of  # noqa: E402

HERE = pathlib.Path(__file__).parent
RESULTS = HERE / "scaling.json"
COUNTS = (1, 2, 4, 8, 16, 32, 64)
TOKENS = 65536
LARGEST = topology.parse("v5p:4x4x4")
SMALL = topology.parse("v5p:2x2x1")


def measure(axis: str, count: int) -> dict:
    """One compile: bytes, operations and seconds of a device."""
    config = dataclasses.replace(
        v4jax.get_config("flash"), layers=(WINDOW, CSA, HCA), mtp_layers=()
    )
    job = Job(config, "prefill", TOKENS, 1)
    where = dataclasses.replace(SMALL if count <= SMALL.count else LARGEST, count=count)
    counted = plan.count(job, where, layout_of(job, {axis: count}, where.devices))
    compiled = compiler.compile_job(job, where, {axis: count})
    sent = sum(c.count * c.bytes for c in compiled.collectives)
    seconds = sum(
        c.count * roofline.interconnect_seconds(LARGEST.chip, c) for c in compiled.collectives
    )
    return {
        "operations": sum(counted.operations.values()),
        "sent": sent,
        "sent_per_token": sent * count / TOKENS,
        "arguments": compiled.argument,
        "peak": compiled.peak,
        "failure": compiled.failure,
        "compute": counted.time.compute / counted.imbalance,
        "compute_last": counted.time.compute,
        "memory": counted.time.memory,
        "interconnect": seconds,
        "compile_seconds": compiled.seconds,
        "compile_processor_seconds": compiled.processor,
        "host_bytes": compiled.host,
    }


def main():
    found = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for count in COUNTS:
        for axis in ("sequence", "expert"):
            name = f"{axis}={count}" if count > 1 else "one"
            if name not in found:
                found[name] = measure(axis, count)
                print(name, found[name], flush=True)
                RESULTS.write_text(json.dumps(found, indent=1))
    draw(found)


def draw(found):
    """A row per axis: memory of a device, bytes exchanged and seconds, all in powers of two."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 7), layout="constrained")
    panels = figure.subplots(2, 3, sharex=True)
    for axis, (memory, sent, seconds) in zip(("sequence", "expert"), panels, strict=True):
        rows = [(n, found[f"{axis}={n}" if n > 1 else "one"]) for n in COUNTS]
        rows = [(n, row) for n, row in rows if row["peak"]]
        _memory(memory, rows, axis)
        _sent(sent, rows, axis)
        _seconds(seconds, rows, axis)
    for panel in panels.flat:
        panel.set(xscale="log", xlabel="devices")
        panel.set_xticks(COUNTS, [str(n) for n in COUNTS])
        panel.xaxis.minorticks_off()
        panel.grid(alpha=0.3)
        panel.legend(fontsize=8)
    figure.suptitle(
        "Prefill of 65,536 tokens through three of Flash's layers, v5p, one device of n",
        fontsize=12,
    )
    figure.savefig(HERE / "scaling.png", dpi=110)


def _memory(panel, rows, axis):
    counts = [n for n, _ in rows]
    temporaries = [(row["peak"] - row["arguments"]) / 1e9 for _, row in rows]
    fallen = [temporaries[0] / n for n in counts]
    panel.plot(counts, [row["peak"] / 1e9 for _, row in rows], "o-", label="peak")
    panel.plot(counts, temporaries, "s-", label="of it temporaries")
    panel.plot(counts, fallen, ":", color="grey", label="temporaries if they fell as 1/n")
    panel.set(title=f"Along {axis}: memory of a device", ylabel="GB", yscale="log")


def _sent(panel, rows, axis):
    sent = [(n, row["sent_per_token"] / 1e3) for n, row in rows if n > 1]
    panel.plot(*zip(*sent, strict=True), "^-", color="C3", label="all devices together")
    panel.set(title=f"Along {axis}: bytes exchanged per token", ylabel="kB per token")
    panel.set_ylim(bottom=0)


def _seconds(panel, rows, axis):
    counts = [n for n, _ in rows]
    for key, mark, label in (
        ("compute", "o-", "compute, average device"),
        ("compute_last", "o--", "compute, last slice"),
        ("memory", "s-", "memory"),
    ):
        panel.plot(counts, [1e3 * row[key] for _, row in rows], mark, label=label)
    sent = [(n, 1e3 * row["interconnect"]) for n, row in rows if n > 1]
    panel.plot(*zip(*sent, strict=True), "^-", label="collectives")
    overtaken = [n for n, row in rows if n > 1 and row["interconnect"] > row["compute_last"]]
    if overtaken:
        panel.axvline(overtaken[0], color="grey", linestyle="--")
        said = f"collectives overtake compute at {overtaken[0]}"
    else:
        ratio = rows[-1][1]["compute_last"] / rows[-1][1]["interconnect"]
        said = f"collectives 1/{ratio:.1f} of compute at {counts[-1]}"
    panel.set(ylabel="least time, ms", yscale="log")
    panel.set_title(f"Along {axis}: {said}", fontsize=10)


if __name__ == "__main__":
    main()
