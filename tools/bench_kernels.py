"""Every kernel versus its rivals on this accelerator: right first, then how fast, in one run.

    python tools/bench_kernels.py [--out experiments/002_kernel_speed] [--tiny] [--only sparse]

First each kernel is compared with its float32 reference at small shapes, and a wrong one is not
timed. Then everything is timed at the sizes of v4jax/kernels/bench/measurements.py, PyTorch too
where it is installed. `fraction` is of the floor: the work's bytes over the measured copy bandwidth
or its operations over the measured matmul rate, whichever is longer. Prints JSON lines; with --out
adds them to history.jsonl there and draws kernels.png.
"""

import argparse
import json
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import bench_history
import jax
import jax.numpy as jnp

from v4jax.kernels.bench import measurements, timing
from v4jax.kernels.sparse_attention import cases as attention_cases

KERNELS = {"gpu": "pallas_gpu", "tpu": "pallas_tpu", "cpu": "xla"}
# bf16 products and sums versus float32 ones: twice bf16's rounding, over the largest value.
TOLERANCE = 2 * 2**-8


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--out", help="folder for history.jsonl and kernels.png")
    parser.add_argument("--tiny", action="store_true", help="small sizes, to try the script out")
    parser.add_argument("--only", default="", help="only measurements whose name holds this")
    parser.add_argument("--repeats", type=int, default=7, help="samples of each time")
    options = parser.parse_args()
    floor = _floors(options.tiny)
    print(json.dumps(floor), flush=True)
    rows = []
    for work in measurements.measurements(options.tiny):
        if options.only in work.name:
            rows.append(_measure(work, floor, options))
            print(json.dumps(rows[-1]), flush=True)
    if not rows:
        sys.exit(f"--only is {options.only!r}; expected part of one of the measurements' names")
    if options.out:
        _keep(Path(options.out), floor, rows)
    wrong = [row["name"] for row in rows if not row["right"]]
    if wrong:
        sys.exit(f"wrong results, not timed: {', '.join(wrong)}")


def _floors(tiny):
    """What this device copies and multiplies at best, measured now."""
    device = jax.devices()[0]
    size, order = (1 << 24, 512) if tiny else (1 << 31, 8192)
    return {
        **bench_history.origin(),
        "device": device.device_kind,
        "copy_gb_s": timing.copy_bandwidth(size) / 1e9,
        "matmul_tflop_s": timing.matmul_rate(order) / 1e12,
    }


def _measure(work, floor, options):
    kernel = KERNELS[jax.devices()[0].platform]
    error = _error(work, kernel)
    shortest = max(
        work.bytes / floor["copy_gb_s"] / 1e9, work.flops / floor["matmul_tflop_s"] / 1e12
    )
    row = {
        "name": work.name,
        "implementation": kernel,
        "error": error,
        "right": error <= TOLERANCE,
        "floor_ms": 1e3 * shortest,
        "target": work.target,
        "rivals_ms": {},
    }
    if not row["right"]:
        return row
    arguments = work.arguments()
    spent = timing.seconds(work.run(kernel), *arguments, repeats=options.repeats)
    row |= {
        "ms": 1e3 * spent,
        "tflop_s": work.flops / spent / 1e12,
        "gb_s": work.bytes / spent / 1e9,
        "fraction": shortest / spent,
        "rivals_ms": _rivals(work, arguments, kernel, options),
    }
    return row


def _error(work, kernel):
    """The largest difference from the float32 reference over its largest value, tiny sizes."""
    small = next(x for x in measurements.measurements(tiny=True) if x.name == work.name)
    arguments = small.arguments()
    got = jax.jit(small.run(kernel))(*arguments)
    exact = jax.tree.map(_as_float32, arguments)
    wanted = jax.jit(small.run("reference"))(*exact)
    if work.op == "indexer_topk":  # a choice: whole numbers, equal or not
        return float(jnp.mean((got != wanted).astype(jnp.float32)))
    differences = jax.tree.map(_difference, got, wanted)
    return max(jax.tree.leaves(differences))


def _as_float32(x):
    return x.astype(jnp.float32) if x.dtype == jnp.bfloat16 else x


def _difference(got, wanted):
    got, wanted = (x.astype(jnp.float32) for x in (got, wanted))
    return float(jnp.abs(got - wanted).max() / jnp.maximum(jnp.abs(wanted).max(), 1e-6))


def _rivals(work, arguments, kernel, options):
    """Milliseconds of the others at the same work; a rival that cannot run says why."""
    named = {} if kernel == "xla" else {"xla": (work.run("xla"), arguments)}
    if work.name == "experts prefill, bf16":
        named["jax.lax.ragged_dot"] = (_ragged_dot, arguments)
    if work.op == "sparse_attention" and "backward" not in work.name and not options.tiny:
        named["jax.nn.dot_product_attention, as many keys"] = _dense(work)
    found = {}
    for name, (function, own) in named.items():
        found[name] = _try(lambda f=function, a=own: timing.seconds(f, *a, repeats=3))
    return found | _torch_rivals(work, options)


def _try(measure):
    try:
        return 1e3 * measure()
    except Exception as error:  # a rival may lack memory or an operation: that is a result too
        return f"{type(error).__name__}: {str(error).splitlines()[0][:120]}"


def _ragged_dot(x, gate, groups, weights):
    """The experts by three ragged products."""
    w1, w2, w3 = (jnp.swapaxes(w, 1, 2) for w in weights)
    a, b = (jax.lax.ragged_dot(x, w, groups) for w in (w1, w3))
    z = gate[:, None].astype(x.dtype) * jax.nn.silu(jnp.minimum(a, 10)) * jnp.clip(b, -10, 10)
    return jax.lax.ragged_dot(z, w2, groups)


def _dense(work):
    """Dense attention of as many queries and keys a query, no choice, window or sink."""
    decode = "decode" in work.name
    name = "flash_csa_decode_1m" if decode else "flash_csa_prefill_4k_of_64k"
    case = attention_cases.REAL[name]
    batch = 64 if decode else case.length // 64
    length = 1 if decode else 64
    keys = case.window + case.choices
    q = jnp.ones((batch, length, case.heads, case.width), jnp.bfloat16)
    kv = jnp.ones((batch, keys, 1, case.width), jnp.bfloat16)
    return jax.nn.dot_product_attention, (q, kv, kv)


def _torch_rivals(work, options):
    """PyTorch's attention and grouped product on the same device, where it is installed."""
    if options.tiny or work.name not in ("sparse prefill forward", "experts prefill, bf16"):
        return {}
    try:
        import torch
    except ImportError:
        return {"torch": "not installed"}
    if not torch.cuda.is_available():
        return {"torch": "no CUDA device"}

    def seconds(run):
        run()
        torch.cuda.synchronize()
        samples = []
        for _ in range(options.repeats):
            start = time.perf_counter()
            for _ in range(5):
                run()
            torch.cuda.synchronize()
            samples.append((time.perf_counter() - start) / 5)
        return sorted(samples)[len(samples) // 2]

    def tensor(*shape):
        return torch.randn(*shape, device="cuda", dtype=torch.bfloat16)

    if work.op == "sparse_attention":
        q, kv = tensor(64, 64, 64, 512), tensor(64, 1, 640, 512)
        attend = torch.nn.functional.scaled_dot_product_attention
        kv = kv.expand(-1, 64, -1, -1)
        return {"torch SDPA, as many keys": _try(lambda: seconds(lambda: attend(q, kv, kv)))}
    x, w = tensor(24576, 4096), tensor(256, 4096, 2048)
    ends = torch.arange(96, 24577, 96, device="cuda", dtype=torch.int32)
    grouped = getattr(torch, "_grouped_mm", None)
    if grouped is None:
        return {"torch grouped mm": "not in this version"}
    return {"torch grouped mm, one of three": _try(lambda: seconds(lambda: grouped(x, w, ends)))}


def _keep(folder, floor, rows):
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "history.jsonl").open("a") as file:
        file.write(json.dumps(floor | {"rows": rows}) + "\n")
    try:
        import matplotlib
    except ImportError:
        print("no picture: matplotlib is not installed", file=sys.stderr)
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    timed = [row for row in rows if "fraction" in row]
    figure, axes = pyplot.subplots(figsize=(9, 0.6 * len(timed) + 1.6), layout="constrained")
    places = range(len(timed))
    axes.barh(places, [row["fraction"] for row in timed], color="#4477aa")
    axes.plot([row["target"] for row in timed], places, "k|", markersize=18, label="target")
    axes.set_yticks(places, [row["name"] for row in timed])
    axes.invert_yaxis()
    axes.set_xlabel("fraction of the floor (measured copy bandwidth, matmul rate)")
    axes.set_title(f"{floor['device']}, JAX {floor['jax']}, {floor['commit']}")
    axes.legend()
    figure.savefig(folder / "kernels.png", dpi=120)


if __name__ == "__main__":
    main()
