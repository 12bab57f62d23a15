"""mHC on a GPU, forward, in Pallas Triton.

The logits need all channels of a token before the first channel of u can be written, and a tile of
tokens wide enough to pay for reading fn does not fit a multiprocessor. So `pre` is three kernels:
partial logits (tensor cores), the small numbers (one token per thread), and the collapse, which
walks the tokens backwards, so that the streams read last are still in the L2 cache.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from v4jax.kernels.hyper_connections import bind, packing
from v4jax.kernels.hyper_connections.arguments import Mixed, Packed, Saved, Sublayer, Weights
from v4jax.kernels.hyper_connections.gpu import tiles
from v4jax.kernels.hyper_connections.gpu.mixing import Partial, mixing_kernel

MOST_FUSED = 4  # streams whose tiles a program can hold together with a tile of the product
STATIC = ("options", "dtype", "plan", "interpret")


@functools.partial(jax.jit, static_argnames=STATIC)
def _pre(h_BTMD, weights: Weights, *, options, dtype, plan, interpret):
    h_NMD = tiles.streams(h_BTMD, plan)
    parts = fn_parts(weights.fn, h_BTMD.shape[2], plan.d, h_BTMD.dtype)
    partial = project(h_NMD, parts, plan, interpret)
    return finish(h_NMD, h_BTMD.shape, partial, weights, options, dtype, plan, interpret)


@functools.partial(jax.jit, static_argnames=STATIC)
def _post_pre(sublayer: Sublayer, weights: Weights, *, options, dtype, plan, interpret):
    packed = tiles.pack(sublayer, plan)
    m = sublayer.h.shape[2]
    parts = fn_parts(weights.fn, m, plan.d, dtype)
    if m <= MOST_FUSED:
        new_NMD, partial = recombine_project(packed, parts, dtype, plan, interpret)
    else:
        new_NMD = recombine(packed, dtype, plan, interpret)
        partial = project(new_NMD, parts, plan, interpret)
    new_BTMD = tiles.unstreams(new_NMD, sublayer.h)
    shape = sublayer.h.shape
    rest, saved = finish(new_NMD, shape, partial, weights, options, dtype, plan, interpret)
    return (new_BTMD, *rest), saved


def finish(h_NMD, shape, partial: Partial, weights, options, dtype, plan, interpret):
    """(u, `Mixing`) and `Saved` from the partial sums of the logits."""
    batch, length, m, d = shape
    mixed = mix(partial, weights, d, options, plan, interpret)
    u_ND = collapse(h_NMD, mixed.weights, dtype, plan, interpret)
    count = batch * length
    u_BTD = u_ND[:count, :d].reshape(batch, length, d)
    mixing = packing.tokens_of_rows(mixed.weights[m:, :count], (batch, length, m))
    return (u_BTD, mixing), Saved(mixed.mixed[:, :count], mixed.norm[0, :count])


def fn_parts(fn_XV, m, padded, dtype):
    """fn as [parts, X', M*D]: padded, and for bfloat16 streams two bfloat16 parts.

    Two parts carry 17 bits of a weight; a logit, a sum over M*D random channels, comes out with a
    relative error of about 2e-6, and the streams themselves have 8 bits.
    """
    x = fn_XV.shape[0]
    fn = fn_XV.reshape(x, m, -1)
    fn = jnp.pad(fn, ((0, _rows(x) - x), (0, 0), (0, padded - fn.shape[-1])))
    fn = fn.reshape(_rows(x), m * padded)
    parts = packing.float_parts(fn, 2) if dtype == jnp.bfloat16 else [fn]
    return jnp.stack(parts).astype(dtype)


def _rows(x):
    return max(tiles.power_of_two(x), tiles.FEWEST)


def project(h_NMD, parts_PXV, plan, interpret):
    """`Partial` sums over channels: fn @ v [S, X', N] and v @ v [S, N]."""
    n, m, d = h_NMD.shape
    count, x, v = parts_PXV.shape
    split = tiles.splits(n // plan.tokens, v // plan.channels)
    [out] = pl.pallas_call(
        functools.partial(_project_kernel, steps=v // plan.channels // split, plan=plan),
        grid=(n // plan.tokens, split),
        in_specs=[pl.BlockSpec((plan.tokens, v), lambda t, s: (t, 0)), tiles.whole(parts_PXV)],
        out_specs=(_partial_specs(x, plan),),
        out_shape=(_partial_shapes(split, x, n),),
        compiler_params=plan.params(),
        interpret=interpret,
        name="mhc_project",
    )(h_NMD.reshape(n, v), parts_PXV)
    return out


def _partial_specs(x, plan):
    return Partial(
        raw=pl.BlockSpec((None, x, plan.tokens), lambda t, s: (s, 0, t)),
        square=pl.BlockSpec((None, plan.tokens), lambda t, s: (s, t)),
    )


def _partial_shapes(split, x, n):
    shapes = (split, x, n), (split, n)
    return Partial(*(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes))


def _project_kernel(h_ref, fn_ref, out: Partial, *, steps, plan):
    first = pl.program_id(1) * steps
    channels = plan.channels

    def step(k, carry):
        cols = pl.ds((first + k) * channels, channels)
        return accumulate(
            carry, h_ref[:, cols], [fn_ref[p, :, cols] for p in range(fn_ref.shape[0])]
        )

    raw, square = jax.lax.fori_loop(0, steps, step, accumulators(plan, fn_ref.shape[1]))
    out.raw[...] = raw.T
    out.square[...] = jnp.sum(square, axis=1)


def accumulators(plan, x):
    """Zeros: the logits of a tile of tokens and its squares, not yet added up over channels."""
    return (
        jnp.zeros((plan.tokens, x), jnp.float32),
        jnp.zeros((plan.tokens, plan.channels), jnp.float32),
    )


def accumulate(carry, h_TC, parts):
    raw, square = carry
    for part in parts:
        raw = raw + plt.dot(h_TC, part, trans_b=True, allow_tf32=exact(h_TC))
    h_TC = h_TC.astype(jnp.float32)
    return raw, square + h_TC * h_TC


def exact(x):
    """allow_tf32 of a product: None for bfloat16, which is exact anyway; False for float32."""
    return False if x.dtype == jnp.float32 else None


def recombine_project(packed: Packed, parts_PXV, dtype, plan, interpret):
    """The streams after `post`, and the partial sums of `project` for them."""
    n, m, d = packed.h.shape
    plan = dataclasses.replace(plan, channels=min(plan.channels, max(128 // m, tiles.FEWEST)))
    count, x, _ = parts_PXV.shape
    split = tiles.splits(n // plan.tokens, d // plan.channels)
    steps = d // plan.channels // split
    parts = parts_PXV.reshape(count, x, m, d)
    streams = pl.BlockSpec((plan.tokens, m, d), lambda t, s: (t, 0, 0))
    small = pl.BlockSpec((packed.coefficients.shape[0], plan.tokens), lambda t, s: (0, t))
    vector = pl.BlockSpec((plan.tokens, d), lambda t, s: (t, 0))
    return pl.pallas_call(
        functools.partial(_recombine_project_kernel, steps=steps, plan=plan),
        grid=(n // plan.tokens, split),
        in_specs=[Packed(vector, streams, small), tiles.whole(parts)],
        out_specs=(streams, _partial_specs(x, plan)),
        out_shape=(
            jax.ShapeDtypeStruct(packed.h.shape, dtype),
            _partial_shapes(split, x, n),
        ),
        compiler_params=plan.params(2),
        interpret=interpret,
        name="mhc_post_project",
    )(packed, parts)


def _recombine_project_kernel(packed, fn_ref, new_ref, out: Partial, *, steps, plan):
    m, channels = packed.h.shape[1], plan.channels
    first = pl.program_id(1) * steps

    def step(k, carry):
        cols = pl.ds((first + k) * channels, channels)
        y = packed.y[:, cols].astype(jnp.float32)
        h = [packed.h[:, i, cols].astype(jnp.float32) for i in range(m)]
        for j in range(m):
            new = recombined(packed.coefficients, y, h, j).astype(new_ref.dtype)
            new_ref[:, j, cols] = new
            carry = accumulate(carry, new, [fn_ref[p, :, j, cols] for p in range(fn_ref.shape[0])])
        return carry

    raw, square = jax.lax.fori_loop(0, steps, step, accumulators(plan, fn_ref.shape[1]))
    out.raw[...] = raw.T
    out.square[...] = jnp.sum(square, axis=1)


def recombined(coefficient_ref, y_TC, h, j):
    """post[j] * y + sum_i comb[i, j] * h[i]; rows of the coefficients: post, comb row major."""
    m = len(h)
    new = coefficient_ref[j, :][:, None] * y_TC
    for i in range(m):
        new = new + coefficient_ref[m + i * m + j, :][:, None] * h[i]
    return new


def mix(partial: Partial, weights: Weights, d, options, plan, interpret) -> Mixed:
    """The logits [X, N], the rms factors [1, N] and the weights [X, N] of the partial sums."""
    x = weights.base.shape[0]
    m = packing.stream_count(x)
    vector = plan.vector(m)

    def rows(count):
        return pl.BlockSpec((count, vector), lambda t: (0, t))

    def shape(count):
        return jax.ShapeDtypeStruct((count, plan.n), jnp.float32)

    raw = pl.BlockSpec((*partial.raw.shape[:2], vector), lambda t: (0, 0, t))
    base = tiles.whole(weights.base)
    [mixed] = pl.pallas_call(
        functools.partial(mixing_kernel, m=m, d=d, options=options),
        grid=(plan.n // vector,),
        in_specs=[Partial(raw, rows(partial.square.shape[0])), base, base],
        out_specs=(Mixed(rows(x), rows(1), rows(x)),),
        out_shape=(Mixed(shape(x), shape(1), shape(x)),),
        compiler_params=plan.vector_params(m),
        interpret=interpret,
        name="mhc_mix",
    )(partial, weights.base, packing.row_scale(weights.scale, m))
    return mixed


def collapse(h_NMD, weights_XN, dtype, plan, interpret):
    """u = sum_i weights[i] * h[i], the last tokens first."""
    n, m, d = h_NMD.shape
    tokens, channels = plan.elementwise()
    last = n // tokens - 1
    return pl.pallas_call(
        _collapse_kernel,
        grid=(n // tokens, d // channels),
        in_specs=[
            pl.BlockSpec((tokens, m, channels), lambda t, c: (last - t, 0, c)),
            pl.BlockSpec((weights_XN.shape[0], tokens), lambda t, c: (0, last - t)),
        ],
        out_specs=pl.BlockSpec((tokens, channels), lambda t, c: (last - t, c)),
        out_shape=jax.ShapeDtypeStruct((n, d), dtype),
        compiler_params=plt.CompilerParams(num_warps=4, num_stages=1),
        interpret=interpret,
        name="mhc_collapse",
    )(h_NMD, weights_XN)


def _collapse_kernel(h_ref, weight_ref, u_ref):
    m = h_ref.shape[1]
    u = sum(weight_ref[i, :][:, None] * h_ref[:, i, :].astype(jnp.float32) for i in range(m))
    u_ref[...] = u.astype(u_ref.dtype)


@functools.partial(jax.jit, static_argnames=STATIC[1:])
def _post(sublayer: Sublayer, *, dtype, plan, interpret):
    new_NMD = recombine(tiles.pack(sublayer, plan), dtype, plan, interpret)
    return tiles.unstreams(new_NMD, sublayer.h)


def recombine(packed: Packed, dtype, plan, interpret):
    """The streams after `post`."""
    n, m, d = packed.h.shape
    tokens, channels = plan.elementwise(2048 if m <= 4 else 1024)
    streams = pl.BlockSpec((tokens, m, channels), lambda t, c: (t, 0, c))
    return pl.pallas_call(
        _post_kernel,
        grid=(n // tokens, d // channels),
        in_specs=[
            Packed(
                y=pl.BlockSpec((tokens, channels), lambda t, c: (t, c)),
                h=streams,
                coefficients=pl.BlockSpec(
                    (packed.coefficients.shape[0], tokens), lambda t, c: (0, t)
                ),
            )
        ],
        out_specs=streams,
        out_shape=jax.ShapeDtypeStruct(packed.h.shape, dtype),
        compiler_params=plt.CompilerParams(num_warps=4, num_stages=1),
        interpret=interpret,
        name="mhc_post",
    )(packed)


def _post_kernel(packed, out_ref):
    m = packed.h.shape[1]
    y = packed.y[...].astype(jnp.float32)
    h = [packed.h[:, i, :].astype(jnp.float32) for i in range(m)]
    for j in range(m):
        out_ref[:, j, :] = recombined(packed.coefficients, y, h, j).astype(out_ref.dtype)


def _plan(h_BTMD, dtype):
    return tiles.plan(h_BTMD)


# See api's functions of these names. `pre` and `post_pre` also give what the gradients keep.
pre = bind.forward(_pre, _plan)
post = bind.forward(_post, _plan, ())
post_pre = bind.forward(_post_pre, _plan)
