"""How fast the steps of a run follow one another, and how fast their devices could be."""

import concurrent.futures
import functools
import math
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from v4jax import chips


class Clock:
    """How fast steps of one size follow one another.

    A step ends when its figures are computed, not when they are read: a thread waits for each. It
    begins where the one before ended or, after a pause for an evaluation, a checkpoint or the
    compiler, where `start` says.

    Args:
      tokens: of a step, in rows of `length`. flops: operations of a step (`step_flops`).
    """

    def __init__(self, tokens: int, length: int, flops: float):
        self._tokens, self._length = tokens, length
        with jax.transfer_guard("allow"):
            self._at_peak = flops / peak_flops()[0]
        self._thread = concurrent.futures.ThreadPoolExecutor(1)
        self.start()

    def start(self) -> None:
        """The next step begins now: a pause has ended."""
        self._begin = time.perf_counter()

    def watch(self, noted: Any) -> concurrent.futures.Future:
        """When the step ends that computes these arrays, for `tick`."""
        return self._thread.submit(_time_of, noted)

    def tick(self, ended: concurrent.futures.Future) -> dict[str, float]:
        """Figures of the next step; every step is to be asked for, in order."""
        end = ended.result()
        seconds, self._begin = end - self._begin, end
        speed = {"tokens_per_second": self._tokens / seconds, "mfu": self._at_peak / seconds}
        return speed | {"seconds": seconds, "length": self._length}

    def close(self) -> None:
        self._thread.shutdown(wait=False)


def _time_of(noted):
    jax.block_until_ready(noted)
    return time.perf_counter()


@functools.cache
def peak_flops() -> tuple[float, str]:
    """Operations per second of all devices, and where the figure is from.

    A device of unknown kind is timed on a float32 matrix product.
    """
    device = jax.devices()[0]
    known = chips.peak_flops(device.device_kind)
    if known is not None:
        return known * jax.device_count(), "data sheet"
    n = 1024
    x = jax.device_put(np.ones((n, n), np.float32))
    product = jax.jit(jnp.matmul)
    product(x, x).block_until_ready()
    best = math.inf
    for _ in range(5):
        start = time.perf_counter()
        product(x, x).block_until_ready()
        best = min(best, time.perf_counter() - start)
    # A CPU's fake devices share its cores.
    count = 1 if device.platform == "cpu" else jax.device_count()
    return 2 * n**3 / best * count, "a measured matrix product"
