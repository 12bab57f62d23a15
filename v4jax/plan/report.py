"""A plan as JSON, as tables and as a picture."""

import collections
from typing import Any

from v4jax import extras
from v4jax.plan.plan import Plan
from v4jax.tables import percent, short, table

GB = 1e9


def as_json(plan: Plan) -> dict[str, Any]:
    """Everything, ready for `json.dump`; bytes, operations and seconds of one device's step."""
    counted, compiled, time = plan.counted, plan.compiled, plan.time
    return {
        "mode": plan.job.mode,
        "context": plan.job.context,
        "batch": plan.job.batch,
        "microbatches": plan.job.parts,
        "waves": plan.job.waves,
        "weights": plan.job.weights,
        "numerics": plan.job.numerics,
        "topology": plan.topology.name,
        "devices": plan.topology.count,
        "mesh": plan.mesh,
        "strategy": plan.strategy,
        "fits": plan.fits,
        "failure": compiled.failure,
        "per_device": per_device(plan),
        "collectives": by_kind(plan),
        "unknown_loops": compiled.unknown_loops,
        "flops": sum(counted.operations.values()),
        "flops_parts": counted.operations,
        "traffic": counted.traffic,
        "imbalance": counted.imbalance,
        "seconds_estimate": time.floor,
        "seconds": {
            "compute": time.compute,
            "memory": time.memory,
            "interconnect": time.interconnect,
            "nothing_overlapped": time.sum,
        },
        "tokens_per_second": plan.job.tokens / time.floor,
        "compile_seconds": compiled.seconds,
        "compile_processor_seconds": compiled.processor,
        "host_bytes": compiled.host,
    }


def per_device(plan: Plan) -> dict[str, Any]:
    """Bytes of one device: the program's, and by hand; None where the compiler gave up."""
    compiled, held = plan.compiled, plan.counted.held
    arguments = sum(compiled.arguments.values())
    peak = compiled.peak
    return {
        "weights": compiled.arguments.get("weights", 0),
        "optimizer": compiled.arguments.get("optimizer", 0),
        "cache": compiled.arguments.get("cache", 0),
        "temporaries": None if peak is None else max(0, peak - arguments),
        "peak": peak,
        "capacity": plan.topology.chip.memory,
        "arguments": arguments,
        "arguments_by_compiler": compiled.argument,
        "by_hand": {
            "weights": held.weights,
            "optimizer": held.optimizer,
            "cache": held.cache,
            "gradients": held.gradients,
        },
    }


def by_kind(plan: Plan) -> list[dict[str, Any]]:
    """Collectives of the same kind over the same axes together, the most bytes first."""
    groups = collections.defaultdict(lambda: [0, 0.0, 0])
    for c in plan.compiled.collectives:
        entry = groups[c.kind, c.axes]
        entry[0] += c.count
        entry[1] += c.count * c.bytes
        entry[2] = c.group
    rows = [
        {"kind": kind, "axes": list(axes), "group": group, "count": count, "bytes": sent}
        for (kind, axes), (count, sent, group) in groups.items()
    ]
    return sorted(rows, key=lambda row: -row["bytes"])


def as_text(plan: Plan, name: str) -> str:
    """The same for people."""
    return "\n\n".join([_title(plan, name), _memory(plan), _collectives(plan), _time(plan)])


def _title(plan, name):
    job, shape = plan.job, shown(plan.mesh)
    parts = f" in {job.parts} microbatches" if job.parts > 1 else ""
    parts += f", experts in {job.waves} waves" if job.waves > 1 else ""
    return "\n".join(
        [
            f"{name}, {job.mode}: {job.batch:,} x {job.context:,} tokens{parts}, "
            f"{job.weights} weights" + (f", {job.numerics} numerics" if job.numerics else ""),
            f"  {plan.topology.name}: {plan.topology.count:,} devices, mesh {shape}, "
            f"strategy {plan.strategy}",
            f"  {verdict(plan)}",
            f"  compiled in {plan.compiled.seconds:.0f} s ({plan.compiled.processor:.0f} s of "
            f"processors) and {short(plan.compiled.host)}B of this machine's memory",
        ]
    )


def verdict(plan: Plan) -> str:
    """Whether it fits, and how much is left."""
    if plan.compiled.failure:
        return f"does not fit: {plan.compiled.failure}"
    left = plan.topology.chip.memory - plan.compiled.peak
    share = percent(abs(left) / plan.topology.chip.memory)
    if left < 0:
        return f"does not fit: {short(-left)}B ({share} of a device) too much"
    return f"fits, {short(left)}B ({share}) of every device left"


def shown(mesh: dict[str, int]) -> str:
    """The axes longer than 1."""
    return ",".join(f"{axis}={size}" for axis, size in mesh.items() if size > 1) or "data=1"


def _memory(plan):
    device = per_device(plan)
    hand = device["by_hand"]
    rows = [(kind, _gb(device[kind]), _gb(hand[kind])) for kind in ("weights", "optimizer")]
    rows += [("cache", _gb(device["cache"]), _gb(hand["cache"]))]
    rows += [(kind, _gb(device[kind]), "") for kind in ("temporaries", "peak", "capacity")]
    return "Memory of a device, GB\n" + table(("", "program", "by hand"), rows)


def _gb(number):
    return "-" if number is None else f"{number / GB:.3f}"


def _collectives(plan):
    rows = [
        (row["kind"], ",".join(row["axes"]), f"{row['count']:,}", f"{row['bytes'] / GB:.4f}")
        for row in by_kind(plan)
    ]
    loops = plan.compiled.unknown_loops
    note = f"\n  {loops} loops of unknown length count once" if loops else ""
    header = ("kind", "mesh axes", "runs", "GB")
    return f"Collectives: what leaves a device in a step\n{table(header, rows, left=2)}{note}"


def _time(plan):
    time, operations = plan.time, sum(plan.counted.operations.values())
    moved = sum(plan.counted.traffic.values())
    sent = sum(c.count * c.bytes for c in plan.compiled.collectives)
    uneven = plan.counted.imbalance
    note = f" (the busiest device {uneven:.2f} times the average)" if uneven > 1 else ""
    rows = [
        ("compute", f"{short(operations)}FLOPs", _seconds(time.compute)),
        ("memory", f"{short(moved)}B", _seconds(time.memory)),
        ("interconnect", f"{short(sent)}B", _seconds(time.interconnect)),
        ("at least, all overlapped", "", _seconds(time.floor)),
        ("nothing overlapped", "", _seconds(time.sum)),
    ]
    return f"Time of a step, by our own count{note}\n{table(('', 'a device', 'time'), rows)}"


def _seconds(value):
    return f"{value:.3f} s" if value >= 1 else f"{1e3 * value:.3g} ms"


def draw(plan: Plan, name: str, path: str) -> None:
    """Writes a picture: a device's memory against its capacity, and the terms of the time.

    Raises:
      InputError: matplotlib is not installed.
    """
    extras.require("matplotlib", "plot", "--picture")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    _draw_memory(left, per_device(plan))
    _draw_time(right, plan)
    job = plan.job
    figure.suptitle(
        f"{name} {job.mode}, {job.batch:,} x {job.context:,} tokens on {plan.topology.name}, "
        f"{shown(plan.mesh)}",
        fontsize=10,
    )
    figure.savefig(path, dpi=150)


def _draw_memory(axes, device):
    start = 0.0
    for kind in ("weights", "optimizer", "cache", "temporaries"):
        size = (device[kind] or 0) / GB
        if not size:
            continue
        axes.barh(0, size, left=start, label=f"{kind} {size:.2f}")
        start += size
    capacity = device["capacity"] / GB
    axes.axvline(capacity, color="black", linestyle="--", label=f"capacity {capacity:.1f}")
    axes.set(xlabel="GB of a device", yticks=[], ylim=(-1.6, 0.6), xlim=(0, 1.05 * capacity))
    axes.legend(loc="lower left", fontsize=8, ncols=2, frameon=False)


def _draw_time(axes, plan):
    time = plan.time
    names = ["compute", "memory", "interconnect"]
    values = [1e3 * getattr(time, name) for name in names]
    bars = axes.barh(names[::-1], values[::-1], color=["tab:green", "tab:orange", "tab:blue"])
    axes.bar_label(bars, fmt="%.3g", padding=2, fontsize=8)
    axes.set(xlabel="ms per step, at least", xlim=(0, 1.2 * max(values)))
