"""mHC on a TPU, backward. Everything is recomputed from the inputs and the small logits in VMEM.

The grid is (cores, tiles of a core): d(fn) adds up in VMEM over the tiles of a core.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from v4jax.kernels.hyper_connections import bind, packing
from v4jax.kernels.hyper_connections.tpu import tiles
from v4jax.kernels.hyper_connections.tpu.forward import (
    Specs,
    by_stream,
    pack_coefficients,
    plan_for,
)
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


@functools.partial(jax.jit, static_argnames=("options", "plan", "interpret"))
def _pre_backward(
    h_BTMD, fn_XV, base_X, scale_3, mixed_XN, norm_N, grads, *, options, plan, interpret
):
    m, d = h_BTMD.shape[-2:]
    du_BTD, dpost_BTM, dcomb_BTMM = grads
    h_MND = tiles.stream_major(h_BTMD, plan.tokens)
    cores, specs = core_grid(h_MND, plan)
    mixing = mixing_operands(mixed_XN, norm_N, dpost_BTM, dcomb_BTMM, plan.tokens)
    weights = weight_operands(fn_XV, base_X, scale_3, m, h_MND.shape[-1], h_BTMD.dtype)
    dh_MND, dfn, dlogits = pl.pallas_call(
        functools.partial(_pre_kernel, d=d, options=options, channels=plan.channels),
        grid=(cores, specs.tiles // cores),
        in_specs=[
            specs.streams,
            specs.vector,
            *(specs.small(x.shape[1]) for x in mixing),
            *map(specs.whole, weights),
        ],
        out_specs=(specs.streams, dfn_spec(specs), specs.small(specs.x)),
        out_shape=(
            jax.ShapeDtypeStruct(h_MND.shape, h_BTMD.dtype),
            dfn_shape(specs, cores),
            specs.small_shape(specs.x),
        ),
        scratch_shapes=pre_scratch(specs, options),
        compiler_params=plan.params("parallel", "arbitrary"),
        interpret=interpret,
        name="mhc_pre_backward",
    )(h_MND, tiles.rows_of(du_BTD, plan.tokens), *mixing, *weights)
    dh_BTMD = tiles.token_major(dh_MND, h_BTMD)
    return dh_BTMD, *weight_grads(dfn, dlogits, mixed_XN, d)


@functools.partial(jax.jit, static_argnames=("plan", "interpret"))
def _post_backward(y_BTD, h_BTMD, post_BTM, comb_BTMM, grad_BTMD, *, plan, interpret):
    batch, length, m, _ = h_BTMD.shape
    h_MND = tiles.stream_major(h_BTMD, plan.tokens)
    grad_MND = tiles.stream_major(grad_BTMD, plan.tokens)
    y_ND = tiles.rows_of(y_BTD, plan.tokens)
    specs = Specs(h_MND, plan)
    coefficients = pack_coefficients(post_BTM, comb_BTMM, plan.tokens)
    count = coefficients.shape[1]
    dy_ND, dh_MND, dsmall = pl.pallas_call(
        functools.partial(_post_kernel, channels=plan.channels),
        grid=(specs.tiles,),
        in_specs=[specs.streams, specs.vector, specs.streams, specs.small(count)],
        out_specs=(specs.vector, specs.streams, specs.small(count)),
        out_shape=(
            specs.vector_shape(y_BTD.dtype),
            jax.ShapeDtypeStruct(h_MND.shape, h_BTMD.dtype),
            specs.small_shape(count),
        ),
        scratch_shapes=[specs.tall()],
        compiler_params=plan.params("parallel"),
        interpret=interpret,
        name="mhc_post_backward",
    )(grad_MND, y_ND, h_MND, coefficients)
    dsmall_XN = tiles.from_lanes(dsmall, batch * length)
    small = packing.tokens_of_rows(dsmall_XN, (batch, length, m))
    return tiles.unrows(dy_ND, y_BTD), tiles.token_major(dh_MND, h_BTMD), *small


@functools.partial(jax.jit, static_argnames=("options", "plan", "interpret"))
def _post_pre_backward(
    y_BTD,
    h_BTMD,
    post_BTM,
    comb_BTMM,
    new_BTMD,
    fn_XV,
    base_X,
    scale_3,
    mixed_XN,
    norm_N,
    grads,
    *,
    options,
    plan,
    interpret,
):
    del new_BTMD  # Cheaper to compute again than to read: y and h are read in any case.
    batch, length, m, d = h_BTMD.shape
    grad_BTMD, du_BTD, dpost_BTM, dcomb_BTMM = grads
    h_MND = tiles.stream_major(h_BTMD, plan.tokens)
    cores, specs = core_grid(h_MND, plan)
    coefficients = pack_coefficients(post_BTM, comb_BTMM, plan.tokens)
    count = coefficients.shape[1]
    mixing = mixing_operands(mixed_XN, norm_N, dpost_BTM, dcomb_BTMM, plan.tokens)
    weights = weight_operands(fn_XV, base_X, scale_3, m, h_MND.shape[-1], grad_BTMD.dtype)
    dy_ND, dh_MND, dsmall, dfn, dlogits = pl.pallas_call(
        functools.partial(_post_pre_kernel, d=d, options=options, channels=plan.channels),
        grid=(cores, specs.tiles // cores),
        in_specs=[
            specs.vector,
            specs.streams,
            specs.small(count),
            specs.streams,
            specs.vector,
            *(specs.small(x.shape[1]) for x in mixing),
            *map(specs.whole, weights),
        ],
        out_specs=(
            specs.vector,
            specs.streams,
            specs.small(count),
            dfn_spec(specs),
            specs.small(specs.x),
        ),
        out_shape=(
            specs.vector_shape(y_BTD.dtype),
            jax.ShapeDtypeStruct(h_MND.shape, h_BTMD.dtype),
            specs.small_shape(count),
            dfn_shape(specs, cores),
            specs.small_shape(specs.x),
        ),
        scratch_shapes=[
            pltpu.VMEM((m, plan.tokens, specs.d), grad_BTMD.dtype),
            *pre_scratch(specs, options),
        ],
        compiler_params=plan.params("parallel", "arbitrary"),
        interpret=interpret,
        name="mhc_post_pre_backward",
    )(
        tiles.rows_of(y_BTD, plan.tokens),
        h_MND,
        coefficients,
        tiles.stream_major(grad_BTMD, plan.tokens),
        tiles.rows_of(du_BTD, plan.tokens),
        *mixing,
        *weights,
    )
    dsmall_XN = tiles.from_lanes(dsmall, batch * length)
    small = packing.tokens_of_rows(dsmall_XN, (batch, length, m))
    return (
        tiles.unrows(dy_ND, y_BTD),
        tiles.token_major(dh_MND, h_BTMD),
        *small,
        *weight_grads(dfn, dlogits, mixed_XN, d),
    )


def core_grid(h_MND, plan):
    """How many cores share the tiles (v5p has two behind one device), and the blocks for it."""
    count = h_MND.shape[1] // plan.tokens
    cores = 2 if count % 2 == 0 else 1
    return cores, Specs(h_MND, plan, lambda core, g: core * (count // cores) + g)


def dfn_spec(specs):
    return pl.BlockSpec((None, specs.m, specs.x, specs.d), lambda core, g: (core, 0, 0, 0))


def dfn_shape(specs, cores):
    return jax.ShapeDtypeStruct((cores, specs.m, specs.x, specs.d), jnp.float32)


def pre_scratch(specs, options):
    return [
        specs.tall(),
        pltpu.VMEM((specs.x, specs.tokens), jnp.float32),
        pltpu.VMEM((round_up(specs.m + 1, 8), specs.tokens), jnp.float32),
        specs.matrix(),
        specs.matrix(options[0]),
    ]


def mixing_operands(mixed_XN, norm_N, dpost_BTM, dcomb_BTMM, tokens):
    """The logits, rms factors and the weights' gradients of each tile."""
    grads = pack_coefficients(dpost_BTM, dcomb_BTMM, tokens)
    return tiles.to_lanes(mixed_XN, tokens), tiles.to_lanes(norm_N[None], tokens), grads


def weight_operands(fn_XV, base_X, scale_3, m, padded, dtype):
    """fn by stream for `_dv_operand`'s left side; base and scale as [X, 1]."""
    fn_MXD = by_stream(fn_XV, m, padded)
    if dtype == jnp.bfloat16:
        high, low = packing.float_parts(fn_MXD, 2)
        fn_MXD = jnp.concatenate([high, low, high], axis=1).astype(dtype)
    return fn_MXD, base_X[:, None], packing.row_scale(scale_3, m)[:, None]


def weight_grads(dfn, dlogits, mixed_XN, d):
    """d(fn), d(base), d(scale) from the cores' sums and the gradients of the logits."""
    m, x = dfn.shape[1:3]
    dfn_XV = dfn.sum(0)[..., :d].transpose(1, 0, 2).reshape(x, m * d)
    dlogits_XN = tiles.from_lanes(dlogits, mixed_XN.shape[1])
    return dfn_XV, *packing.logit_grads(dlogits_XN, mixed_XN, m)


def _post_pre_kernel(
    y_ref,
    h_ref,
    coefficient_ref,
    grad_ref,
    du_ref,
    mixed_ref,
    norm_ref,
    dsmall_ref,
    fn_ref,
    base_ref,
    scale_ref,
    dy_ref,
    dh_ref,
    dcoefficient_ref,
    dfn_ref,
    dlogits_ref,
    new_ref,
    *scratch,
    d,
    options,
    channels,
):
    tall_ref = scratch[0]
    to_tall(coefficient_ref[...], tall_ref)
    recombine(y_ref, h_ref, tall_ref, new_ref, channels)
    _pre_kernel(
        new_ref,
        du_ref,
        mixed_ref,
        norm_ref,
        dsmall_ref,
        fn_ref,
        base_ref,
        scale_ref,
        new_ref,
        dfn_ref,
        dlogits_ref,
        *scratch,
        d=d,
        options=options,
        channels=channels,
        grad_ref=grad_ref,
    )
    to_tall(coefficient_ref[...], tall_ref)
    recombine_backward(new_ref, y_ref, h_ref, tall_ref, dy_ref, dh_ref, channels)
    coefficient_grads(new_ref, y_ref, h_ref, tall_ref, channels)
    dcoefficient_ref[...] = from_tall(tall_ref, dcoefficient_ref.shape[0])


def _post_kernel(
    grad_ref, y_ref, h_ref, coefficient_ref, dy_ref, dh_ref, dsmall_ref, tall_ref, *, channels
):
    to_tall(coefficient_ref[...], tall_ref)
    recombine_backward(grad_ref, y_ref, h_ref, tall_ref, dy_ref, dh_ref, channels)
    coefficient_grads(grad_ref, y_ref, h_ref, tall_ref, channels)
    dsmall_ref[...] = from_tall(tall_ref, dsmall_ref.shape[0])


def recombine_backward(grad_ref, y_ref, h_ref, tall_ref, dy_ref, dh_ref, channels):
    """dy = sum_j post[j] * g[j] and dh[i] = sum_j comb[i, j] * g[j]."""
    m, tokens, d = h_ref.shape

    def group(rows):
        coefficient = columns(tall_ref, rows, range(m + m * m))

        def tile(cols, _):
            g = [load(grad_ref, j, rows, cols) for j in range(m)]
            dy = sum(coefficient[j] * g[j] for j in range(m))
            dy_ref[rows, cols] = dy.astype(dy_ref.dtype)
            for i in range(m):
                dh = sum(coefficient[m + i * m + j] * g[j] for j in range(m))
                dh_ref[i, rows, cols] = dh.astype(dh_ref.dtype)

        for_channels(d, channels, tile)

    for_rows(tokens, group)


def coefficient_grads(grad_ref, y_ref, h_ref, tall_ref, channels):
    """Columns of tall: d(post)[j] = <g[j], y>, then d(comb)[i, j] = <g[j], h[i]>, row major."""
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
    mixed_ref,
    norm_ref,
    dsmall_ref,
    fn_ref,
    base_ref,
    scale_ref,
    dh_ref,
    dfn_ref,
    dlogits_ref,
    tall_ref,
    dweights_ref,
    wide_ref,
    matrix_ref,
    iterate_ref,
    *,
    d,
    options,
    channels,
    grad_ref=None,
):
    """dh, d(logits) and this tile's d(fn); `grad_ref` is added to dh, which may be h's own ref."""
    m = h_ref.shape[0]
    inner_products(h_ref, du_ref, tall_ref, channels)
    dweights_ref[:m] = from_tall(tall_ref, m)
    dweights_ref[m:] = dsmall_ref[...]
    logits = mixed_ref[...] * scale_ref[...] + base_ref[...]
    scratch = (matrix_ref, iterate_ref)
    write_dlogits(logits, dweights_ref, dlogits_ref, wide_ref, scratch, *options)
    dmixed = dlogits_ref[...] * scale_ref[...]
    along = jnp.sum(dmixed * mixed_ref[...], axis=0, keepdims=True)
    wide_ref[m : m + 1] = norm_ref[...] * norm_ref[...] * along / (m * d)
    to_tall(wide_ref[...], tall_ref)
    draw_XT = dmixed * norm_ref[...]

    @pl.when(pl.program_id(1) == 0)
    def _():
        dfn_ref[...] = jnp.zeros_like(dfn_ref)

    stream_grads(h_ref, du_ref, draw_XT, fn_ref, tall_ref, dh_ref, dfn_ref, channels, grad_ref)


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
pre_backward = bind.backward(_pre_backward, 0, plan_for(pre_footprint))
post_backward = bind.backward(_post_backward, 1, plan_for(post_footprint), ())
post_pre_backward = bind.backward(_post_pre_backward, 1, plan_for(post_pre_footprint))
