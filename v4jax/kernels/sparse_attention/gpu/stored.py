"""Stored rows in a GPU's registers: words and tails, loaded by index, to blocks of channels.

Triton joins no tensors side by side, so a tile of rows is PLANES blocks of 128 channels.
"""

import jax.numpy as jnp
from jax.experimental.pallas import triton as plt

from v4jax.kernels.sparse_attention.stored import (
    GROUP,
    LANES,
    PLANES,
    SCALES,
    TAIL,
    StoredRows,
    bf16_of,
    byte,
    e4m3,
    exp2,
    quarter,
    tail_row,
)


def load(entries: StoredRows, index_K, seen_K, dtype):
    """The rows of entries (references) as PLANES blocks [K,128], zero where not seen."""
    words, tails = entries.words, entries.tails
    index = jnp.where(seen_K, index_K, 0)
    row, first = tail_row(index), TAIL * quarter(index)
    lane = jnp.broadcast_to(jnp.arange(LANES)[None], (index.shape[0], LANES))
    kept, seen = lane < GROUP, jnp.broadcast_to(seen_K[:, None], lane.shape)
    word = plt.load(words.at[index[:, None], jnp.arange(LANES)[None]], mask=seen, other=0)
    scales = [
        plt.load(tails.at[row, first + SCALES + i], mask=seen_K, other=0)[:, None] for i in range(2)
    ]
    # The rope channels' low bytes go where the high ones are, to the upper half of the lanes.
    low = tails.at[row[:, None], first[:, None] + (lane & (SCALES - 1))]
    low = plt.load(low, mask=seen & (lane >= GROUP), other=0)
    low = (low >> ((lane - GROUP) >> 4 << 3)) & 255
    parts = []
    for i in range(PLANES):
        code = byte(word, i)
        scale = scales[i // 2] >> (16 * (i % 2))
        scale = jnp.where(kept, byte(scale, 0), byte(scale, 1))
        part = e4m3(code) * exp2(scale)
        if i == PLANES - 1:
            part = jnp.where(kept, part, bf16_of(code, low))
        parts.append(jnp.where(seen, part, 0.0).astype(dtype))
    return parts
