"""Steady-state times of compiled functions, and what the device can do at best."""

import statistics
import time

import jax
import jax.numpy as jnp


def seconds(function, *arguments, repeats: int = 7, least: float = 0.05) -> float:
    """The median time of one call, compiled and warm.

    Calls are queued until a sample takes `least` seconds, so that the host's part is hidden.
    """
    compiled = jax.jit(function).lower(*arguments).compile()
    jax.block_until_ready(compiled(*arguments))
    start = time.perf_counter()
    jax.block_until_ready(compiled(*arguments))
    calls = max(1, round(least / max(time.perf_counter() - start, 1e-6)))
    samples = []
    for _ in range(repeats):
        start = time.perf_counter()
        for _ in range(calls):
            out = compiled(*arguments)
        jax.block_until_ready(out)
        samples.append((time.perf_counter() - start) / calls)
    return statistics.median(samples)


def copy_bandwidth(size: int = 1 << 30) -> float:
    """Bytes a second that a copy reads and writes together."""
    x = jnp.zeros(size // 4, jnp.float32)
    return 2 * size / seconds(lambda x: x + 1, x)


def matmul_rate(size: int = 8192, dtype=jnp.bfloat16) -> float:
    """Operations a second of a square dense product."""
    a = jnp.ones((size, size), dtype)
    return 2 * size**3 / seconds(jnp.dot, a, a)
