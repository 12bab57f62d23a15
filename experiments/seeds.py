"""Held-out loss of the ablations by seed, out of their results.json.

    python experiments/seeds.py [004_compressed_attention ...]

Draws seeds.png in each folder and trains nothing. Left: a faint line per seed, their mean and the
band of one standard deviation, which is mostly which rows are evaluated. Right: each run less the
reference of its seed, mean and the band of one standard error, which is what the seeds can tell.
"""

import json
import statistics
import sys
from pathlib import Path
from typing import NamedTuple

from matplotlib.figure import Figure

HERE = Path(__file__).parent
TOKENS = "after 0.25 M tokens"


class Ablation(NamedTuple):
    """What a folder's picture shows; `lines` maps a label to its (place on the axis, run)s."""

    title: str
    axis: str
    lines: dict[str, tuple[tuple[str, str], ...]]
    less: dict[str, str]  # run -> the run of the same seed that is taken from it
    less_title: str


RATES = ("3e-3", "6e-3", "1.2e-2", "2.4e-2")
ABLATIONS = {
    "004_compressed_attention": Ablation(
        "CSA + HCA and full attention",
        "tokens per row",
        {
            "CSA + HCA": (("512", "csa_hca_512"), ("2,048", "csa_hca_2048")),
            "full attention": (("512", "full_512"), ("2,048", "full_2048")),
        },
        {
            "csa_hca_512": "csa_hca_512",
            "full_512": "csa_hca_512",
            "csa_hca_2048": "csa_hca_2048",
            "full_2048": "csa_hca_2048",
        },
        "Less CSA + HCA of the same seed",
    ),
    "005_hyper_connections": Ablation(
        "Residual streams",
        "residual streams",
        {"mHC": (("plain", "plain"), ("2", "mhc_2"), ("4", "mhc_4"))},
        dict.fromkeys(("plain", "mhc_2", "mhc_4"), "mhc_4"),
        "Less four streams of the same seed",
    ),
    "006_muon": Ablation(
        "Muon and AdamW",
        "peak learning rate",
        {
            "Muon": tuple((rate, f"muon_{rate}") for rate in RATES),
            "AdamW": tuple((rate, f"adamw_{rate}") for rate in RATES),
        },
        {f"{name}_{rate}": "muon_1.2e-2" for name in ("muon", "adamw") for rate in RATES},
        "Less Muon at 1.2e-2 of the same seed",
    ),
    "007_indexer_loss": Ablation(
        "The indexer's loss",
        "entries chosen (top-k)",
        {
            "with its loss": (("4", "top4_on"), ("16", "top16_on")),
            "without": (("4", "top4_off"), ("16", "top16_off")),
        },
        {f"top{k}_{loss}": f"top{k}_on" for k in (4, 16) for loss in ("on", "off")},
        "Less the same top-k with its loss",
    ),
}


def draw(folder, ablation):
    results = json.loads((HERE / folder / "results.json").read_text())
    held_out = {run: [seed["held_out"] for seed in seeds] for run, seeds in results.items()}
    figure = Figure(figsize=(10, 3.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    for number, (label, points) in enumerate(ablation.lines.items()):
        places, runs = zip(*points, strict=True)
        _seeds(
            left,
            places,
            [held_out[run] for run in runs],
            f"C{number}",
            label,
            spread=statistics.stdev,
        )
        pairs = [(held_out[run], held_out[ablation.less[run]]) for run in runs]
        differences = [[a - b for a, b in zip(*pair, strict=True)] for pair in pairs]
        _seeds(right, places, differences, f"C{number}", label, spread=_standard_error)
    left.set(title=ablation.title, ylabel="held out, nats per token", xlabel=ablation.axis)
    right.set(title=ablation.less_title, ylabel="difference, nats per token", xlabel=ablation.axis)
    for panel in (left, right):
        panel.grid(alpha=0.3)
        panel.margins(x=0.1)
    if len(ablation.lines) > 1:
        figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=2)
    count = len(next(iter(held_out.values())))
    figure.suptitle(f"{folder}: {count} seeds {TOKENS}", fontsize=11)
    figure.savefig(HERE / folder / "seeds.png", dpi=110)


def _seeds(panel, places, values, colour, label, spread):
    """`values` holds a list per place, with a value per seed."""
    for of_seed in zip(*values, strict=True):
        panel.plot(places, of_seed, ".-", color=colour, alpha=0.3, linewidth=0.8)
    means = [statistics.mean(each) for each in values]
    low = [mean - spread(each) for mean, each in zip(means, values, strict=True)]
    high = [mean + spread(each) for mean, each in zip(means, values, strict=True)]
    panel.fill_between(places, low, high, color=colour, alpha=0.15, linewidth=0)
    panel.plot(places, means, "o-", color=colour, markersize=4, label=label)


def _standard_error(values):
    return statistics.stdev(values) / len(values) ** 0.5


def main(folders):
    for folder in folders or ABLATIONS:
        draw(folder, ABLATIONS[folder])


if __name__ == "__main__":
    main(sys.argv[1:])
