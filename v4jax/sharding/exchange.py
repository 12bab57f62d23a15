"""The exchange of rows between shards, each shard another number of rows with each other one.

`jax.lax.ragged_all_to_all` on TPU and GPU; on a CPU, which has none, an all-to-all of padded blocks
with the same result. Every shard knows how many rows go from each shard to each expert, so room
that does not suffice shows on all of them at once, before a row moves.
"""

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from v4jax.errors import InputError
from v4jax.sharding.rules import Layout


class Side(NamedTuple):
    """Blocks of rows of one shard's buffer, one for each other shard; [S] each.

    Attributes:
      start_S, size_S: the blocks here.
      far_S: where the same rows start in the other shard's buffer.
    """

    start_S: jax.Array
    size_S: jax.Array
    far_S: jax.Array


@dataclasses.dataclass(frozen=True)
class Exchange:
    """Moves rows to the shards of their experts and back; each is the other's gradient.

    Attributes:
      sent, received: blocks of the rows before and after `there`.
      rows_here, rows_there: lengths of those buffers.
      block: rows that two shards exchange at most, where blocks are padded.
    """

    axes: tuple[str, ...]
    sent: Side
    received: Side
    rows_here: int
    rows_there: int
    block: int

    def there(self, x_R: jax.Array) -> jax.Array:
        """Rows sorted by expert, to their experts: sorted by shard of origin, then zeros."""
        static = (self.axes, self.rows_here, self.rows_there, self.block)
        return _move(static, x_R, self.sent, self.received)

    def back(self, y_R: jax.Array) -> jax.Array:
        """What `there` brought, back where it was."""
        static = (self.axes, self.rows_there, self.rows_here, self.block)
        return _move(static, y_R, self.received, self.sent)


def plan_exchange(
    layout: Layout, axes: tuple[str, ...], counts_E: jax.Array, shape: tuple[int, int]
) -> tuple[Exchange, jax.Array, jax.Array | None]:
    """The exchange for counts_E rows of each expert [experts], of tokens and choices `shape`.

    Returns:
      The exchange; rows from each shard to each of this shard's experts, [S, E]; and whether there
      is too little room, None if that cannot be. In that case nothing moves.
    """
    tokens, k = shape
    count = lax.axis_size(axes)
    block = _block(tokens, k, counts_E.shape[0] // count, count, layout.capacity)
    counts_SE = lax.all_gather(counts_E, axes)
    passed = None
    if block < tokens * k:
        needed = _needed(counts_SE, count)
        passed = needed > block * count
        # Without a capacity only a token that chose an expert twice comes here. A described device
        # has no host to raise on.
        if layout.capacity is not None and layout.mesh.devices.flat[0] in jax.devices():
            refuse = functools.partial(_refuse, room=block * count, even=math.prod(shape))
            lax.cond(passed, lambda: jax.debug.callback(refuse, needed), lambda: None)
        counts_SE = jnp.where(passed, 0, counts_SE)
    counts_SSE = counts_SE.reshape(count, count, -1)
    sizes_SS = counts_SSE.sum(-1, dtype=jnp.int32)  # from, to
    leaves_SS = jnp.cumsum(sizes_SS, 1) - sizes_SS
    lands_SS = jnp.cumsum(sizes_SS, 0) - sizes_SS
    me = lax.axis_index(axes)
    sent = Side(leaves_SS[me], sizes_SS[me], lands_SS[me])
    received = Side(lands_SS[:, me], sizes_SS[:, me], leaves_SS[:, me])
    exchange = Exchange(axes, sent, received, tokens * k, block * count, block)
    return exchange, counts_SSE[:, me], passed


def _block(tokens, k, experts, count, capacity):
    """Rows that one shard can send to another: as many as there could be, or `capacity`."""
    most = tokens * min(k, experts)
    if capacity is None:
        return most
    return max(1, min(most, math.ceil(capacity * tokens * k / count)))


def _needed(counts_SE, count):
    """Rows of the fullest buffer, blocks padded to the longest where they are padded."""

    def padded(sizes_SS):
        return count * sizes_SS.max()

    def ragged(sizes_SS):
        return sizes_SS.sum(0, dtype=jnp.int32).max()

    sizes_SS = counts_SE.reshape(count, count, -1).sum(-1, dtype=jnp.int32)
    return lax.platform_dependent(sizes_SS, tpu=ragged, cuda=ragged, default=padded)


def _refuse(needed: Any, *, room: int, even: int) -> None:
    raise InputError(
        f"the exchange of tokens needs room for {int(needed)} rows on a shard and has {room}, "
        f"{room / even:.3g} times an even spread of {even}; expected a capacity of at least "
        f"{math.ceil(100 * int(needed) / even) / 100} in Layout, or None for room that always "
        "suffices (a token's experts must differ from one another)"
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _move(static, x_R, source: Side, target: Side):
    """Blocks `source` of x [R, ...] to the other shards, theirs to the blocks `target`.

    Args:
      static: mesh axes, rows of x and of the result, rows of a padded block.
    """
    axes, _, rows, block = static

    def ragged(x_R, source, target):
        out = jnp.zeros((rows, *x_R.shape[1:]), x_R.dtype)
        return lax.ragged_all_to_all(
            x_R, out, source.start_S, source.size_S, source.far_S, target.size_S, axis_name=axes
        )

    padded = functools.partial(_padded, axes, rows, block)
    return lax.platform_dependent(x_R, source, target, tpu=ragged, cuda=ragged, default=padded)


def _padded(axes, rows, block, x_R, source, target):
    within = jnp.arange(block, dtype=jnp.int32)[None]
    index_SB = source.start_S[:, None] + within
    own_SB = within < source.size_S[:, None]
    blocks = _where(own_SB, x_R.at[index_SB].get(mode="clip"))
    blocks = lax.all_to_all(blocks, axes, 0, 0, tiled=True)
    # The blocks lie in `target` one after another, in order of shards.
    origin_R = jnp.repeat(
        jnp.arange(target.size_S.size, dtype=jnp.int32), target.size_S, total_repeat_length=rows
    )
    row_R = jnp.arange(rows, dtype=jnp.int32)
    y_R = blocks.at[origin_R, row_R - target.start_S[origin_R]].get(mode="clip")
    return _where(row_R < target.size_S.sum(dtype=jnp.int32), y_R)


def _where(mask, x):
    return jnp.where(mask.reshape(*mask.shape, *[1] * (x.ndim - mask.ndim)), x, 0)


def _move_forward(static, x_R, source, target):
    return _move(static, x_R, source, target), (source, target)


def _move_backward(static, kept, dy_R):
    axes, rows_from, rows_to, block = static
    source, target = kept
    return _move((axes, rows_to, rows_from, block), dy_R, target, source), None, None


_move.defvjp(_move_forward, _move_backward)
