"""mHC on a TPU, backward. Everything is recomputed from the inputs and the small logits in VMEM.

The grid is (cores, tiles of a core): d(fn) adds up in VMEM over the tiles of a core.
"""

import functools
from typing import Any, NamedTuple

import einops
import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from v4jax.kernels.hyper_connections import bind, packing
from v4jax.kernels.hyper_connections.arguments import Mixing, Packed, Saved, Sublayer, Weights
from v4jax.kernels.hyper_connections.tpu import tiles
from v4jax.kernels.hyper_connections.tpu.forward import Specs, by_stream, plan_for
from v4jax.kernels.hyper_connections.tpu.mixing import write_dlogits
from v4jax.kernels.hyper_connections.tpu.streams import (
    FLOAT32,
    columns,
    fold,
    for_channels,
    for_rows,
    from_tall,
    load,
    recombine,
    store_sums,
    to_tall,
)
from v4jax.kernels.hyper_connections.tpu.tiles import LANES, ROWS, round_up


def pre_footprint(h, dtype) -> tiles.Footprint:
    m, size = h.shape[-2], jnp.dtype(h.dtype).itemsize
    return tiles.footprint(h, 2 * m * size + jnp.dtype(dtype).itemsize, backward=True)


def post_footprint(h, dtype) -> tiles.Footprint:
    m, size = h.shape[-2], jnp.dtype(h.dtype).itemsize
    return tiles.footprint(h, (2 * m + 2) * size + m * jnp.dtype(dtype).itemsize)


def post_pre_footprint(h, dtype) -> tiles.Footprint:
    m, size, out = h.shape[-2], jnp.dtype(h.dtype).itemsize, jnp.dtype(dtype).itemsize
    return tiles.footprint(h, (2 * m + 2) * size + (m + 1) * out, m * out, backward=True)


class Small(NamedTuple):
    """A token's numbers, one row per number: logits, rms factor, gradients of post above comb."""

    mixed: Any
    norm: Any
    dmixing: Any


class LogitGrads(NamedTuple):
    """d(fn), summed over the tiles of a core, and the gradients of the logits."""

    dfn: Any
    dlogits: Any


class Scratch(NamedTuple):
    """Buffers.

    Attributes:
      tall: numbers of a token as columns [T, 128].
      dweights: gradients of all weights [X, T]. wide: rows to be transposed into tall.
      matrix, iterate: of the Sinkhorn rounds, [M, M, T] and [iterations, M, M, T].
    """

    tall: Any
    dweights: Any
    wide: Any
    matrix: Any
    iterate: Any


@functools.partial(jax.jit, static_argnames=("options", "plan", "interpret"))
def _pre_backward(h_BTMD, weights: Weights, saved: Saved, grads, *, options, plan, interpret):
    m, d = h_BTMD.shape[-2:]
    du_BTD, dmixing = grads
    h_MND = tiles.stream_major(h_BTMD, plan.tokens)
    cores, specs = core_grid(h_MND, plan)
    small = small_operands(saved, dmixing, plan.tokens)
    operands = weight_operands(weights, m, h_MND.shape[-1], h_BTMD.dtype)
    dh_MND, logit_grads = pl.pallas_call(
        functools.partial(_pre_kernel, d=d, options=options, channels=plan.channels),
        grid=(cores, specs.tiles // cores),
        in_specs=[
            specs.streams,
            specs.vector,
            small_specs(specs, small),
            jax.tree.map(specs.whole, operands),
        ],
        out_specs=(specs.streams, logit_grad_specs(specs)),
        out_shape=(
            jax.ShapeDtypeStruct(h_MND.shape, h_BTMD.dtype),
            logit_grad_shapes(specs, cores),
        ),
        scratch_shapes=[pre_scratch(specs, options)],
        compiler_params=plan.params("parallel", "arbitrary"),
        interpret=interpret,
        name="mhc_pre_backward",
    )(h_MND, tiles.rows_of(du_BTD, plan.tokens), small, operands)
    return tiles.token_major(dh_MND, h_BTMD), weight_grads(logit_grads, saved.mixed, d)


@functools.partial(jax.jit, static_argnames=("plan", "interpret"))
def _post_backward(sublayer: Sublayer, grad_BTMD, *, plan, interpret):
    packed = tiles.pack(sublayer, plan.tokens)
    specs = Specs(packed.h, plan)
    [dpacked] = pl.pallas_call(
        functools.partial(_post_kernel, channels=plan.channels),
        grid=(specs.tiles,),
        in_specs=[specs.streams, specs.packed()],
        out_specs=(specs.packed(),),
        out_shape=(packed_shapes(specs, packed, sublayer),),
        scratch_shapes=[specs.tall()],
        compiler_params=plan.params("parallel"),
        interpret=interpret,
        name="mhc_post_backward",
    )(tiles.stream_major(grad_BTMD, plan.tokens), packed)
    return unpacked(dpacked, sublayer)


@functools.partial(jax.jit, static_argnames=("options", "plan", "interpret"))
def _post_pre_backward(
    sublayer: Sublayer, new_BTMD, weights: Weights, saved: Saved, grads, *, options, plan, interpret
):
    del new_BTMD  # Cheaper to compute again than to read: y and h are read in any case.
    m, d = sublayer.h.shape[-2:]
    grad_BTMD, du_BTD, dmixing = grads
    packed = tiles.pack(sublayer, plan.tokens)
    cores, specs = core_grid(packed.h, plan)
    small = small_operands(saved, dmixing, plan.tokens)
    operands = weight_operands(weights, m, packed.h.shape[-1], grad_BTMD.dtype)
    dpacked, logit_grads = pl.pallas_call(
        functools.partial(_post_pre_kernel, d=d, options=options, channels=plan.channels),
        grid=(cores, specs.tiles // cores),
        in_specs=[
            specs.packed(),
            specs.streams,
            specs.vector,
            small_specs(specs, small),
            jax.tree.map(specs.whole, operands),
        ],
        out_specs=(specs.packed(), logit_grad_specs(specs)),
        out_shape=(packed_shapes(specs, packed, sublayer), logit_grad_shapes(specs, cores)),
        scratch_shapes=[
            pltpu.VMEM((m, plan.tokens, specs.d), grad_BTMD.dtype),
            pre_scratch(specs, options),
        ],
        compiler_params=plan.params("parallel", "arbitrary"),
        interpret=interpret,
        name="mhc_post_pre_backward",
    )(
        packed,
        tiles.stream_major(grad_BTMD, plan.tokens),
        tiles.rows_of(du_BTD, plan.tokens),
        small,
        operands,
    )
    return unpacked(dpacked, sublayer), weight_grads(logit_grads, saved.mixed, d)


def core_grid(h_MND, plan):
    """How many cores share the tiles (v5p has two behind one device), and the blocks for it."""
    count = h_MND.shape[1] // plan.tokens
    cores = 2 if count % 2 == 0 else 1
    return cores, Specs(h_MND, plan, lambda core, g: core * (count // cores) + g)


def packed_shapes(specs, packed: Packed, sublayer: Sublayer) -> Packed:
    """Of the gradients of a packed sub-layer."""
    return Packed(
        specs.vector_shape(sublayer.y.dtype),
        jax.ShapeDtypeStruct(packed.h.shape, sublayer.h.dtype),
        specs.small_shape(packed.coefficients.shape[1]),
    )


def unpacked(dpacked: Packed, like: Sublayer) -> Sublayer:
    """The gradients of y, the streams, post and comb."""
    batch, length, m, _ = like.h.shape
    rows = tiles.from_lanes(dpacked.coefficients, batch * length)
    return Sublayer(
        packing.unrows(dpacked.y, like.y),
        tiles.token_major(dpacked.h, like.h),
        *packing.tokens_of_rows(rows, (batch, length, m)),
    )


def logit_grad_specs(specs):
    dfn = pl.BlockSpec((None, specs.m, specs.x, specs.d), lambda core, g: (core, 0, 0, 0))
    return LogitGrads(dfn, specs.small(specs.x))


def logit_grad_shapes(specs, cores):
    dfn = jax.ShapeDtypeStruct((cores, specs.m, specs.x, specs.d), jnp.float32)
    return LogitGrads(dfn, specs.small_shape(specs.x))


def pre_scratch(specs, options):
    return Scratch(
        tall=specs.tall(),
        dweights=pltpu.VMEM((specs.x, specs.tokens), jnp.float32),
        wide=pltpu.VMEM((round_up(specs.m + 1, 8), specs.tokens), jnp.float32),
        matrix=specs.matrix(),
        iterate=specs.matrix(options[0]),
    )


def small_operands(saved: Saved, dmixing: Mixing, tokens) -> Small:
    """The logits, rms factors and the weights' gradients of each tile."""
    grads = tiles.pack_mixing(dmixing, tokens)
    mixed, norm = tiles.to_lanes(saved.mixed, tokens), tiles.to_lanes(saved.norm[None], tokens)
    return Small(mixed, norm, grads)


def small_specs(specs, small: Small) -> Small:
    return jax.tree.map(lambda x: specs.small(x.shape[1]), small)


def weight_operands(weights: Weights, m, padded, dtype) -> Weights:
    """fn by stream for `_draw_operands`' left side; base and scale as [X, 1]."""
    fn_MXD = by_stream(weights.fn, m, padded)
    if dtype == jnp.bfloat16:
        high, low = packing.float_parts(fn_MXD, 2)
        fn_MXD = jnp.concatenate([high, low, high], axis=1).astype(dtype)
    return Weights(fn_MXD, *packing.rows_as_columns(weights, m))


def weight_grads(grads: LogitGrads, mixed_XN, d) -> Weights:
    """d(fn), d(base), d(scale) from the cores' sums and the gradients of the logits."""
    m = grads.dfn.shape[1]
    dfn_XV = einops.rearrange(grads.dfn.sum(0)[..., :d], "m x d -> x (m d)")
    dlogits_XN = tiles.from_lanes(grads.dlogits, mixed_XN.shape[1])
    return Weights(dfn_XV, *packing.logit_grads(dlogits_XN, mixed_XN, m))


def _post_pre_kernel(
    packed, grad_ref, du_ref, small, weights, dpacked, dlogits, new_ref, scratch, **options
):
    """The streams between the two halves, then their gradient, stand in new_ref."""
    channels = options["channels"]
    to_tall(packed.coefficients[...], scratch.tall)
    recombine(packed.y, packed.h, scratch.tall, new_ref, channels)
    halves = (small, weights, new_ref, dlogits, scratch)
    _pre_kernel(new_ref, du_ref, *halves, **options, grad_ref=grad_ref)
    _post_kernel(new_ref, packed, dpacked, scratch.tall, channels=channels)


def _post_kernel(grad_ref, packed, dpacked, tall_ref, *, channels):
    to_tall(packed.coefficients[...], tall_ref)
    recombine_backward(grad_ref, packed.h, tall_ref, dpacked, channels)
    coefficient_grads(grad_ref, packed, tall_ref, channels)
    dpacked.coefficients[...] = from_tall(tall_ref, dpacked.coefficients.shape[0])


def recombine_backward(grad_ref, h_ref, tall_ref, dpacked, channels):
    """dy = sum_j post[j] * g[j] and dh[i] = sum_j comb[i, j] * g[j]."""
    m, tokens, d = h_ref.shape

    def group(rows):
        coefficient = columns(tall_ref, rows, range(m + m * m))

        def tile(cols, _):
            g = [load(grad_ref, j, rows, cols) for j in range(m)]
            dy = sum(coefficient[j] * g[j] for j in range(m))
            dpacked.y[rows, cols] = dy.astype(dpacked.y.dtype)
            for i in range(m):
                dh = sum(coefficient[m + i * m + j] * g[j] for j in range(m))
                dpacked.h[i, rows, cols] = dh.astype(dpacked.h.dtype)

        for_channels(d, channels, tile)

    for_rows(tokens, group)


def coefficient_grads(grad_ref, packed, tall_ref, channels):
    """Columns of tall: d(post)[j] = <g[j], y>, then d(comb)[i, j] = <g[j], h[i]>, row major."""
    y_ref, h_ref = packed.y, packed.h
    m, tokens, d = h_ref.shape
    together = 4 if m <= 4 else 2  # sums of so many g[j] at once, so that they stay in registers

    def group(rows):
        sums = {}
        for first in range(0, m, together):
            chosen = range(first, min(first + together, m))

            def tile(cols, totals, chosen=chosen):
                x = [load(y_ref, rows, cols), *(load(h_ref, i, rows, cols) for i in range(m))]
                out = []
                for j in chosen:
                    g = load(grad_ref, j, rows, cols)
                    out += [fold(g * v) for v in x]
                return tuple(total + new for total, new in zip(totals, out, strict=True))

            zero = jnp.zeros((ROWS, LANES), jnp.float32)
            totals = for_channels(d, channels, tile, (zero,) * (len(chosen) * (m + 1)))
            for k, total in enumerate(totals):
                j, i = chosen[k // (m + 1)], k % (m + 1)
                sums[j if i == 0 else m + (i - 1) * m + j] = total
        store_sums(tall_ref, rows, [sums[k] for k in range(m + m * m)])

    for_rows(tokens, group)


def _pre_kernel(
    h_ref,
    du_ref,
    small,
    weights,
    dh_ref,
    out: LogitGrads,
    scratch,
    *,
    d,
    options,
    channels,
    grad_ref=None,
):
    """dh, d(logits) and this tile's d(fn); `grad_ref` is added to dh, which may be h's own ref."""
    m = h_ref.shape[0]
    inner_products(h_ref, du_ref, scratch.tall, channels)
    scratch.dweights[:m] = from_tall(scratch.tall, m)
    scratch.dweights[m:] = small.dmixing[...]
    logits = small.mixed[...] * weights.scale[...] + weights.base[...]
    rounds = (scratch.matrix, scratch.iterate)
    write_dlogits(logits, scratch.dweights, out.dlogits, scratch.wide, rounds, *options)
    dmixed = out.dlogits[...] * weights.scale[...]
    along = jnp.sum(dmixed * small.mixed[...], axis=0, keepdims=True)
    scratch.wide[m : m + 1] = small.norm[...] * small.norm[...] * along / (m * d)
    to_tall(scratch.wide[...], scratch.tall)
    draw_XT = dmixed * small.norm[...]

    @pl.when(pl.program_id(1) == 0)
    def _():
        out.dfn[...] = jnp.zeros_like(out.dfn)

    arrays = (draw_XT, weights.fn, scratch.tall, dh_ref, out.dfn)
    stream_grads(h_ref, du_ref, *arrays, channels, grad_ref)


def inner_products(h_ref, du_ref, tall_ref, channels):
    """tall[:, i] = <du, h[i]>."""
    m, tokens, d = h_ref.shape

    def group(rows):
        def tile(cols, totals):
            du = load(du_ref, rows, cols)
            return tuple(
                total + fold(du * load(h_ref, i, rows, cols)) for i, total in enumerate(totals)
            )

        zero = jnp.zeros((ROWS, LANES), jnp.float32)
        store_sums(tall_ref, rows, for_channels(d, channels, tile, (zero,) * m))

    for_rows(tokens, group)


def stream_grads(h_ref, du_ref, draw_XT, fn_ref, tall_ref, dh_ref, dfn_ref, channels, grad_ref):
    """dh[i] = pre[i] * du + draw @ fn - c * h[i] (+ grad), and d(fn) += draw @ h.

    Columns of tall: pre, then c, what the rms factor's gradient leaves.
    """
    m, tokens, d = h_ref.shape
    x = draw_XT.shape[0]
    exact = h_ref.dtype == jnp.bfloat16
    left, right = _draw_operands(draw_XT, exact)
    everything = pl.ds(0, tokens)
    coefficient = columns(tall_ref, everything, range(m + 1))

    def tile(cols, _):
        du = du_ref[:, cols].astype(jnp.float32)
        for i in range(m):
            h = h_ref[i, :, cols]
            dfn_ref[i, :, cols] += _dfn(right, h, x, exact)
            dh = _dot(left, fn_ref[i, :, cols], exact)
            dh = dh + coefficient[i] * du - coefficient[m] * h.astype(jnp.float32)
            if grad_ref is not None:
                dh = dh + grad_ref[i, :, cols].astype(jnp.float32)
            dh_ref[i, :, cols] = dh.astype(dh_ref.dtype)

    for_channels(d, min(channels, 2 * LANES) if d % (2 * LANES) == 0 else LANES, tile)


def _draw_operands(draw_XT, exact):
    """draw for `draw @ fn` [T, X] and for `draw @ h` [X, T].

    With bfloat16 streams both are bfloat16 parts side by side, so that one pass of the matrix unit
    gives 16 bits of the first product (its result is rounded to 8) and all 24 of the second.
    """
    if not exact:
        return draw_XT.T, draw_XT
    first, second, third = packing.float_parts(draw_XT, 3)
    left = jnp.concatenate([first.T, first.T, second.T], axis=1).astype(jnp.bfloat16)
    right = [_to_eight_rows(part) for part in (first, second, third)]
    return left, jnp.concatenate(right, axis=0).astype(jnp.bfloat16)


def _to_eight_rows(x_XT):
    missing = -x_XT.shape[0] % 8
    if not missing:
        return x_XT
    return jnp.concatenate([x_XT, jnp.zeros((missing, x_XT.shape[1]), jnp.float32)], axis=0)


def _dot(a, b, exact):
    precision = None if exact else FLOAT32
    dims = (((1,), (0,)), ((), ()))
    return jax.lax.dot_general(a, b, dims, precision=precision, preferred_element_type=jnp.float32)


def _dfn(right, h, x, exact):
    out = _dot(right, h, exact)
    if not exact:
        return out
    part = out.shape[0] // 3
    return (out[2 * part : 2 * part + x] + out[part : part + x]) + out[:x]


# Gradients of the arguments of api's functions from those of their results.
pre_backward = bind.backward(_pre_backward, plan_for(pre_footprint))
post_backward = bind.backward(_post_backward, plan_for(post_footprint), ())
post_pre_backward = bind.backward(_post_pre_backward, plan_for(post_pre_footprint))
