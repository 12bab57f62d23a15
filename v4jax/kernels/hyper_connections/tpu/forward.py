"""mHC on a TPU, forward: a tile of tokens reads its streams once and keeps them in VMEM."""

import functools
from typing import Any, NamedTuple

import einops
import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from v4jax.kernels.hyper_connections import bind, packing
from v4jax.kernels.hyper_connections.arguments import (
    Mixed,
    Mixing,
    Packed,
    Saved,
    Sublayer,
    Weights,
)
from v4jax.kernels.hyper_connections.tpu import tiles
from v4jax.kernels.hyper_connections.tpu.mixing import write_weights
from v4jax.kernels.hyper_connections.tpu.streams import (
    collapse,
    from_tall,
    project,
    recombine,
    squares,
    to_tall,
)
from v4jax.kernels.hyper_connections.tpu.tiles import LANES, Plan


def pre_footprint(h, dtype) -> tiles.Footprint:
    m, size = h.shape[-2], jnp.dtype(h.dtype).itemsize
    return tiles.footprint(h, m * size + jnp.dtype(dtype).itemsize)


def post_footprint(h, dtype) -> tiles.Footprint:
    m, size = h.shape[-2], jnp.dtype(h.dtype).itemsize
    return tiles.footprint(h, (m + 1) * size + m * jnp.dtype(dtype).itemsize)


def post_pre_footprint(h, dtype) -> tiles.Footprint:
    m, size = h.shape[-2], jnp.dtype(h.dtype).itemsize
    return tiles.footprint(h, (m + 1) * (size + jnp.dtype(dtype).itemsize))


class Scratch(NamedTuple):
    """Buffers: numbers of a token as columns [T, 128], and a matrix a token [M, M, T]."""

    tall: Any
    matrix: Any


@functools.partial(jax.jit, static_argnames=("options", "dtype", "plan", "interpret"))
def _pre(h_BTMD, weights: Weights, *, options, dtype, plan, interpret):
    batch, length, m, d = h_BTMD.shape
    h_MND = tiles.stream_major(h_BTMD, plan.tokens)
    operands = weight_operands(weights, m, h_MND.shape[-1], h_BTMD.dtype)
    specs = Specs(h_MND, plan)
    u_ND, mixed = pl.pallas_call(
        functools.partial(_pre_kernel, d=d, options=options, channels=plan.channels),
        grid=(specs.tiles,),
        in_specs=[specs.streams, jax.tree.map(specs.whole, operands)],
        out_specs=(specs.vector, specs.mixed_specs()),
        out_shape=(specs.vector_shape(dtype), specs.mixed_shapes()),
        scratch_shapes=[specs.scratch()],
        compiler_params=plan.params("parallel"),
        interpret=interpret,
        name="mhc_pre",
    )(h_MND, operands)
    u_BTD = u_ND[: batch * length, :d].reshape(batch, length, d)
    mixing, saved = unpack_mixed(mixed, (batch, length, m))
    return (u_BTD, mixing), saved


@functools.partial(jax.jit, static_argnames=("dtype", "plan", "interpret"))
def _post(sublayer: Sublayer, *, dtype, plan, interpret):
    packed = tiles.pack(sublayer, plan.tokens)
    specs = Specs(packed.h, plan)
    out_MND = pl.pallas_call(
        functools.partial(_post_kernel, channels=plan.channels),
        grid=(specs.tiles,),
        in_specs=[specs.packed()],
        out_specs=specs.streams,
        out_shape=jax.ShapeDtypeStruct(packed.h.shape, dtype),
        scratch_shapes=[specs.tall()],
        compiler_params=plan.params("parallel"),
        interpret=interpret,
        name="mhc_post",
    )(packed)
    return tiles.token_major(out_MND, sublayer.h)


@functools.partial(jax.jit, static_argnames=("options", "dtype", "plan", "interpret"))
def _post_pre(sublayer: Sublayer, weights: Weights, *, options, dtype, plan, interpret):
    batch, length, m, d = sublayer.h.shape
    packed = tiles.pack(sublayer, plan.tokens)
    operands = weight_operands(weights, m, packed.h.shape[-1], dtype)
    specs = Specs(packed.h, plan)
    new_MND, u_ND, mixed = pl.pallas_call(
        functools.partial(_post_pre_kernel, d=d, options=options, channels=plan.channels),
        grid=(specs.tiles,),
        in_specs=[specs.packed(), jax.tree.map(specs.whole, operands)],
        out_specs=(specs.streams, specs.vector, specs.mixed_specs()),
        out_shape=(
            jax.ShapeDtypeStruct(packed.h.shape, dtype),
            specs.vector_shape(dtype),
            specs.mixed_shapes(),
        ),
        scratch_shapes=[specs.scratch()],
        compiler_params=plan.params("parallel"),
        interpret=interpret,
        name="mhc_post_pre",
    )(packed, operands)
    new_BTMD, u_BTD = tiles.token_major(new_MND, sublayer.h), packing.unrows(u_ND, sublayer.y)
    mixing, saved = unpack_mixed(mixed, (batch, length, m))
    return (new_BTMD, u_BTD, mixing), saved


class Specs:
    """Blocks of a kernel over tiles of tokens; `tile` gives a tile's number from grid indices."""

    def __init__(self, h_MND, plan: Plan, tile=lambda g: g):
        m, n, d = h_MND.shape
        self.m, self.x, self.n, self.d, self.tokens = m, (2 + m) * m, n, d, plan.tokens
        self.tiles = n // plan.tokens
        self.tile = tile
        self.streams = pl.BlockSpec((m, plan.tokens, d), lambda *g: (0, tile(*g), 0))
        self.vector = pl.BlockSpec((plan.tokens, d), lambda *g: (tile(*g), 0))

    def small(self, rows):
        tile = self.tile
        return pl.BlockSpec((None, rows, self.tokens), lambda *g: (tile(*g), 0, 0))

    def whole(self, array):
        """All of an array, fetched once."""
        once = pl.Buffered(buffer_count=1)
        return pl.BlockSpec(array.shape, lambda *g: (0,) * array.ndim, pipeline_mode=once)

    def small_shape(self, rows):
        return jax.ShapeDtypeStruct((self.tiles, rows, self.tokens), jnp.float32)

    def vector_shape(self, dtype):
        return jax.ShapeDtypeStruct((self.n, self.d), dtype)

    def packed(self):
        """Blocks of a packed sub-layer."""
        return Packed(self.vector, self.streams, self.small(self.m + self.m * self.m))

    def mixed_specs(self):
        """Blocks of what is decided for each token."""
        return Mixed(self.small(self.x), self.small(1), self.small(self.x))

    def mixed_shapes(self):
        return Mixed(self.small_shape(self.x), self.small_shape(1), self.small_shape(self.x))

    def tall(self):
        return pltpu.VMEM((self.tokens, LANES), jnp.float32)

    def matrix(self, *count):
        return pltpu.VMEM((*count, self.m, self.m, self.tokens), jnp.float32)

    def scratch(self):
        return Scratch(self.tall(), self.matrix())


def weight_operands(weights: Weights, m, padded, dtype) -> Weights:
    """fn by stream [M, .., D] as `project` takes it, base and the scale of each row as [X, 1]."""
    fn_MXD = by_stream(weights.fn, m, padded)
    if dtype == jnp.bfloat16:
        rows = ((0, 0), (0, -fn_MXD.shape[1] % 8), (0, 0))
        parts = [jnp.pad(part, rows) for part in packing.float_parts(fn_MXD, 3)]
        fn_MXD = jnp.concatenate(parts, axis=1).astype(dtype)
    return Weights(fn_MXD, *packing.rows_as_columns(weights, m))


def by_stream(fn_XV, m, padded):
    """fn as [M, X, D], D padded."""
    fn_MXD = einops.rearrange(fn_XV, "x (m d) -> m x d", m=m)
    return jnp.pad(fn_MXD, ((0, 0), (0, 0), (0, padded - fn_MXD.shape[-1])))


def unpack_mixed(mixed: Mixed, like_BTM) -> tuple[Mixing, Saved]:
    """post and comb; the logits [X, N] and the rms factors [N]."""
    batch, length, m = like_BTM
    mixed_XN, norm_1N, weights_XN = (tiles.from_lanes(x, batch * length) for x in mixed)
    return packing.tokens_of_rows(weights_XN[m:], like_BTM), Saved(mixed_XN, norm_1N[0])


def _pre_kernel(h_ref, weights, u_ref, out: Mixed, scratch, *, d, options, channels):
    iterations, eps, rms_eps = options
    m, x = h_ref.shape[0], weights.base.shape[0]
    squares(h_ref, scratch.tall, channels)
    out.norm[...] = jax.lax.rsqrt(from_tall(scratch.tall, 1) / (m * d) + rms_eps)
    out.mixed[...] = project(h_ref, weights.fn, x) * out.norm[...]
    logits = out.mixed[...] * weights.scale[...] + weights.base[...]
    write_weights(logits, out.weights, scratch.matrix, iterations, eps)
    to_tall(out.weights[...], scratch.tall)
    collapse(h_ref, scratch.tall, u_ref, channels)


def _post_kernel(packed, out_ref, tall_ref, *, channels):
    to_tall(packed.coefficients[...], tall_ref)
    recombine(packed.y, packed.h, tall_ref, out_ref, channels)


def _post_pre_kernel(packed, weights, new_ref, u_ref, out: Mixed, scratch, **options):
    _post_kernel(packed, new_ref, scratch.tall, channels=options["channels"])
    _pre_kernel(new_ref, weights, u_ref, out, scratch, **options)


def plan_for(need):
    """The plan of a kernel with the footprint need(streams, dtype)."""
    return lambda h_BTMD, dtype: tiles.plan(h_BTMD, need(h_BTMD, dtype))


# See api's functions of these names. `pre` and `post_pre` also give what the gradients keep.
pre = bind.forward(_pre, plan_for(pre_footprint))
post = bind.forward(_post, plan_for(post_footprint), ())
post_pre = bind.forward(_post_pre, plan_for(post_pre_footprint))
