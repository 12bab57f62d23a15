"""Grouped experts on a TPU: a grid over (columns of the result, work items).

A tile of an expert's weights holds the whole contracted axis, so it stays in VMEM while the items
of its group pass by: every weight of a busy expert is read from HBM exactly once, an idle expert's
never. Rows are read once for each tile of columns. A tile of rows that several groups share is
visited by one after the other, and each stores its own rows; the visits follow one another, so the
tile leaves VMEM once.

Stored weights are expanded in VMEM, a chunk of the contracted axis at a time. FP4 packs even and
odd columns in one byte; instead of interleaving lanes, the other operand or the result is split
into even and odd columns outside.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from v4jax.kernels.grouped_matmul import bind, formats, swiglu, work_items
from v4jax.kernels.grouped_matmul.operands import Extras, Operands, Product, UpGradient
from v4jax.kernels.grouped_matmul.tpu import weights as expand
from v4jax.kernels.grouped_matmul.tpu.tiles import plan

LANES = 128


def refuse(x_XD, gate_X, group_sizes_E, weights, rounding) -> str | None:
    """Why these kernels cannot take the arguments."""
    reason = formats.refuse(weights)
    if reason is not None:
        return reason
    sizes = plan(x_XD, weights, rounding)
    if sizes.bytes > sizes.memory:
        return (
            f"a tile of {sizes.rows} rows and {sizes.columns} columns of x {x_XD.shape} and w1 "
            f"{weights[0].shape} needs {sizes.bytes} bytes of VMEM and there are {sizes.memory}"
        )
    return None


class _Kernels(bind.Kernels):
    """The grouped matmuls that `passes` calls."""

    def up(self, x, gate, w1, w3):
        store = functools.partial(_store_up, limit=self.limit, dtype=self.dtype)
        x, extras = formats.split(x, formats.parts(w1)), Extras(gate=_column(gate))
        out = Product(Out(self.dtype))
        return self._call("up", store, [x], [w1, w3], extras, out, True).out[0]

    def down(self, z, w2):
        z = formats.split(z, formats.parts(w2))
        out = Product(Out(self.dtype))
        return self._call("down", _store, [z], [w2], Extras(), out, True).out[0]

    def dz(self, dy, w2):
        out = Product(Out(self.dtype, formats.parts(w2)))
        return formats.join(self._call("dz", _store, [dy[None]], [w2], Extras(), out, False).out)

    def up_gradient(self, x, gate, dz, w1, w3, want_z):
        store = functools.partial(_store_up_gradient, limit=self.limit, dtype=self.dtype)
        x, extras = formats.split(x, formats.parts(w1)), Extras(_column(gate), dz[None])
        own = Out(self.dtype)
        outs = UpGradient(own, own, Out("lanes"), own if want_z else None)
        found = self._call("up_gradient", store, [x], [w1, w3], extras, outs, True)
        z = found.z[0] if want_z else None
        return found.da[0], found.db[0], found.dgate.sum((0, 2)), z

    def dx(self, da, db, w1, w3, dtype):
        out = Product(Out(jnp.dtype(dtype).name, formats.parts(w1)))
        both = [da[None], db[None]]
        return formats.join(self._call("dx", _store_sum, both, [w1, w3], Extras(), out, False).out)

    def weight_gradients(self, lhs, rhs, dtype):
        return _weight_gradients(self.group_sizes_E, self.sizes, self.interpret, lhs, rhs, dtype)

    def _call(self, name, store, lhs, *args):
        work = work_items.tiles(self.group_sizes_E, lhs[0].shape[1], self.sizes.rows)
        return _grouped(work, self.sizes, self.interpret, name, store, lhs, *args)


@dataclasses.dataclass(frozen=True)
class Out:
    """A result [parts, X, columns / parts], or with "lanes" float32 sums [column tiles, X, 128]."""

    dtype: str
    parts: int = 1


def _column(gate_X):
    return gate_X[None, :, None]


def _grouped(work, sizes, interpret, name, store, lhs, weights, extras, outs, transposed):
    """Results of rows times their group's weights, through `store`.

    Args:
      store: (sums, mask, extras, outs) of one tile, references but for mask.
      lhs: [parts, X, contracted / parts], one for all weights or one each.
      extras: gate [1, X, 1] and dz [1, X, columns].
      outs: `Product` or `UpGradient` of an `Out` for each result.
      transposed: contract the weights' last axis, or else their first.
    """
    rows = lhs[0].shape[1]
    total, contracted = _result_and_contracted(weights[0], transposed)
    split = 1 if transposed else formats.parts(weights[0])
    columns = sizes.columns_of(total, split)
    grid = (pl.cdiv(total, columns), work.group_I.shape[0])
    lanes = LANES if columns % LANES == 0 else columns

    def shape(out):
        if out.dtype == "lanes":
            return jax.ShapeDtypeStruct((grid[0], rows, lanes), jnp.float32)
        return jax.ShapeDtypeStruct((out.parts, rows, total // out.parts), out.dtype)

    def out_spec(out):
        if out.dtype == "lanes":
            block = (1, sizes.rows, lanes)
            return pl.BlockSpec(block, lambda j, i, work: (j, work.tile_I[i], 0))
        block = (out.parts, sizes.rows, columns // out.parts)
        return pl.BlockSpec(block, lambda j, i, work: (0, work.tile_I[i], j))

    kinds = [formats.kind(weight) for weight in weights]
    operands = Operands(lhs, [expand.arrays(weight) for weight in weights], extras)
    specs = Operands(
        [_rows_spec(x, sizes, columns, whole=True) for x in lhs],
        [
            expand.specs(weight, kind, transposed, columns)
            for weight, kind in zip(operands.weights, kinds, strict=True)
        ],
        jax.tree.map(lambda x: _rows_spec(x, sizes, columns, whole=False), extras),
    )
    shapes = jax.tree.map(shape, outs)
    accumulator = pltpu.VMEM((split, sizes.rows, columns // split), jnp.float32)
    kernel = functools.partial(
        _kernel,
        store=store,
        kinds=kinds,
        transposed=transposed,
        rows=sizes.rows,
        depth=sizes.depth_of(contracted),
        contracted=contracted,
    )
    [out] = pl.pallas_call(
        kernel,
        out_shape=(shapes,),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=grid,
            in_specs=[specs],
            out_specs=(jax.tree.map(out_spec, outs),),
            scratch_shapes=[[accumulator] * len(weights)],
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=sizes.memory
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * len(weights) * rows * total * contracted,
            transcendentals=0,
            bytes_accessed=grid[0] * _bytes(lhs) + _bytes(operands.weights) + _bytes(shapes),
        ),
        name=f"expert_{name}",
        interpret=interpret,
    )(work, operands)
    return out


def _bytes(arrays):
    """Of arrays read or written once, if every group is busy."""
    return sum(a.size * jnp.dtype(a.dtype).itemsize for a in jax.tree.leaves(arrays))


def _rows_spec(x, sizes, columns, whole):
    """A tile of rows: all of them (`whole`), or the columns of the result's tile."""
    parts, _, width = x.shape
    if whole or width == 1:
        block = (parts, sizes.rows, width)
        return pl.BlockSpec(block, lambda j, i, work: (0, work.tile_I[i], 0))
    block = (parts, sizes.rows, columns)
    return pl.BlockSpec(block, lambda j, i, work: (0, work.tile_I[i], j))


def _result_and_contracted(weight, transposed):
    rows, columns = weight.shape[-2:]
    return (rows, columns) if transposed else (columns, rows)


def _kernel(work, operands, outs, sums, *, store, kinds, transposed, rows, depth, contracted):
    """One tile of rows times one tile of each weight, one sum per weight."""
    lhs, weights, extras = operands
    column, item = pl.program_id(0), pl.program_id(1)

    @pl.when(item < work.count_1[0])
    def _():
        for total in sums:
            total[...] = jnp.zeros_like(total)

        def chunk(k, carry):
            for n, (kind, weight) in enumerate(zip(kinds, weights, strict=True)):
                x = lhs[n % len(lhs)]
                expand.add_product(sums[n], x, weight, kind, transposed, k, depth, column)
            return carry

        if depth == contracted:
            chunk(0, None)
        else:
            jax.lax.fori_loop(0, contracted // depth, chunk, None)
        store(sums, _own_rows(work, item, rows), extras, outs)


def _own_rows(work, item, rows):
    """Which rows of the item's tile belong to its group, [rows, 1]."""
    row = work.tile_I[item] * rows + jax.lax.broadcasted_iota(jnp.int32, (rows, 1), 0)
    return (row >= work.begin_I[item]) & (row < work.end_I[item])


def _merge(out, part, mask, value):
    """Stores the rows of the tile that belong to the item's group, and keeps the others."""
    value = value.astype(out.dtype)
    out[part] = jnp.where(jnp.broadcast_to(mask, value.shape), value, out[part])


def _store(sums, mask, extras, outs):
    for part in range(outs.out.shape[0]):
        _merge(outs.out, part, mask, sums[0][part])


def _store_sum(sums, mask, extras, outs):
    for part in range(outs.out.shape[0]):
        _merge(outs.out, part, mask, sums[0][part] + sums[1][part])


def _store_up(sums, mask, extras, outs, *, limit, dtype):
    a, b = (total[0].astype(dtype).astype(jnp.float32) for total in sums)
    _merge(outs.out, 0, mask, swiglu.forward(a, b, extras.gate[0], limit))


def _store_up_gradient(sums, mask, extras, outs, *, limit, dtype):
    a, b = (total[0].astype(dtype).astype(jnp.float32) for total in sums)
    gate, dz = extras.gate[0], extras.dz[0].astype(jnp.float32)
    z, dgate, da, db = swiglu.backward(a, b, gate, dz, limit)
    _merge(outs.da, 0, mask, da)
    _merge(outs.db, 0, mask, db)
    lanes = outs.dgate.shape[-1]
    partial = sum(dgate[:, n : n + lanes] for n in range(0, dgate.shape[1], lanes))
    _merge(outs.dgate, 0, mask, partial)
    if outs.z is not None:
        _merge(outs.z, 0, mask, z)


def _weight_gradients(group_sizes_E, sizes, interpret, lhs, rhs_XN, dtype):
    """For each lhs [X, M] the [E, M, N] of every group's lhs^T rhs; exact zeros if it is empty."""
    rows, n = rhs_XN.shape
    m = lhs[0].shape[1]
    groups = group_sizes_E.shape[0]
    work = work_items.tiles(group_sizes_E, rows, sizes.rows, empty=True)
    tile_m, tile_n = sizes.columns_of(m, 1), sizes.columns_of(n, 1)
    grid = (pl.cdiv(m, tile_m), pl.cdiv(n, tile_n), work.group_I.shape[0])
    out_block = pl.BlockSpec((1, tile_m, tile_n), lambda j, k, i, work: (work.group_I[i], j, k))
    lhs_block = pl.BlockSpec((sizes.rows, tile_m), lambda j, k, i, work: (work.tile_I[i], j))
    rhs_block = pl.BlockSpec((sizes.rows, tile_n), lambda j, k, i, work: (work.tile_I[i], k))
    itemsize = rhs_XN.dtype.itemsize
    [gradients] = pl.pallas_call(
        functools.partial(_weight_gradients_kernel, sizes.rows),
        out_shape=([jax.ShapeDtypeStruct((groups, m, n), dtype)] * len(lhs),),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=grid,
            in_specs=[[lhs_block] * len(lhs), rhs_block],
            out_specs=([out_block] * len(lhs),),
            scratch_shapes=[[pltpu.VMEM((tile_m, tile_n), jnp.float32)] * len(lhs)],
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"),
            vmem_limit_bytes=sizes.memory,
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * len(lhs) * rows * m * n,
            transcendentals=0,
            bytes_accessed=len(lhs) * groups * m * n * jnp.dtype(dtype).itemsize
            + rows * (n * grid[0] + len(lhs) * m * grid[1]) * itemsize,
        ),
        name="expert_weight_gradients",
        interpret=interpret,
    )(work, lhs, rhs_XN)
    return gradients


def _weight_gradients_kernel(rows, work, lhs, rhs, outs, sums):
    item, group, count = pl.program_id(2), work.group_I, work.count_1
    real = item < count[0]
    first = (item == 0) | (group[item] != group[jnp.maximum(item - 1, 0)])
    after = jnp.minimum(item + 1, pl.num_programs(2) - 1)
    last = (item == count[0] - 1) | (group[item] != group[after])

    @pl.when(real & first)
    def _():
        for total in sums:
            total[...] = jnp.zeros_like(total)

    @pl.when(real & (work.begin_I[item] < work.end_I[item]))
    def _():
        mask = _own_rows(work, item, rows)

        def own(ref):
            # Both operands: rows past the array's last may hold NaN, and 0 times NaN is NaN.
            x = ref[...]
            return jnp.where(jnp.broadcast_to(mask, x.shape), x, jnp.zeros_like(x))

        y = own(rhs)
        for total, x in zip(sums, lhs, strict=True):
            total[...] += expand.dot(own(x), y, (0, 0))

    @pl.when(real & last)
    def _():
        for out, total in zip(outs, sums, strict=True):
            out[0] = total[...].astype(out.dtype)


forward, backward = bind.functions(_Kernels, plan)
