"""The five tests before production, sized to a model's length and to the minutes there are."""

import dataclasses
import math
from collections.abc import Sequence

from v4jax.eval.suites import Settings

# What each may take of the time that is left for it and those behind it.
SHARES = {"needle": 0.3, "latency": 0.25, "cost": 0.15, "tools": 0.2, "controls": 0.1}
SAMPLES = {"needle": 16, "cost": 6, "tools": 4}
TRIALS = 3
SHORTEST = 1024


def lengths(minutes: float, longest: int | None, fast: bool) -> tuple[int, ...]:
    """Lengths in steps of 4 from 1,024, up to the model's or what the time lets one hope for.

    Args:
      longest: the model's; None: unknown. fast: an accelerator or a service, and not this CPU.
    """
    per_minute = 104_858 if fast else 1_639  # tokens of the longest: 2^20 or 2^14 in ten minutes
    hoped = 2 ** int(math.log2(max(per_minute * minutes, SHORTEST)))
    most = min(hoped, longest or hoped)
    found = [SHORTEST * 4**i for i in range(11) if SHORTEST * 4**i <= most]
    if not found or found[-1] * 2 <= most:
        found.append(most)
    return tuple(found)


def settings(part: str, base: Settings) -> Settings:
    """A part's own sizes."""
    return dataclasses.replace(
        base,
        samples=SAMPLES.get(part, 1),
        trials=TRIALS,
        tasks=(),
        loads=tuple(load for load in base.loads if load <= 4) or (1,),
        lengths=base.lengths[:2] if part == "cost" else base.lengths,
        spread=True,
    )


def deadline(part: str, left: Sequence[str], now: float, end: float) -> float:
    """When a part has to end, of those that are left, it among them."""
    share = SHARES[part] / sum(SHARES[each] for each in left)
    return now + share * max(end - now, 0.0)
