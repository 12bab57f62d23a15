"""Tiles of tokens on a TPU: what of a token stands in VMEM, and how arrays are laid out for it.

Streams go to a kernel as [M, N, D] (N tokens on sublanes, channels on lanes), so that a stream of a
tile is a matrix; XLA may give [B, T, M, D] that order in memory and then nothing is copied. The few
numbers a token has ([X, N], tokens last) go as [tiles, X, tokens], tokens on lanes.
"""

import dataclasses

import einops
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu

from v4jax.kernels import blocks
from v4jax.kernels.hyper_connections import packing
from v4jax.kernels.hyper_connections.arguments import Mixing, Packed, Sublayer

LANES = 128
ROWS = 16  # tokens a loop over a tile takes at once: one packed bfloat16 register of each stream
HEADROOM = 8 << 20  # for what the compiler itself keeps in VMEM


def round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


@dataclasses.dataclass(frozen=True)
class Footprint:
    """Bytes of VMEM that a kernel needs: a token's (buffered twice, and scratch), and the rest."""

    buffered: int
    scratch: int
    fixed: int

    def bytes(self, tokens: int) -> int:
        return tokens * (2 * self.buffered + self.scratch) + self.fixed


@dataclasses.dataclass(frozen=True)
class Plan:
    """How many tokens a tile holds, channels per loop step, and the VMEM asked for."""

    tokens: int
    channels: int
    vmem: int

    def params(self, *semantics: str):
        return pltpu.CompilerParams(dimension_semantics=semantics, vmem_limit_bytes=self.vmem)


def footprint(h, buffered: int, kept: int = 0, backward: bool = False) -> Footprint:
    """The VMEM of a kernel on streams h [.., M, D].

    Args:
      buffered: bytes a token brings in and takes out, for each of the D channels.
      kept: bytes a token leaves in scratch, for each of the D channels.
      backward: the kernel accumulates d(fn) and keeps the Sinkhorn iterates.
    """
    m, d = h.shape[-2:]
    d = round_up(d, LANES)
    x = (2 + m) * m
    # fn in float32 or as three bfloat16 parts; d(fn) in float32, two buffers.
    weights = (6 + (2 * 4 if backward else 0)) * x * m * d
    # Small arrays: about ten of X rows each, and 20 or so iterates of M rows padded to 8.
    small = 4 * (10 * round_up(x, 8) + 2 * LANES + (32 if backward else 1) * m * 8)
    return Footprint(buffered * d, kept * d + small, weights)


def capacity() -> int:
    """VMEM that a kernel plans with.

    The v5p and tpu7x compilers leave it a little less than 64 MiB; where there is more, a larger
    tile gains nothing.
    """
    return min(blocks.MEMORY[blocks.chip("tpu")], 62 << 20)


def plan(streams, need: Footprint) -> Plan:
    """Tokens of a tile: as many as the block sizes in force say, halved until they fit."""
    sizes = blocks.blocks("tpu").hyper_connections
    n = streams.shape[0] * streams.shape[1]
    tokens = min(round_up(sizes.tokens, ROWS), round_up(n, ROWS))
    while tokens > ROWS and need.bytes(tokens) + HEADROOM > capacity():
        tokens = round_up(tokens // 2, ROWS)
    d = round_up(streams.shape[-1], LANES)
    fitting = [c for c in range(LANES, d + 1, LANES) if d % c == 0 and c <= sizes.channels]
    return Plan(tokens, max(fitting, default=LANES), _vmem(need.bytes(tokens)))


def _vmem(needed):
    return min(capacity(), needed + HEADROOM)


def too_large(streams, need: Footprint) -> str | None:
    """Why the smallest tile does not fit, or None."""
    smallest = need.bytes(ROWS) + HEADROOM
    if smallest <= capacity():
        return None
    m, d = streams.shape[-2:]
    return (
        f"{ROWS} tokens of {m} streams of {d} channels ({streams.dtype}) need "
        f"{smallest >> 20} MiB of VMEM and {blocks.chip('tpu')} has {capacity() >> 20} MiB"
    )


def pack(sublayer: Sublayer, tokens: int) -> Packed:
    """y [N, D], the streams [M, N, D] and the coefficients [tiles, M + M*M, tokens]."""
    y_ND, h_MND = rows_of(sublayer.y, tokens), stream_major(sublayer.h, tokens)
    return Packed(y_ND, h_MND, pack_mixing(sublayer, tokens))


def pack_mixing(mixing: Sublayer | Mixing, tokens: int):
    """post above comb, row major: [tiles, M + M*M, tokens]."""
    return to_lanes(packing.rows_of_tokens(mixing), tokens)


def stream_major(h_BTMD, tokens: int):
    """[M, N, D], N padded to whole tiles and D to whole lanes."""
    h_MND = einops.rearrange(h_BTMD, "b t m d -> m (b t) d")
    _, n, d = h_MND.shape
    padding = ((0, 0), (0, -n % tokens), (0, -d % LANES))
    return jnp.pad(h_MND, padding) if any(map(any, padding)) else h_MND


def token_major(h_MND, like):
    """The inverse of `stream_major`: [B, T, M, D] as `like`."""
    batch, length, _, d = like.shape
    return einops.rearrange(h_MND[:, : batch * length, :d], "m (b t) d -> b t m d", b=batch)


def rows_of(y_BTD, tokens: int):
    """[N, D], padded as `stream_major` pads."""
    y_ND = einops.rearrange(y_BTD, "b t d -> (b t) d")
    padding = ((0, -y_ND.shape[0] % tokens), (0, -y_ND.shape[1] % LANES))
    return jnp.pad(y_ND, padding) if any(map(any, padding)) else y_ND


def to_lanes(small_XN, tokens: int):
    """[X, N] as [tiles, X, tokens]."""
    small = jnp.pad(small_XN, ((0, 0), (0, -small_XN.shape[1] % tokens)))
    return einops.rearrange(small, "x (g t) -> g x t", t=tokens)


def from_lanes(small_GXT, n: int):
    """The inverse of `to_lanes`."""
    return einops.rearrange(small_GXT, "g x t -> x (g t)")[:, :n]
