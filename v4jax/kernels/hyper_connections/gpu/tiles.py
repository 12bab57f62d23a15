"""Tiles on a GPU: how Triton programs share tokens and channels, and padding to whole tiles.

Streams go to a kernel as [N, M, D], as they lie in memory; a token's few numbers go as [X, N],
tokens last, so that a program holds each of them as a vector of tokens.
"""

import dataclasses

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from v4jax.kernels import blocks
from v4jax.kernels.hyper_connections import packing
from v4jax.kernels.hyper_connections.arguments import Packed, Sublayer

FEWEST = 16  # rows of the smallest matrix product
PROGRAMS = 264  # two for each multiprocessor of an H100


def round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


def power_of_two(n: int) -> int:
    """The smallest power of two that is not less."""
    return 1 << (n - 1).bit_length()


@dataclasses.dataclass(frozen=True)
class Plan:
    """Sizes of a call.

    Attributes:
      tokens, channels: a tile of a matrix product.
      n, d: tokens and channels padded to whole tiles.
      warps, stages: of the kernels that multiply.
    """

    tokens: int
    channels: int
    n: int
    d: int
    warps: int
    stages: int

    def params(self, times: int = 1):
        """`times` as many warps, for a kernel that holds tiles of several streams."""
        return plt.CompilerParams(num_warps=times * self.warps, num_stages=self.stages)

    def vector_params(self, m: int):
        """For those kernels: 16 numbers per thread."""
        warps = max(self.vector(m) * m * m // 512, 1)
        return plt.CompilerParams(num_warps=warps, num_stages=1)

    def vector(self, m: int) -> int:
        """Tokens of a program of the kernels that work on the small numbers, [M, M] a token."""
        most = max(2048 // (m * m), 32)
        return next(size for size in (128, 64, 32, 16) if size <= most and self.n % size == 0)

    def elementwise(self, elements: int = 2048):
        """(tokens, channels) of a tile of an elementwise kernel."""
        channels = min(self.d & -self.d, 1024)
        return min(max(elements // channels, 1), FEWEST), channels


def plan(h_BTMD, fewest: int = FEWEST) -> Plan:
    """Sizes for streams [B, T, M, D]; `fewest`: tokens are a multiple of it."""
    batch, length, _, d = h_BTMD.shape
    sizes = blocks.blocks("cuda").hyper_connections
    tokens = max(min(sizes.tokens, power_of_two(batch * length)), fewest)
    channels = sizes.channels
    if h_BTMD.dtype == jnp.float32:
        # Float32 products are done without the tensor cores, out of registers.
        tokens, channels = max(min(tokens, 32), fewest), min(channels, 32)
    d = round_up(d, FEWEST)
    channels = min(channels, d & -d)
    n = round_up(batch * length, tokens)
    return Plan(tokens, channels, n, d, sizes.warps, sizes.stages)


def splits(tiles: int, steps: int) -> int:
    """Programs that share the `steps` of each tile, so that all multiprocessors have work."""
    count = 1
    while tiles * count < PROGRAMS and steps % (2 * count) == 0 and steps // count >= 8:
        count *= 2
    return count


def pack(sublayer: Sublayer, plan: Plan) -> Packed:
    """y [N, D], the streams [N, M, D] and the coefficients [M + M*M, N]."""
    coefficients = small(packing.rows_of_tokens(sublayer), plan)
    return Packed(rows(sublayer.y, plan), streams(sublayer.h, plan), coefficients)


def streams(h_BTMD, plan: Plan):
    """[N, M, D], padded."""
    m, d = h_BTMD.shape[-2:]
    h_NMD = h_BTMD.reshape(-1, m, d)
    padding = ((0, plan.n - h_NMD.shape[0]), (0, 0), (0, plan.d - d))
    return jnp.pad(h_NMD, padding) if any(map(any, padding)) else h_NMD


def unstreams(h_NMD, like):
    """The inverse of `streams`."""
    batch, length, _, d = like.shape
    return h_NMD[: batch * length, :, :d].reshape(like.shape)


def rows(y_BTD, plan: Plan):
    """[N, D], padded."""
    return streams(y_BTD[:, :, None], plan)[:, 0]


def small(x_XN, plan: Plan):
    """[X, N], padded."""
    return jnp.pad(x_XN, ((0, 0), (0, plan.n - x_XN.shape[1])))


def whole(array):
    """The block that is all of an array."""
    return pl.BlockSpec(array.shape, lambda *_: (0,) * len(array.shape))
