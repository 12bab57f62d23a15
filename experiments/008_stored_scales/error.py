"""What fine-tuning leaves of stored weights, with fresh scales and with scales kept by the rule.

    python experiments/008_stored_scales/error.py

Draws error.png here and prints the tables: one of random matrices on one device and on a mesh, one
of runs of two steps from a tiny checkpoint (about four minutes, nearly all of it compiling).
"""

import dataclasses
import functools
import os
import tempfile
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")

import jax
import matplotlib
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from v4jax import quant
from v4jax.checkpoints import load as checkpoint
from v4jax.checkpoints.load import save_official
from v4jax.config import CSA, HCA, with_hash_routing
from v4jax.datasets.config import DataConfig
from v4jax.model.transformer import Transformer
from v4jax.named_configs import get_config
from v4jax.train import loop, quantized, start
from v4jax.train.config import Stage, TrainConfig
from v4jax.train.lora import LoraConfig
from v4jax.train.optimizer import OptimizerConfig
from v4jax.train.scales import next_scales
from v4jax.train.schedule import Schedule

matplotlib.use("Agg")
import matplotlib.pyplot as plt

HERE = Path(__file__).parent
STEPS = 10.0 ** np.arange(-6, 0.1, 0.5)
FACTORS = 2.0 ** np.arange(-2, 2.01, 0.125)
SHAPE = (512, 2048)
FORMS = {
    "FP4": ("fp4", quant.quantize_fp4),
    "FP8, E8M0 scales": ("fp8", quant.quantize_fp8),
    "FP8, float32 scales": (
        "fp8",
        functools.partial(quant.quantize_fp8, scale_dtype="float32"),
    ),
}
WAYS = ("fresh", "rule", "base's")  # scales: as before, by the rule, those of the base for ever


def scales_of(way, form, w, base):
    """The scales that each way stores `w` with."""
    kind, encode = FORMS[form]
    if way == "fresh":
        return encode(w).scales
    return base.scales if way == "base's" else next_scales(w, base.scales, kind)


@functools.partial(jax.jit, static_argnums=(0, 1))
def figures(way, form, w, base):
    """Of weights w, once `base`: relative rms error, share of scales and of values that differ."""
    scales = scales_of(way, form, w, base)
    encode = quant.quantize_fp4 if FORMS[form][0] == "fp4" else quant.quantize_fp8
    found, was = encode(w, scales).dequantize(), base.dequantize()
    rms = jax.numpy.sqrt(jax.numpy.mean(w**2))
    error = jax.numpy.sqrt(jax.numpy.mean((found - w) ** 2)) / rms
    return error, jax.numpy.mean(scales != base.scales), jax.numpy.mean(found != was)


def matrices(mesh=None):
    """form -> the stored matrix, and moves of its size, on one device or in 8 parts."""
    w, move = np.random.default_rng(0).standard_normal((2, *SHAPE)).astype(np.float32)
    bases = {form: encode(w) for form, (_, encode) in FORMS.items()}
    if mesh is None:
        return bases, move
    place = NamedSharding(mesh, PartitionSpec("a", "b"))
    return bases, jax.device_put(move, place)


def moved_matrices(mesh=None):
    """(way, form, step) -> figures."""
    bases, move = matrices(mesh)
    found = {}
    for form, base in bases.items():
        w = base.dequantize()
        size = np.sqrt(np.mean(np.square(np.asarray(w))))
        for way in WAYS:
            for step in STEPS:
                moved = w + np.float32(step * size) * move
                found[way, form, step] = [float(x) for x in figures(way, form, moved, base)]
    return found


def grown_matrices():
    """(way, factor) -> figures of FP4 weights that all became `factor` times as large."""
    bases, _ = matrices()
    base = bases["FP4"]
    return {
        (way, factor): [
            float(x) for x in figures(way, "FP4", base.dequantize() * np.float32(factor), base)
        ]
        for way in WAYS
        for factor in FACTORS
    }


def draw(moves, growth):
    figure, panels = plt.subplots(1, 3, figsize=(13, 3.8), layout="constrained")
    looks = {"fresh": "C3o-", "rule": "C0o-", "base's": "k:"}
    names = {"fresh": "fresh (before)", "rule": "rule (now)", "base's": "the base's for ever"}
    for panel, form in zip(panels, ("FP4", "FP8, float32 scales"), strict=False):
        for way in WAYS:
            errors = [100 * moves[way, form, step][0] for step in STEPS]
            panel.plot(STEPS, errors, looks[way], markersize=3, label=names[way])
        panel.set(title=f"{form}: error after a random step", xscale="log", yscale="log")
        panel.set(xlabel="step, of the weights' rms", ylabel="rms error, % of the weights' rms")
    for way in WAYS:
        errors = [100 * growth[way, factor][0] for factor in FACTORS]
        panels[2].plot(FACTORS, errors, looks[way], markersize=3, label=names[way])
    panels[2].set(title="FP4: error after growing or shrinking", xscale="log", ylim=(0, 40))
    panels[2].set(xlabel="factor on all weights", ylabel="rms error, % of the weights' rms")
    panels[2].set_xticks([0.25, 0.5, 1, 2, 4], ["1/4", "1/2", "1", "2", "4"])
    panels[2].minorticks_off()
    for panel in panels:
        panel.grid(alpha=0.3)
    panels[0].legend(frameon=False)
    figure.savefig(HERE / "error.png", dpi=120)


def run_config(name, base, **changes):
    layers = with_hash_routing((CSA, dataclasses.replace(HCA, ratio=16)), 1)
    sizes = dict(layers=layers, mtp_layers=(), hc_mult=2, hc_sinkhorn_iters=2)
    options = dict(
        model=dataclasses.replace(get_config(name), **sizes),
        stages=(Stage(steps=2, length=32, batch=8, quantized=True),),
        data=DataConfig(kind="copy"),
        optimizer=OptimizerConfig(matrices="adamw", eps=1e-6),
        schedule=Schedule(2.7e-4, 2.7e-5, warm_up=1, decay=1),  # the report's for Flash
        start=base,
    )
    return TrainConfig(**options | changes)


def write_base(name, path):
    """A checkpoint of random weights, quantised as a release is."""
    config = run_config(name, None)
    model = Transformer(config.model, min_repeats=config.min_repeats)
    variables = jax.jit(model.init)(jax.random.key(0))
    params = quantized.stored(variables["params"], quantized.roles(model))
    if config.model.expert_dtype is None:  # float32 scales
        params = jax.tree.map(
            lambda q: (
                quant.quantize_fp8(q.dequantize(), scale_dtype="float32")
                if quant.is_quantized(q)
                else q
            ),
            params,
            is_leaf=quant.is_quantized,
        )
    save_official(path, config.model, variables | {"params": params})


def experts(path):
    """Values, codes and scales of the routed experts, end to end."""
    _, variables = checkpoint.load_variables(path, "stored")
    leaves = jax.tree_util.tree_leaves_with_path(variables["params"], is_leaf=quant.is_quantized)
    found = [q for place, q in leaves if "experts'" in jax.tree_util.keystr(place)]
    found = [q for q in found if quant.is_quantized(q)]
    codes = [np.asarray(q.values).view(np.uint8) for q in found]
    if found[0].kind == "fp4":
        codes = [np.stack([c & 15, c >> 4]) for c in codes]
    parts = [[q.dequantize() for q in found], codes, [q.scales for q in found]]
    return [np.concatenate([np.asarray(x).reshape(-1) for x in part]) for part in parts]


def share_changed(name, folder, keeps, **changes):
    """Shares of the experts' values, codes and scales that two steps change."""
    base, keep = folder / name, start.scales
    if not base.exists():
        write_base(name, base)
    workdir = Path(tempfile.mkdtemp(dir=folder))
    start.scales = keep if keeps else lambda config, model: None
    try:
        loop.train(run_config(name, str(base), **changes), workdir)
    finally:
        start.scales = keep
    pairs = zip(experts(base), experts(workdir / "model"), strict=True)
    return [float(np.mean(a != b)) for a, b in pairs]


def print_runs(folder):
    print("| run of two steps | values: fresh, rule | codes: fresh, rule | scales: fresh, rule |")
    print("|---|---|---|---|")
    runs = {
        "FP4, LoRA of rank 8, one device": ("flash_tiny", {"lora": LoraConfig(rank=8)}),
        "FP8, float32 scales, LoRA of rank 8": ("flash_base_tiny", {"lora": LoraConfig(rank=8)}),
        "FP4, all weights, one device": ("flash_tiny", {}),
        "FP4, all weights, mesh data=2,fsdp=2,tensor=2": (
            "flash_tiny",
            {"mesh": "data=2,fsdp=2,tensor=2"},
        ),
    }
    for label, (name, changes) in runs.items():
        fresh, rule = (share_changed(name, folder, keeps, **changes) for keeps in (False, True))
        cells = (f"{a:.2%}, {b:.2%}" for a, b in zip(fresh, rule, strict=True))
        print(f"| {label} | {' | '.join(cells)} |")


def main():
    moves, growth = moved_matrices(), grown_matrices()
    draw(moves, growth)
    print(
        "| step, of rms | form | error: fresh, rule | scales: fresh, rule | values: fresh, rule |"
    )
    print("|---|---|---|---|---|")
    for form in FORMS:
        for step in STEPS[2::2]:
            pairs = zip(moves["fresh", form, step], moves["rule", form, step], strict=True)
            cells = " | ".join(f"{100 * a:.3g} %, {100 * b:.3g} %" for a, b in pairs)
            print(f"| {step:.0e} | {form} | {cells} |")
    mesh = jax.make_mesh((2, 4), ("a", "b"), (AxisType.Auto,) * 2)
    parts = moved_matrices(mesh)
    off = max(abs(a / b - 1) for k in moves for a, b in zip(parts[k], moves[k], strict=True) if b)
    print(f"\nIn 8 parts on a mesh the same figures within {off:.1g} of each.\n")
    with tempfile.TemporaryDirectory() as folder:
        print_runs(Path(folder))


if __name__ == "__main__":
    main()
