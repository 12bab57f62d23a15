"""Which device of a mesh holds what of a run: the state like its weights, rows by batch."""

import math
from typing import Any

import jax
import optax
from jax.sharding import NamedSharding, PartitionSpec

from v4jax.errors import InputError
from v4jax.model import sharded
from v4jax.model.transformer import Transformer
from v4jax.sharding import mesh as meshes
from v4jax.sharding.rules import ONE_DEVICE, TRAIN, Layout
from v4jax.train.batch import Batch
from v4jax.train.optimizer import state_like
from v4jax.train.step import TrainState


def layout_of(mesh: str | None) -> Layout:
    """ "data=2,fsdp=4" on all devices with the training strategy; None for one device.

    Raises:
      InputError: several processes without a mesh.
    """
    found = meshes.mesh_of(mesh, "mesh", "--config.mesh=fsdp")
    return ONE_DEVICE if found is None else Layout(found, TRAIN)


def state_shardings(
    model: Transformer, optimizer: optax.GradientTransformation, state: TrainState
) -> Any:
    """A sharding for every leaf of a state; moments have that of their parameters.

    Args:
      state: shapes.
    """
    if model.sharding.mesh is None:
        here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        return jax.tree.map(lambda _: here, state)
    replicated = NamedSharding(model.sharding.mesh, PartitionSpec())
    where = sharded.variable_shardings(model)
    return TrainState(
        params=where["params"],
        buffers=where["buffers"],
        moments=state_like(optimizer, state.params, where["params"], replicated),
        step=replicated,
        scales=_scale_shardings(where["params"], state.scales),
    )


def _scale_shardings(where, scales):
    """Scales have the sharding of their weights, but for axes that the mesh does not divide."""
    if not isinstance(scales, dict):
        return None if scales is None else _where_it_divides(where, scales.shape)
    return {name: _scale_shardings(where[name], child) for name, child in scales.items()}


def _where_it_divides(sharding, shape):
    def divided(size, axes):
        names = (axes,) if isinstance(axes, str) else axes or ()
        return size % math.prod(sharding.mesh.shape[name] for name in names) == 0

    spec = (*sharding.spec, *(None,) * (len(shape) - len(sharding.spec)))
    axes = (axes if divided(n, axes) else None for n, axes in zip(shape, spec, strict=True))
    return NamedSharding(sharding.mesh, PartitionSpec(*axes))


def with_shardings(shape: TrainState, shardings: Any) -> TrainState:
    """Shapes with their shardings, to restore into."""
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shape, shardings
    )


def own_rows(layout: Layout, rows: int) -> range:
    """Which rows of a batch this process's devices hold, all of them or a part.

    Raises:
      InputError: rows that the mesh does not divide, or a process whose rows are no neighbours.
    """
    if layout.mesh is None:
        return range(rows)
    layout.check_divides({"batch": rows})
    rows_of = layout.sharding("batch").addressable_devices_indices_map((rows,))
    parts = {index[0].indices(rows)[:2] for index in rows_of.values()}
    first, last = min(begin for begin, _ in parts), max(end for _, end in parts)
    if sum(end - begin for begin, end in parts) < last - first:
        raise InputError(
            f"the mesh gives process {jax.process_index()} rows {sorted(parts)} of a batch of "
            f"{rows}, which are no neighbours; put the axes data and fsdp before the others"
        )
    return range(first, last)


def put_batch(layout: Layout, batch: Batch, rows: int) -> Batch:
    """This process's `own_rows` of a batch of `rows` as its part of global arrays."""
    if layout.mesh is None:
        return jax.device_put(batch)
    where = layout.sharding("batch")

    def put(x):
        return jax.make_array_from_process_local_data(where, x, (rows, *x.shape[1:]))

    # make_array_from_process_local_data is an implicit transfer.
    with jax.transfer_guard("allow"):
        return jax.tree.map(put, batch)


def replicate(layout: Layout, values: Any) -> Any:
    """Host values, the same in every process, on all devices."""
    if layout.mesh is None:
        return jax.device_put(values)
    return meshes.replicate(layout.mesh, values)
