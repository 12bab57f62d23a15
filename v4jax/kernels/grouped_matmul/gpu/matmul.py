"""Grouped experts on a GPU (Pallas Triton): a program a work item and tile of columns.

An item's rows start where its group does, so most experts of a training step are one item and no
row is computed for two groups. Programs with the same item run side by side and share its rows in
the L2 cache; items of one group follow each other and share its weights.

Where the weights' last axis is contracted the result is computed transposed, w x^T: the weights
then are the operand that the tensor cores take from registers, where stored forms are expanded, and
a decode step's few rows are the side that may be as short as 16.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from v4jax.kernels.grouped_matmul import bind, formats, swiglu, work_items
from v4jax.kernels.grouped_matmul.gpu import weights as expand
from v4jax.kernels.grouped_matmul.gpu.tiles import plan
from v4jax.kernels.grouped_matmul.operands import Extras, Operands, Product, UpGradient


def refuse(x_XD, gate_X, group_sizes_E, weights, rounding) -> str | None:
    """Why these kernels cannot take the arguments."""
    reason = formats.refuse(weights)
    if reason is not None:
        return reason
    for weight in weights:
        for array in jax.tree.leaves(jax.eval_shape(expand.arrays, weight)):
            # Pallas Triton counts elements in 32 signed bits up to 4 GiB, and in 64 bits beyond.
            if array.size > 2**31 and array.size * array.dtype.itemsize <= 2**32:
                return (
                    f"a weight of {array.shape} {array.dtype.name} has {array.size} elements; "
                    "offsets reach 2^31 elements in arrays of up to 2^32 bytes"
                )
    return None


class _Kernels(bind.Kernels):
    """The grouped matmuls that `passes` calls."""

    def up(self, x, gate, w1, w3):
        store = functools.partial(_store_up, limit=self.limit, dtype=self.dtype)
        extras, out = Extras(gate=gate), Product(self.dtype)
        return self._call("up", store, [x], [w1, w3], extras, out, transposed=True).out

    def down(self, z, w2):
        out = Product(self.dtype)
        return self._call("down", _store, [z], [w2], Extras(), out, transposed=True).out

    def dz(self, dy, w2):
        out = Product(self.dtype)
        return self._call("dz", _store, [dy], [w2], Extras(), out, transposed=False).out

    def up_gradient(self, x, gate, dz, w1, w3, want_z):
        store = functools.partial(_store_up_gradient, limit=self.limit, dtype=self.dtype)
        outs = UpGradient(self.dtype, self.dtype, "sums", self.dtype if want_z else None)
        # Half the columns: the gradient's many results share the registers with two sums.
        found = self._call(
            "up_gradient", store, [x], [w1, w3], Extras(gate, dz), outs, transposed=True, most=64
        )
        return found.da, found.db, found.dgate.sum(0), found.z

    def dx(self, da, db, w1, w3, dtype):
        both, out = [da, db], Product(dtype)
        return self._call("dx", _store, both, [w1, w3], Extras(), out, transposed=False).out

    def weight_gradients(self, lhs, rhs, dtype):
        call = functools.partial(
            _weight_gradient, self.group_sizes_E, self.sizes, self.interpret, dtype=dtype
        )
        return [call(x, rhs) for x in lhs]

    def _call(self, name, store, lhs, *args, **options):
        work = work_items.runs(self.group_sizes_E, lhs[0].shape[0], self.sizes.rows)
        return _grouped(work, self.sizes, self.interpret, name, store, lhs, *args, **options)


def _grouped(
    work, sizes, interpret, name, store, lhs, weights, extras, outs, *, transposed, most=1 << 30
):
    """Results of rows times their group's weights, through `store`.

    Args:
      store: (sums, where, extras, outs) of one tile; sums are transposed if `transposed`.
      lhs: [X, contracted], one for all weights (as many sums) or one each (a single sum).
      extras: gate [X] and dz [X, columns].
      outs: `Product` or `UpGradient` of the results' types, each [X, columns], or "sums" for
        float32 [column tiles, X].
      transposed: contract the weights' last axis, or else their first.
      most: columns of a tile, at most.
    """
    rows = lhs[0].shape[0]
    total, contracted = weights[0].shape[-2:] if transposed else weights[0].shape[:0:-1]
    columns, depth = sizes.columns_of(total, most), sizes.depth_of(contracted)
    grid = (pl.cdiv(total, columns), work.group_I.shape[0])
    operands = Operands(lhs, [expand.arrays(w) for w in weights], extras)

    def shape(dtype):
        if dtype == "sums":
            return jax.ShapeDtypeStruct((grid[0], rows), jnp.float32)
        return jax.ShapeDtypeStruct((rows, total), dtype)

    shapes = jax.tree.map(shape, outs)
    kernel = functools.partial(
        _kernel,
        store=store,
        kinds=[formats.kind(w) for w in weights],
        transposed=transposed,
        tile=(sizes.rows, columns, depth),
        limits=(rows, total, contracted),
        interpret=interpret,
    )
    itemsize = lhs[0].dtype.itemsize
    stored = sum(columns * depth * _bytes_each(w) for w in weights)
    step = depth * len(lhs) * sizes.rows * itemsize + int(stored)
    [out] = pl.pallas_call(
        kernel,
        out_shape=(shapes,),
        grid=grid,
        in_specs=jax.tree.map(_whole, (work, operands)),
        out_specs=jax.tree.map(_whole, (shapes,)),
        compiler_params=plt.CompilerParams(num_warps=sizes.warps, num_stages=sizes.stages_of(step)),
        name=f"expert_{name}",
        interpret=interpret,
    )(work, operands)
    return out


def _bytes_each(weight):
    """Of an element as it lies in shared memory."""
    stored = {"fp8": 1, "fp4": 0.5}.get(formats.kind(weight))
    return stored or weight.dtype.itemsize


def _whole(x):
    """All of an array: programs find their elements themselves."""
    zeros = (0,) * len(x.shape)
    return pl.BlockSpec(x.shape, lambda *_: zeros)


@dataclasses.dataclass(frozen=True)
class _Where:
    """A tile's place: its rows and columns as vectors, and which of them are real."""

    row: jax.Array
    column: jax.Array
    own: jax.Array
    inside: jax.Array
    tile: jax.Array
    transposed: bool

    def spread(self, rows, columns):
        """Vectors over the tile's rows and over its columns, broadcastable to a sum's shape."""
        if self.transposed:
            return rows[None, :], columns[:, None]
        return rows[:, None], columns[None, :]

    def load(self, ref):
        """An extra's elements at the tile, float32; a vector's are one a row."""
        row = jnp.where(self.own, self.row, 0)
        if len(ref.shape) == 1:
            x = plt.load(ref.at[row])
            return x[None, :] if self.transposed else x[:, None]
        row, column = self.spread(row, jnp.where(self.inside, self.column, 0))
        return plt.load(ref.at[row, column]).astype(jnp.float32)

    def store(self, ref, value):
        """Stores the tile's real elements."""
        row, column = self.spread(self.row, self.column)
        own, inside = self.spread(self.own, self.inside)
        mask = jnp.broadcast_to(own, value.shape) & jnp.broadcast_to(inside, value.shape)
        plt.store(ref.at[row, column], value.astype(ref.dtype), mask=mask)

    def store_row_sums(self, ref, value):
        """Stores the sum of each row over the tile's real columns."""
        _, inside = self.spread(self.own, self.inside)
        value = jnp.where(jnp.broadcast_to(inside, value.shape), value, 0.0)
        sums = jnp.sum(value, axis=0 if self.transposed else 1)
        plt.store(ref.at[self.tile, self.row], sums, mask=self.own)


def _kernel(work, operands, outs, *, store, kinds, transposed, tile, limits, interpret):
    """One item's rows times one tile of columns of each weight."""
    lhs, weights, extras = operands
    rows, columns, depth = tile
    all_rows, total, contracted = limits
    place, item = pl.program_id(0), pl.program_id(1)
    first, last, expert = work.row_I[item], work.end_I[item], work.group_I[item]

    @pl.when(first < last)
    def _():
        row = first + jnp.arange(rows)
        column = place * columns + jnp.arange(columns)
        source = jnp.minimum(row, all_rows - 1)

        def step(k, sums):
            k_index = k * depth + jnp.arange(depth)
            x = [_load_rows(ref, source, k_index, contracted) for ref in lhs]
            sums = list(sums)
            for n, (kind, weight) in enumerate(zip(kinds, weights, strict=True)):
                rhs, dtype = x[n % len(lhs)], x[0].dtype
                to = n % len(sums)
                if transposed:
                    w = expand.tile(weight, kind, expert, column, k, depth, dtype)
                    sums[to] += expand.dot(w, rhs, True, interpret)
                else:
                    w = expand.tile(weight, kind, expert, k_index, place, columns, dtype)
                    sums[to] += expand.dot(rhs, w, False, interpret)
            return tuple(sums)

        shape = (columns, rows) if transposed else (rows, columns)
        zero = jnp.zeros(shape, jnp.float32)
        sums = jax.lax.fori_loop(
            0, pl.cdiv(contracted, depth), step, (zero,) * (len(kinds) // len(lhs))
        )
        where = _Where(row, column, row < last, column < total, place, transposed)
        store(sums, where, extras, outs)


def _load_rows(ref, row, column, total):
    """Rows of activations; zero past their last column."""
    at = ref.at[row[:, None], column[None, :]]
    if total % column.shape[0] == 0:
        return plt.load(at)
    mask = jnp.broadcast_to((column < total)[None, :], (row.shape[0], column.shape[0]))
    return plt.load(at, mask=mask, other=jnp.zeros((), ref.dtype))


def _store(sums, where, extras, outs):
    where.store(outs.out, sums[0])


def _store_up(sums, where, extras, outs, *, limit, dtype):
    a, b = (total.astype(dtype).astype(jnp.float32) for total in sums)
    where.store(outs.out, swiglu.forward(a, b, where.load(extras.gate), limit))


def _store_up_gradient(sums, where, extras, outs, *, limit, dtype):
    a, b = (total.astype(dtype).astype(jnp.float32) for total in sums)
    gate, dz = where.load(extras.gate), where.load(extras.dz)
    z, dgate, da, db = swiglu.backward(a, b, gate, dz, limit)
    where.store(outs.da, da)
    where.store(outs.db, db)
    where.store_row_sums(outs.dgate, dgate)
    if outs.z is not None:
        where.store(outs.z, z)


def _weight_gradient(group_sizes_E, sizes, interpret, lhs_XM, rhs_XN, *, dtype):
    """[E, M, N]: every group's lhs^T rhs; exact zeros if it is empty."""
    m, n = lhs_XM.shape[1], rhs_XN.shape[1]
    end_E = jnp.cumsum(group_sizes_E.astype(jnp.int32))
    inputs = (end_E - group_sizes_E.astype(jnp.int32), end_E, lhs_XM, rhs_XN)
    tile_m, tile_n = sizes.columns_of(m), sizes.columns_of(n)
    step = min(sizes.depth_of(lhs_XM.shape[0]), 64)
    shape = jax.ShapeDtypeStruct((group_sizes_E.shape[0], m, n), dtype)
    bytes_a_step = step * (tile_m + tile_n) * rhs_XN.dtype.itemsize
    return pl.pallas_call(
        functools.partial(
            _weight_gradient_kernel, tile=(tile_m, tile_n, step), interpret=interpret
        ),
        out_shape=shape,
        grid=(pl.cdiv(n, tile_n), pl.cdiv(m, tile_m), shape.shape[0]),
        in_specs=[_whole(x) for x in inputs],
        out_specs=_whole(shape),
        compiler_params=plt.CompilerParams(
            num_warps=sizes.warps, num_stages=sizes.stages_of(bytes_a_step)
        ),
        name="expert_weight_gradient",
        interpret=interpret,
    )(*inputs)


def _weight_gradient_kernel(begin, end, lhs, rhs, out, *, tile, interpret):
    tile_m, tile_n, step = tile
    group = pl.program_id(2)
    first, last = begin[group], end[group]
    _, m, n = out.shape
    at_m = pl.program_id(1) * tile_m + jnp.arange(tile_m)
    at_n = pl.program_id(0) * tile_n + jnp.arange(tile_n)

    def load(ref, row, column):
        mask = (row < last)[:, None] & (column < ref.shape[1])[None, :]
        return plt.load(
            ref.at[row[:, None], column[None, :]], mask=mask, other=jnp.zeros((), ref.dtype)
        )

    def rows(k, total):
        row = first + k * step + jnp.arange(step)
        x, y = load(lhs, row, at_m), load(rhs, row, at_n)
        return total + expand.dot(x.T, y, False, interpret)

    zero = jnp.zeros((tile_m, tile_n), jnp.float32)
    total = jax.lax.fori_loop(0, (last - first + step - 1) // step, rows, zero)
    mask = (at_m < m)[:, None] & (at_n < n)[None, :]
    plt.store(out.at[group, at_m[:, None], at_n[None, :]], total.astype(out.dtype), mask=mask)


forward, backward = bind.functions(_Kernels, plan)
