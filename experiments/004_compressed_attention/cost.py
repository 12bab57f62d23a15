"""What a decode step and a cache of both models cost as the context grows, counted.

    python experiments/004_compressed_attention/cost.py

Prints a table and draws cost.png here.
"""

from pathlib import Path

import full
import matplotlib

from v4jax import accounting
from v4jax.train import config_file

matplotlib.use("Agg")
import matplotlib.pyplot as plt

HERE = Path(__file__).parent
CONTEXTS = [2**n for n in range(9, 21)]


def main():
    models = {
        "CSA + HCA": config_file.read(str(full.BASE)).model,
        "full attention": full.get_config().model,
    }
    figure, panels = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained")
    print("| | context, tokens | MFLOP a decode step | KiB of cache |\n|---|---|---|---|")
    for name, config in models.items():
        flops = [
            sum(accounting.flops_per_token(config, n, accounting.ONE_EACH).values())
            for n in CONTEXTS
        ]
        cache = [
            n * accounting.kv_bytes_per_token(config) + accounting.window_bytes(config)
            for n in CONTEXTS
        ]
        for n, operations, nbytes in zip(CONTEXTS, flops, cache, strict=True):
            if n in (512, 2048, 32768, 1048576):
                print(f"| {name} | {n:,} | {operations / 1e6:.2f} | {nbytes / 1024:,.0f} |")
        panels[0].plot(CONTEXTS, [f / 1e6 for f in flops], marker="o", markersize=3, label=name)
        panels[1].plot(CONTEXTS, [b / 1024 for b in cache], marker="o", markersize=3, label=name)
    panels[0].set(title="Operations of a decode step, counted", ylabel="MFLOP")
    panels[1].set(title="Cache of one sequence, counted", ylabel="KiB, FP8 as stored")
    for panel in panels:
        panel.set(xscale="log", yscale="log", xlabel="context, tokens")
        panel.set_xticks(
            CONTEXTS[1::2], ["1M" if n >> 20 else f"{n // 1024}K" for n in CONTEXTS[1::2]]
        )
        panel.minorticks_off()
        panel.grid(alpha=0.3)
    panels[0].legend(frameon=False)
    figure.savefig(HERE / "cost.png", dpi=120)


if __name__ == "__main__":
    main()
