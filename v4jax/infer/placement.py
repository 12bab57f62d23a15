"""What generation puts where: one device, or a mesh that reads prompts and decodes in turn."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from v4jax.model import sharded
from v4jax.sharding.mesh import replicate
from v4jax.sharding.rules import DECODE, DECODE_LONG, DECODE_ONE, PREFILL, PREFILL_ONE


@dataclasses.dataclass(frozen=True)
class Placement:
    """The models that read prompts and that decode: one and the same on one device.

    On a mesh prompts are read with their tokens spread over it. Rows that its shards divide are
    then decoded each on a shard of its own, with its whole cache; fewer rows with every cache in
    parts, as it lies already.
    """

    prefill: Any
    decode: Any

    @classmethod
    def of(cls, model, rows: int, one_at_a_time: bool = False) -> "Placement":
        """For `rows` prompts; the model's own strategy does not count.

        one_at_a_time: a call reads one prompt, however many are decoded.
        """
        layout = model.sharding
        if layout.mesh is None:
            return cls(model, model)

        def as_by(strategy):
            return model.clone(sharding=dataclasses.replace(layout, strategy=strategy))

        many, few = as_by(DECODE), as_by(DECODE_LONG)
        reading = as_by(PREFILL_ONE if one_at_a_time else PREFILL)
        return cls(reading, few if rows % many.sharding.size("batch") else many)

    @property
    def one_row(self):
        """The model that runs a draft of a single row, which no mesh cuts into parts."""
        layout = self.decode.sharding
        if layout.mesh is None:
            return self.decode
        return self.decode.clone(sharding=dataclasses.replace(layout, strategy=DECODE_ONE))

    def variables(self, params):
        """The variables where both models want them.

        Tensors that are only carried along (DSpark drafts) stay out of the compiled programs, and
        numpy leaves go to the device once, not at every step.
        """
        variables = {name: tree for name, tree in params.items() if name != "carried"}
        if self.prefill.sharding.mesh is None:
            return jax.tree.map(jnp.asarray, variables)
        wanted = sharded.variable_shardings(self.prefill)
        return jax.device_put(variables, {name: wanted[name] for name in variables})

    def replicate(self, x):
        """A small array, the same in every process, on every device."""
        mesh = self.prefill.sharding.mesh
        if mesh is None:
            return x
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            return jax.random.wrap_key_data(self.replicate(jax.random.key_data(x)))
        return replicate(mesh, np.asarray(x))

    def handed_over(self, cache):
        """The cache as the decoding model wants it."""
        if self.decode.sharding.mesh is None:
            return cache
        return jax.device_put(cache, sharded.cache_shardings(self.decode.sharding, cache))

    def described(self, cache):
        """The shapes and places of `handed_over(cache)`."""
        if self.decode.sharding.mesh is None:
            return cache
        wanted = sharded.cache_shardings(self.decode.sharding, cache)
        return jax.tree.map(
            lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), cache, wanted
        )


def replicated(model, x: Any) -> Any:
    """An array or a tree of them on all devices of the model's mesh: each process can read it."""
    mesh = model.sharding.mesh
    if mesh is None:
        return x
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, PartitionSpec()))


def as_called(model, cache: Any) -> Any:
    """A cache that was changed between two calls of the model, placed as they take it."""
    if model.sharding.mesh is None:
        return cache
    places = sharded.cache_shardings(model.sharding, cache)
    return jax.lax.with_sharding_constraint(cache, places)
