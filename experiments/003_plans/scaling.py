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
    """Memory and bytes on the left, seconds on the right, both axes in powers of two."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 7), layout="constrained")
    panels = figure.subplots(2, 2, sharex=True)
    for axis, (left, right) in zip(("sequence", "expert"), panels, strict=True):
        rows = [(n, found[f"{axis}={n}" if n > 1 else "one"]) for n in COUNTS]
        rows = [(n, row) for n, row in rows if row["peak"]]
        _bytes(left, rows, axis)
        _seconds(right, rows, axis)
    figure.suptitle(
        "Prefill of 65,536 tokens through three of Flash's layers, v5p, one device of n",
        fontsize=11,
    )
    figure.savefig(HERE / "scaling.png", dpi=150)


def _bytes(axes, rows, axis):
    counts = [n for n, _ in rows]
    axes.plot(counts, [row["peak"] / 1e9 for _, row in rows], "o-", label="peak memory, GB")
    temporaries = [(row["peak"] - row["arguments"]) / 1e9 for _, row in rows]
    axes.plot(counts, temporaries, "s-", label="of it temporaries, GB")
    axes.plot(
        counts,
        [temporaries[0] / n for n in counts],
        ":",
        color="grey",
        label="temporaries if they fell by n",
    )
    sent = [(n, row["sent_per_token"] / 1e3) for n, row in rows if n > 1]
    axes.plot(*zip(*sent, strict=True), "^-", label="exchanged for a token, kB")
    axes.set(
        xscale="log",
        yscale="log",
        ylabel=f"along {axis}: GB, kB",
        xticks=counts,
        xlabel="devices n",
    )
    axes.set_xticks(counts, [str(n) for n in counts])
    axes.minorticks_off()
    axes.legend(fontsize=8)


def _seconds(axes, rows, axis):
    counts = [n for n, _ in rows]
    for key, label in (
        ("compute", "compute, average device"),
        ("compute_last", "compute, last slice"),
        ("memory", "memory"),
    ):
        axes.plot(counts, [1e3 * row[key] for _, row in rows], "o-", label=label)
    sent = [(n, 1e3 * row["interconnect"]) for n, row in rows if n > 1]
    axes.plot(*zip(*sent, strict=True), "^-", label="collectives")
    overtaken = [n for n, row in rows if n > 1 and row["interconnect"] > row["compute_last"]]
    if overtaken:
        axes.axvline(overtaken[0], color="grey", linestyle="--")
        axes.set_title(f"collectives overtake compute at {overtaken[0]}", fontsize=9)
    else:
        ratio = rows[-1][1]["compute_last"] / rows[-1][1]["interconnect"]
        axes.set_title(
            f"collectives do not overtake compute: 1/{ratio:.1f} of it at {counts[-1]}", fontsize=9
        )
    axes.set(xscale="log", yscale="log", ylabel="ms at least", xlabel="devices n")
    axes.set_xticks(counts, [str(n) for n in counts])
    axes.minorticks_off()
    axes.legend(fontsize=8)


if __name__ == "__main__":
    main()
