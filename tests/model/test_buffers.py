"""Writes to a cache's buffers and its last rows: right at every count, and without a copy."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from v4jax.model import buffers
from v4jax.sharding import sequence
from v4jax.sharding.rules import ONE_DEVICE

WIDTH = 16


def written(buffer, rows, start, count):
    return buffers.write_rows(buffer, 0, rows, start, count)


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


@pytest.mark.parametrize("batch", [1, 3])
def test_writes_of_every_count(batch):
    """Also at the buffer's end. Of one row's write there is a gradient: none of what it covers."""
    buffer, rows = normal(0, 1, batch, 8, WIDTH), normal(1, batch, 2, WIDTH)
    g = normal(2, *buffer.shape)

    @jax.jit
    def run(start, count):
        if batch > 1:
            return (written(buffer, rows, start, count),)
        out, backward = jax.vjp(lambda *args: written(*args, start, count), buffer, rows)
        return out, *backward(g)

    for first in range(7):
        for real in range(3):
            start, count = (jnp.full((batch,), n, jnp.int32) for n in (first, real))
            wanted, dbuffer, drows = np.array(buffer), np.array(g), np.zeros(rows.shape)
            wanted[0, :, first : first + real] = rows[:, :real]
            dbuffer[0, :, first : first + real] = 0
            drows[:, :real] = g[0, :, first : first + real]
            found = run(start, count)
            for mine, other in zip(found, (wanted, dbuffer, drows)[: len(found)], strict=True):
                np.testing.assert_array_equal(mine, other)


@pytest.mark.parametrize("batch", [1, 3])
def test_a_cpu_copies_no_buffer_that_is_read_behind_a_write(batch):
    @functools.partial(jax.jit, donate_argnums=0)
    def step(buffer, rows, start, count, q):
        buffer = written(buffer, rows, start, count)
        return buffer, jnp.einsum("bnh,bkh->bnk", q, buffers.read_layer(buffer, 0))

    arrays = (normal(0, 1, batch, 512, WIDTH), normal(1, batch, 1, WIDTH))
    places = (jnp.zeros((batch,), jnp.int32), jnp.ones((batch,), jnp.int32))
    lowered = step.trace(*arrays, *places, normal(2, batch, 4, WIDTH)).lower()
    program = lowered.compile().as_text()
    assert not re.search(rf"f32\[1,{batch},512,{WIDTH}\]\S* copy\(", program)


def test_last_rows_of_a_decode_step():
    joined, total = normal(0, 2, 6, WIDTH), jnp.asarray([0, 1], jnp.int32)
    found = sequence.last_rows(ONE_DEVICE, joined, total, 5)
    np.testing.assert_array_equal(found, jnp.stack([joined[0, :5], joined[1, 1:]]))
