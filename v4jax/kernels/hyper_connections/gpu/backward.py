"""mHC on a GPU, backward, in Pallas Triton.

`pre`: inner products <du, h[i]> (a pass over the streams), the small numbers (one token per
thread), then dh and d(fn) in one pass: a program keeps its channels of fn and d(fn) and walks over
tokens.

`post`: one pass; d(comb), M x M products of rows of a token, as 16 x 16 products of the rows of a
few tokens at once, of which the blocks on the diagonal count.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from v4jax.kernels.hyper_connections import bind, packing
from v4jax.kernels.hyper_connections.arguments import Saved, Sublayer, Weights
from v4jax.kernels.hyper_connections.gpu import tiles
from v4jax.kernels.hyper_connections.gpu.forward import exact, fn_parts
from v4jax.kernels.hyper_connections.gpu.mixing import RowGrads, mixing_backward_kernel

WARP = 32  # tokens: the buffer of Sinkhorn iterates needs a thread to each


class Operands(NamedTuple):
    """What `stream_grads` reads.

    Attributes:
      h, du: streams and gradients of u.
      coefficient: rows pre and what the rms factor leaves, [M + 1, N].
      draw, fn: d(fn @ v) and fn, in parts.
      grad: added to dh, or None.
    """

    h: Any
    du: Any
    coefficient: Any
    draw: Any
    fn: Any
    grad: Any = None


def post_pre_backward(
    sublayer: Sublayer, new_BTMD, weights: Weights, saved: Saved, grads, *, interpret, **options
):
    """Gradients of the sub-layer and the weights from those of (h', u, mixing')."""
    grad_BTMD, *grads = grads
    given = (new_BTMD, weights, saved, tuple(grads))
    dnew_BTMD, dweights = pre_backward(*given, grad_BTMD, interpret=interpret, **options)
    return post_backward(sublayer, dnew_BTMD, interpret=interpret), dweights


@functools.partial(jax.jit, static_argnames=("options", "plan", "interpret"))
def _pre_backward(
    h_BTMD, weights: Weights, saved: Saved, grads, grad_BTMD=None, *, options, plan, interpret
):
    """Gradients of h and the weights from those of (u, mixing); `grad_BTMD` is added to dh."""
    m, d = h_BTMD.shape[2:]
    x = weights.base.shape[0]
    du_BTD, dmixing = grads
    h_NMD, du_ND = tiles.streams(h_BTMD, plan), tiles.rows(du_BTD, plan)
    dsmall_XN = tiles.small(packing.rows_of_tokens(dmixing), plan)
    dpre_MN = inner_products(h_NMD, du_ND, plan, interpret)
    padded = Saved(tiles.small(saved.mixed, plan), tiles.small(saved.norm[None], plan))
    dweights_XN = jnp.concatenate([dpre_MN, dsmall_XN])
    rows = mix_backward(padded, dweights_XN, weights, d, options, plan, interpret)
    grad_NMD = None if grad_BTMD is None else tiles.streams(grad_BTMD, plan)
    parts = fn_parts(weights.fn, m, plan.d, h_BTMD.dtype)
    dh_NMD, dfn = stream_grads(h_NMD, du_ND, rows.coefficient, parts, grad_NMD, plan, interpret)
    dfn_XV = dfn.sum(0)[:x].reshape(x, m, -1)[..., :d].reshape(x, m * d)
    dlogits = packing.logit_grads(rows.dlogits, padded.mixed, m)
    return tiles.unstreams(dh_NMD, h_BTMD), Weights(dfn_XV, *dlogits)


def inner_products(h_NMD, du_ND, plan, interpret):
    """<du, h[i]> of every token: [M, N]."""
    n, m, d = h_NMD.shape
    channels = min(d & -d, 512 if m <= 4 else 256)
    tokens = 4
    return pl.pallas_call(
        functools.partial(_inner_kernel, channels=channels),
        grid=(n // tokens,),
        in_specs=[
            pl.BlockSpec((tokens, m, d), lambda t: (t, 0, 0)),
            pl.BlockSpec((tokens, d), lambda t: (t, 0)),
        ],
        out_specs=pl.BlockSpec((m, tokens), lambda t: (0, t)),
        out_shape=jax.ShapeDtypeStruct((m, n), jnp.float32),
        compiler_params=plt.CompilerParams(num_warps=4, num_stages=2),
        interpret=interpret,
        name="mhc_inner_products",
    )(h_NMD, du_ND)


def _inner_kernel(h_ref, du_ref, out_ref, *, channels):
    tokens, m, d = h_ref.shape

    def step(k, totals):
        cols = pl.ds(k * channels, channels)
        du = du_ref[:, cols].astype(jnp.float32)
        return tuple(
            total + du * h_ref[:, i, cols].astype(jnp.float32) for i, total in enumerate(totals)
        )

    zero = jnp.zeros((tokens, channels), jnp.float32)
    totals = jax.lax.fori_loop(0, d // channels, step, (zero,) * m)
    for i, total in enumerate(totals):
        out_ref[i, :] = jnp.sum(total, axis=1)


def mix_backward(saved: Saved, dweights, weights: Weights, d, options, plan, interpret) -> RowGrads:
    """d(logits) [X, N] and the rows [M + 1 + X, N] that `stream_grads` takes."""
    x, n = saved.mixed.shape
    m = packing.stream_count(x)
    vector = plan.vector(m)

    def rows(count):
        return pl.BlockSpec((count, vector), lambda t: (0, t))

    def shape(*sizes):
        return jax.ShapeDtypeStruct(sizes, jnp.float32)

    iterate = (options[0], m, m)
    base = tiles.whole(weights.base)
    [out] = pl.pallas_call(
        functools.partial(mixing_backward_kernel, m=m, d=d, options=options),
        grid=(n // vector,),
        in_specs=[Saved(rows(x), rows(1)), rows(x), base, base],
        out_specs=(
            RowGrads(
                dlogits=rows(x),
                coefficient=rows(m + 1 + x),
                iterate=pl.BlockSpec((*iterate, vector), lambda t: (0, 0, 0, t)),
            ),
        ),
        out_shape=(RowGrads(shape(x, n), shape(m + 1 + x, n), shape(*iterate, n)),),
        compiler_params=plan.vector_params(m),
        interpret=interpret,
        name="mhc_mix_backward",
    )(saved, dweights, weights.base, packing.row_scale(weights.scale, m))
    return out


def stream_grads(h_NMD, du_ND, coefficient_XN, parts_PXV, grad_NMD, plan, interpret):
    """dh and, for each split of the tokens, d(fn) [S, X', M*D]."""
    n, m, d = h_NMD.shape
    count, x, _ = parts_PXV.shape
    # As many streams per program as d(fn)'s rows leave registers for: du is then read once.
    group = m if x * m <= 128 else 1
    tokens, channels = plan.tokens, plan.channels
    tiles_of_channels = d // channels * (m // group)
    split = tiles.splits(tiles_of_channels, n // tokens * 4)
    while n // tokens % split:
        split //= 2
    per_split = n // tokens // split
    rows = per_split * tokens
    draw = _draw_parts(coefficient_XN[m + 1 :], x, h_NMD.dtype)
    streams = pl.BlockSpec((rows, group, channels), lambda c, g, s: (s, g, c))
    fn = parts_PXV.reshape(count, x, m, d)
    operands = Operands(h_NMD, du_ND, coefficient_XN[: m + 1], draw, fn, grad_NMD)
    specs = Operands(
        h=streams,
        du=pl.BlockSpec((rows, channels), lambda c, g, s: (s, c)),
        coefficient=pl.BlockSpec((m + 1, rows), lambda c, g, s: (0, s)),
        draw=pl.BlockSpec((count, rows, x), lambda c, g, s: (0, s, 0)),
        fn=pl.BlockSpec((count, x, group, channels), lambda c, g, s: (0, 0, g, c)),
        grad=None if grad_NMD is None else streams,
    )
    dh_NMD, dfn = pl.pallas_call(
        functools.partial(_stream_grads_kernel, steps=per_split, plan=plan),
        grid=(d // channels, m // group, split),
        in_specs=[specs],
        out_specs=(
            streams,
            pl.BlockSpec((None, x, group, channels), lambda c, g, s: (s, 0, g, c)),
        ),
        out_shape=(
            jax.ShapeDtypeStruct(h_NMD.shape, h_NMD.dtype),
            jax.ShapeDtypeStruct((split, x, m, d), jnp.float32),
        ),
        compiler_params=plan.params(2),
        interpret=interpret,
        name="mhc_stream_grads",
    )(operands)
    return dh_NMD, dfn.reshape(split, x, m * d)


def _draw_parts(draw_XN, x, dtype):
    """draw as [parts, N, X'], in bfloat16 parts where the streams are bfloat16."""
    draw_NX = jnp.pad(draw_XN, ((0, x - draw_XN.shape[0]), (0, 0))).T
    parts = packing.float_parts(draw_NX, 2) if dtype == jnp.bfloat16 else [draw_NX]
    return jnp.stack(parts).astype(dtype)


def _stream_grads_kernel(operands, dh_ref, dfn_ref, *, steps, plan):
    h_ref, du_ref, coefficient_ref, draw_ref, fn_ref, grad_ref = operands
    group, tokens = h_ref.shape[1], plan.tokens
    first = pl.program_id(1) * group
    count, x = fn_ref.shape[:2]
    m = coefficient_ref.shape[0] - 1
    # High times high, high times low, low times high.
    pairs = [(p, q) for p in range(count) for q in range(count) if p + q < count]

    def step(k, dfn):
        rows = pl.ds(k * tokens, tokens)
        du = du_ref[rows, :].astype(jnp.float32)
        shrink = coefficient_ref[m, rows]
        draw = [draw_ref[p, rows, :] for p in range(count)]
        out = []
        for i in range(group):
            h = h_ref[rows, i, :]
            out.append(
                sum((plt.dot(d, h, trans_a=True, allow_tf32=exact(h)) for d in draw), dfn[i])
            )
            dh = coefficient_ref[first + i, rows][:, None] * du
            dh = dh - shrink[:, None] * h.astype(jnp.float32)
            for p, q in pairs:
                dh = dh + plt.dot(draw[p], fn_ref[q, :, i, :], allow_tf32=exact(h))
            if grad_ref is not None:
                dh = dh + grad_ref[rows, i, :].astype(jnp.float32)
            dh_ref[rows, i, :] = dh.astype(dh_ref.dtype)
        return tuple(out)

    zero = jnp.zeros((x, plan.channels), jnp.float32)
    dfn = jax.lax.fori_loop(0, steps, step, (zero,) * group)
    for i in range(group):
        dfn_ref[:, i, :] = dfn[i]


class Stacked(NamedTuple):
    """Gradients of the new streams and the streams, a row a stream of a token: [N * M, D]."""

    grad: Any
    h: Any


class PostGrads(NamedTuple):
    """Gradients of y, h and post; and products of rows, of which d(comb) is a part."""

    dy: Any
    dh: Any
    dpost: Any
    products: Any


@functools.partial(jax.jit, static_argnames=("plan", "interpret"))
def _post_backward(sublayer: Sublayer, grad_BTMD, *, plan, interpret):
    batch, length, m, _ = sublayer.h.shape
    packed, grad_NMD = tiles.pack(sublayer, plan), tiles.streams(grad_BTMD, plan)
    n, _, d = packed.h.shape
    tokens = tiles.FEWEST // m
    channels = min(d & -d, 256)
    streams = pl.BlockSpec((tokens, m, d), lambda t: (t, 0, 0))
    stacked = pl.BlockSpec((tokens * m, d), lambda t: (t, 0))
    vector = pl.BlockSpec((tokens, d), lambda t: (t, 0))
    [out] = pl.pallas_call(
        functools.partial(_post_kernel, channels=channels),
        grid=(n // tokens,),
        in_specs=[
            streams,
            Stacked(stacked, stacked),
            vector,
            pl.BlockSpec((m + m * m, tokens), lambda t: (0, t)),
        ],
        out_specs=(
            PostGrads(
                dy=vector,
                dh=streams,
                dpost=pl.BlockSpec((m, tokens), lambda t: (0, t)),
                products=pl.BlockSpec((tokens * m, tiles.FEWEST), lambda t: (t, 0)),
            ),
        ),
        out_shape=(
            PostGrads(
                dy=jax.ShapeDtypeStruct((n, d), sublayer.y.dtype),
                dh=jax.ShapeDtypeStruct(packed.h.shape, sublayer.h.dtype),
                dpost=jax.ShapeDtypeStruct((m, n), jnp.float32),
                products=jax.ShapeDtypeStruct((n * m, tiles.FEWEST), jnp.float32),
            ),
        ),
        compiler_params=plt.CompilerParams(num_warps=4, num_stages=2),
        interpret=interpret,
        name="mhc_post_backward",
    )(
        grad_NMD,
        Stacked(grad_NMD.reshape(n * m, d), packed.h.reshape(n * m, d)),
        packed.y,
        packed.coefficients,
    )
    count = batch * length
    dpost_BTM = out.dpost[:, :count].T.reshape(batch, length, m)
    dcomb_BTMM = _diagonal_blocks(out.products, m)[:count].reshape(batch, length, m, m)
    dy_BTD, dh_BTMD = packing.unrows(out.dy, sublayer.y), tiles.unstreams(out.dh, sublayer.h)
    return Sublayer(dy_BTD, dh_BTMD, dpost_BTM, dcomb_BTMM)


def _diagonal_blocks(products, m):
    """[N, M, M]: of every 16 x 16 product of rows the blocks of a token with itself."""
    tokens = tiles.FEWEST // m
    blocks = products.reshape(-1, tokens, m, tokens, m)
    # Term by term, so that no gather is needed.
    return jnp.stack([blocks[:, t, :, t] for t in range(tokens)], axis=1).reshape(-1, m, m)


def _post_kernel(grad_ref, rows: Stacked, y_ref, coefficient_ref, out: PostGrads, *, channels):
    tokens, m, d = grad_ref.shape

    def step(k, carry):
        products, along = carry
        cols = pl.ds(k * channels, channels)
        h = rows.h[:, cols]
        g = rows.grad[:, cols]
        if h.dtype != g.dtype:
            h, g = h.astype(jnp.float32), g.astype(jnp.float32)
        products = products + plt.dot(h, g, trans_b=True, allow_tf32=exact(h))
        y = y_ref[:, cols].astype(jnp.float32)
        g = [grad_ref[:, j, cols].astype(jnp.float32) for j in range(m)]
        out.dy[:, cols] = _weighted(coefficient_ref, range(m), g).astype(out.dy.dtype)
        for i in range(m):
            comb = range(m + i * m, m + (i + 1) * m)
            out.dh[:, i, cols] = _weighted(coefficient_ref, comb, g).astype(out.dh.dtype)
        return products, tuple(a + x * y for a, x in zip(along, g, strict=True))

    zeros = (jnp.zeros((tokens, channels), jnp.float32),) * m
    products = jnp.zeros((tiles.FEWEST, tiles.FEWEST), jnp.float32)
    products, along = jax.lax.fori_loop(0, d // channels, step, (products, zeros))
    out.products[...] = products
    for j in range(m):
        out.dpost[j, :] = jnp.sum(along[j], axis=1)


def _weighted(coefficient_ref, rows, g):
    """sum_j coefficient[rows[j]] * g[j]."""
    return sum(coefficient_ref[r, :][:, None] * x for r, x in zip(rows, g, strict=True))


# Gradients of the arguments of api's functions from those of their results.
pre_backward = bind.backward(_pre_backward, lambda h_BTMD, dtype: tiles.plan(h_BTMD, WARP))
post_backward = bind.backward(_post_backward, lambda h_BTMD, dtype: tiles.plan(h_BTMD), numbers=())
