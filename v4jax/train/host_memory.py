"""What a process holds besides its arrays: traces of programs that are compiled."""

import gc

import jax


def forget_traces() -> None:
    """Drops what JAX keeps of programs that are compiled: hundreds of MB for a training step.

    Programs that somebody holds stay; all others are traced anew when they are called again.
    """
    jax.clear_caches()
    gc.collect()
