"""mHC on a TPU, forward: a tile of tokens reads its streams once and keeps them in VMEM."""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from v4jax.kernels.hyper_connections import bind, packing
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


@functools.partial(jax.jit, static_argnames=("options", "dtype", "plan", "interpret"))
def _pre(h_BTMD, fn_XV, base_X, scale_3, *, options, dtype, plan, interpret):
    batch, length, m, d = h_BTMD.shape
    h_MND = tiles.stream_major(h_BTMD, plan.tokens)
    weights = weight_operands(fn_XV, base_X, scale_3, m, h_MND.shape[-1], h_BTMD.dtype)
    specs = Specs(h_MND, plan)
    out = pl.pallas_call(
        functools.partial(_pre_kernel, d=d, options=options, channels=plan.channels),
        grid=(specs.tiles,),
        in_specs=[specs.streams, *map(specs.whole, weights)],
        out_specs=(specs.vector, *specs.mixing_specs()),
        out_shape=(specs.vector_shape(dtype), *specs.mixing_shapes()),
        scratch_shapes=specs.mixing_scratch(),
        compiler_params=plan.params("parallel"),
        interpret=interpret,
        name="mhc_pre",
    )(h_MND, *weights)
    u_ND, *mixing = out
    u_BTD = u_ND[: batch * length, :d].reshape(batch, length, d)
    return u_BTD, *unpack_mixing(mixing, batch, length, m)


@functools.partial(jax.jit, static_argnames=("dtype", "plan", "interpret"))
def _post(y_BTD, h_BTMD, post_BTM, comb_BTMM, *, dtype, plan, interpret):
    h_MND = tiles.stream_major(h_BTMD, plan.tokens)
    specs = Specs(h_MND, plan)
    coefficients = pack_coefficients(post_BTM, comb_BTMM, plan.tokens)
    out_MND = pl.pallas_call(
        functools.partial(_post_kernel, channels=plan.channels),
        grid=(specs.tiles,),
        in_specs=[specs.vector, specs.streams, specs.small(coefficients.shape[1])],
        out_specs=specs.streams,
        out_shape=jax.ShapeDtypeStruct(h_MND.shape, dtype),
        scratch_shapes=[specs.tall()],
        compiler_params=plan.params("parallel"),
        interpret=interpret,
        name="mhc_post",
    )(tiles.rows_of(y_BTD, plan.tokens), h_MND, coefficients)
    return tiles.token_major(out_MND, h_BTMD)


@functools.partial(jax.jit, static_argnames=("options", "dtype", "plan", "interpret"))
def _post_pre(
    y_BTD,
    h_BTMD,
    post_BTM,
    comb_BTMM,
    fn_XV,
    base_X,
    scale_3,
    *,
    options,
    dtype,
    plan,
    interpret,
):
    batch, length, m, d = h_BTMD.shape
    h_MND = tiles.stream_major(h_BTMD, plan.tokens)
    weights = weight_operands(fn_XV, base_X, scale_3, m, h_MND.shape[-1], dtype)
    specs = Specs(h_MND, plan)
    coefficients = pack_coefficients(post_BTM, comb_BTMM, plan.tokens)
    out = pl.pallas_call(
        functools.partial(_post_pre_kernel, d=d, options=options, channels=plan.channels),
        grid=(specs.tiles,),
        in_specs=[
            specs.vector,
            specs.streams,
            specs.small(coefficients.shape[1]),
            *map(specs.whole, weights),
        ],
        out_specs=(specs.streams, specs.vector, *specs.mixing_specs()),
        out_shape=(
            jax.ShapeDtypeStruct(h_MND.shape, dtype),
            specs.vector_shape(dtype),
            *specs.mixing_shapes(),
        ),
        scratch_shapes=specs.mixing_scratch(),
        compiler_params=plan.params("parallel"),
        interpret=interpret,
        name="mhc_post_pre",
    )(tiles.rows_of(y_BTD, plan.tokens), h_MND, coefficients, *weights)
    new_MND, u_ND, *mixing = out
    u_BTD = tiles.unrows(u_ND, y_BTD)
    return tiles.token_major(new_MND, h_BTMD), u_BTD, *unpack_mixing(mixing, batch, length, m)


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

    def mixing_specs(self):
        """Blocks of the logits before scale and base, the rms factors and the weights."""
        return self.small(self.x), self.small(1), self.small(self.x)

    def mixing_shapes(self):
        return self.small_shape(self.x), self.small_shape(1), self.small_shape(self.x)

    def tall(self):
        return pltpu.VMEM((self.tokens, LANES), jnp.float32)

    def matrix(self, *count):
        return pltpu.VMEM((*count, self.m, self.m, self.tokens), jnp.float32)

    def mixing_scratch(self):
        return [self.tall(), self.matrix()]


def weight_operands(fn_XV, base_X, scale_3, m, padded, dtype):
    """fn by stream [M, .., D] as `project` takes it, base and the scale of each row as [X, 1]."""
    fn_MXD = by_stream(fn_XV, m, padded)
    if dtype == jnp.bfloat16:
        rows = ((0, 0), (0, -fn_MXD.shape[1] % 8), (0, 0))
        parts = [jnp.pad(part, rows) for part in packing.float_parts(fn_MXD, 3)]
        fn_MXD = jnp.concatenate(parts, axis=1).astype(dtype)
    return fn_MXD, base_X[:, None], packing.row_scale(scale_3, m)[:, None]


def by_stream(fn_XV, m, padded):
    """fn as [M, X, D], D padded."""
    fn_MXD = fn_XV.reshape(fn_XV.shape[0], m, -1).transpose(1, 0, 2)
    return jnp.pad(fn_MXD, ((0, 0), (0, 0), (0, padded - fn_MXD.shape[-1])))


def pack_coefficients(post_BTM, comb_BTMM, tokens):
    """post above comb, row major: [tiles, M + M*M, tokens]."""
    return tiles.to_lanes(packing.rows_of_tokens(post_BTM, comb_BTMM), tokens)


def unpack_mixing(mixing, batch, length, m):
    """post, comb, the logits [X, N] and the rms factors [N]."""
    mixed_XN, norm_1N, weights_XN = (tiles.from_lanes(x, batch * length) for x in mixing)
    post_BTM, comb_BTMM = packing.tokens_of_rows(weights_XN[m:], (batch, length, m))
    return post_BTM, comb_BTMM, mixed_XN, norm_1N[0]


def _pre_kernel(
    h_ref,
    fn_ref,
    base_ref,
    scale_ref,
    u_ref,
    mixed_ref,
    norm_ref,
    weights_ref,
    tall_ref,
    matrix_ref,
    *,
    d,
    options,
    channels,
):
    iterations, eps, rms_eps = options
    m, x = h_ref.shape[0], base_ref.shape[0]
    squares(h_ref, tall_ref, channels)
    norm_ref[...] = jax.lax.rsqrt(from_tall(tall_ref, 1) / (m * d) + rms_eps)
    mixed_ref[...] = project(h_ref, fn_ref, x) * norm_ref[...]
    logits = mixed_ref[...] * scale_ref[...] + base_ref[...]
    write_weights(logits, weights_ref, matrix_ref, iterations, eps)
    to_tall(weights_ref[...], tall_ref)
    collapse(h_ref, tall_ref, u_ref, channels)


def _post_kernel(y_ref, h_ref, coefficient_ref, out_ref, tall_ref, *, channels):
    to_tall(coefficient_ref[...], tall_ref)
    recombine(y_ref, h_ref, tall_ref, out_ref, channels)


def _post_pre_kernel(y_ref, h_ref, coefficient_ref, fn_ref, base_ref, scale_ref, *refs, **options):
    out_ref, *rest = refs
    tall_ref = rest[-2]
    to_tall(coefficient_ref[...], tall_ref)
    recombine(y_ref, h_ref, tall_ref, out_ref, options["channels"])
    _pre_kernel(out_ref, fn_ref, base_ref, scale_ref, *rest, **options)


def plan_for(need):
    """The plan of a kernel with the footprint need(streams, dtype)."""
    return lambda h_BTMD, dtype: tiles.plan(h_BTMD, need(h_BTMD, dtype))


# See api's functions of these names. Beside their results `pre` and `post_pre` give the logits
# [X, N] and the rms factors [N] that the gradients take.
pre = bind.forward(_pre, 0, plan_for(pre_footprint))
post = bind.forward(_post, 1, plan_for(post_footprint), ())
post_pre = bind.forward(_post_pre, 1, plan_for(post_pre_footprint))
