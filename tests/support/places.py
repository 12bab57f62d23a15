"""Documents packed in rows, and ranges and choices of entries in no order, drawn by hypothesis."""

import jax.numpy as jnp
import numpy as np
from hypothesis import strategies
from hypothesis.extra import numpy as drawn


@strategies.composite
def documents(draw, length, batch):
    """Lengths of each row's documents: tiny ones in great number, a few, or one for all of it."""
    longest = draw(strategies.sampled_from([1, 3, 20, 60, length]))

    def row():
        lengths, room = [], length
        while room > 0 and (longest < 20 or len(lengths) < 12):
            lengths.append(draw(strategies.integers(1, min(longest, room))))
            room -= lengths[-1]
        return tuple(lengths)

    return tuple(row() for _ in range(batch))


def integers(shape, least, most):
    """int32 arrays of a shape, every element its own."""
    return drawn.arrays(np.int32, shape, elements=strategies.integers(least, most)).map(jnp.asarray)


@strategies.composite
def ranges(draw, batch, length, entries):
    """low and high in no order: empty ones, backward ones, and some that leave the list."""
    low, high = (draw(integers((batch, length), -3, entries + 5)) for _ in range(2))
    return low, high


@strategies.composite
def choices(draw, batch, length, entries, count):
    """Distinct numbers in any order, -1 for none among them, and some that no entry has."""
    seed = draw(strategies.integers(0, 2**20))
    rng = np.random.default_rng(seed)
    order = rng.random((batch, length, entries + 5)).argsort(axis=-1)[..., :count]
    none = rng.random(order.shape) < draw(strategies.sampled_from([0.0, 0.3, 1.0]))
    return jnp.asarray(np.where(none, -1, order), jnp.int32)
