"""Measures block sizes on this device and keeps the fastest of each operation."""

import dataclasses
import itertools
import math
from collections.abc import Callable

from v4jax.kernels import blocks
from v4jax.kernels.bench import measurements, timing

KERNELS = {"tpu": "pallas_tpu", "cuda": "pallas_gpu"}

# Values tried for each field, all combinations; what does not compile is left out.
CANDIDATES: dict[str, dict[str, dict[str, tuple[int, ...]]]] = {
    "tpu": {
        "sparse_attention": {"queries": (4, 8, 16), "keys": (128, 256, 512)},
        "indexer_topk": {"queries": (8, 16), "keys": (256, 512, 1024)},
        "grouped_matmul": {"rows": (128, 256, 512), "columns": (256, 512), "depth": (512, 1024)},
        "hyper_connections": {"tokens": (64, 128, 256)},
    },
    "cuda": {
        "sparse_attention": {
            "heads": (32, 64),
            "keys": (16, 32, 64, 128),
            "warps": (4, 8, 16),
            "stages": (1, 2, 3),
        },
        "indexer_topk": {"keys": (128, 256), "warps": (4, 8), "stages": (2, 3, 4)},
        "grouped_matmul": {
            "rows": (64, 128),
            "columns": (64, 128, 256),
            "depth": (32, 64, 128),
            "warps": (4, 8),
            "stages": (2, 3, 4),
        },
        "hyper_connections": {
            "tokens": (16, 32, 64),
            "channels": (64, 128, 256),
            "stages": (2, 3),
        },
    },
}


@dataclasses.dataclass(frozen=True)
class Trial:
    """One candidate: its sizes, and the seconds of the measurements or why it failed."""

    op: str
    sizes: dict[str, int]
    seconds: dict[str, float] | None
    failure: str = ""

    @property
    def score(self) -> float:
        """Geometric mean of the times: no measurement outweighs another by being longer."""
        if self.seconds is None:
            return math.inf
        return math.prod(self.seconds.values()) ** (1 / len(self.seconds))


def candidates(platform: str, op: str) -> list[dict[str, int]]:
    """Every combination of values of an operation's fields."""
    fields = CANDIDATES[platform][op]
    return [
        dict(zip(fields, values, strict=True)) for values in itertools.product(*fields.values())
    ]


def tune(
    platform: str,
    ops: list[str],
    report: Callable[[Trial], None],
    tiny: bool = False,
    most: int | None = None,
) -> blocks.Blocks:
    """The table in force with the fastest sizes of `ops`.

    Args:
      platform: "tpu" or "cuda".
      ops: operations to tune, one after the other.
      report: called with every trial.
      tiny: small sizes, where the kernel is interpreted.
      most: how many candidates of an operation to try at most.
    """
    name = blocks.chip(platform)
    table = blocks.blocks(platform)
    for op in ops:
        best = None
        for sizes in candidates(platform, op)[:most]:
            trial_table = _with(table, op, sizes)
            with blocks.on_trial(name, trial_table):
                trial = _try(platform, op, sizes, tiny)
            report(trial)
            if best is None or trial.score < best.score:
                best = trial
        if best.seconds is not None:
            table = _with(table, op, best.sizes)
    return table


def _with(table, op, sizes):
    return dataclasses.replace(table, **{op: dataclasses.replace(getattr(table, op), **sizes)})


def _try(platform, op, sizes, tiny):
    seconds = {}
    try:
        for work in measurements.measurements(tiny):
            if work.op == op:
                run = work.run(KERNELS[platform])
                seconds[work.name] = timing.seconds(run, *work.arguments(), repeats=3, least=0.02)
    except Exception as error:  # memory or registers exceeded: that is what a trial finds out
        return Trial(op, sizes, None, f"{type(error).__name__}: {str(error).splitlines()[0][:100]}")
    return Trial(op, sizes, seconds)
