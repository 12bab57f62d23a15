"""What of a run lies where on its mesh: state in parts beside its weights, rows by batch."""

from typing import Any

import jax
import optax
from jax.sharding import NamedSharding, PartitionSpec

from v4jax.model import sharded
from v4jax.model.transformer import Transformer
from v4jax.sharding.mesh import make_mesh, parse_sizes
from v4jax.sharding.rules import TRAIN, Shards
from v4jax.train.batch import Batch
from v4jax.train.optimizer import state_like
from v4jax.train.step import TrainState


def shards_of(mesh: str | None) -> Shards:
    """ "data=2,fsdp=4" on all devices with the training strategy; None for one device."""
    return Shards() if mesh is None else Shards(make_mesh(**parse_sizes(mesh)), TRAIN)


def state_shardings(
    model: Transformer, optimizer: optax.GradientTransformation, state: TrainState
) -> Any:
    """A sharding for every leaf of a state; moments lie beside their parameters.

    Args:
      state: shapes.
    """
    if model.sharding.mesh is None:
        here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        return jax.tree.map(lambda _: here, state)
    everywhere = NamedSharding(model.sharding.mesh, PartitionSpec())
    where = sharded.variable_shardings(model)
    return TrainState(
        params=where["params"],
        buffers=where["buffers"],
        moments=state_like(optimizer, state.params, where["params"], everywhere),
        step=everywhere,
    )


def placed(shape: TrainState, shardings: Any) -> TrainState:
    """Shapes with their shardings, to restore into."""
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shape, shardings
    )


def put_batch(shards: Shards, batch: Batch) -> Batch:
    """This process's rows as its part of global arrays."""
    if shards.mesh is None:
        return jax.device_put(batch)
    rows = shards.sharding("batch")
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(rows, x), batch)


def put_everywhere(shards: Shards, values: Any) -> Any:
    """Host values, the same in every process, on all devices."""
    return jax.device_put(values, None if shards.mesh is None else shards.sharding())
