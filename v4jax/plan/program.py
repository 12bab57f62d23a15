"""A program that is planned: a function and its arguments as shapes with shardings."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from v4jax.model import sharded
from v4jax.model.transformer import Transformer
from v4jax.plan.job import Job
from v4jax.plan.variables import stored_variables
from v4jax.quant import QTensor
from v4jax.sharding.rules import Layout


@dataclasses.dataclass(frozen=True)
class Program:
    """A function to compile.

    Attributes:
      arguments: by kind ("weights", "optimizer", "cache", "tokens", "scalars"), in the function's
        order.
      donated: kinds that the step gives back in place.
    """

    function: Callable[..., Any]
    arguments: dict[str, Any]
    donated: tuple[str, ...]

    def lower(self):
        """The program, traced for the arguments' mesh."""
        numbers = [i for i, kind in enumerate(self.arguments) if kind in self.donated]
        # What a step does not read lies in memory all the same (MTP blocks when decoding).
        function = jax.jit(self.function, donate_argnums=numbers, keep_unused=True)
        return function.lower(*self.arguments.values())

    def bytes(self, kind: str) -> int:
        """Bytes of one kind of arguments on each device."""
        return sum(_shard_bytes(leaf) for leaf in jax.tree.leaves(self.arguments.get(kind)))


def _shard_bytes(leaf):
    shape = leaf.sharding.shard_shape(leaf.shape)
    return math.prod(shape) * np.dtype(leaf.dtype).itemsize


def abstract_variables(job: Job, model: Transformer) -> dict[str, Any]:
    """The variables' shapes and types, each with its sharding."""
    tree = stored_variables(job.config, job.weights, model.min_repeats)
    return with_shardings(tree, sharded.variable_shardings(model))


def with_shardings(tree: Any, shardings: Any) -> Any:
    """Shapes with the shardings of a tree like theirs; a `QTensor` has one for both its leaves."""

    def give(leaf, sharding):
        return jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), leaf
        )

    return jax.tree.map(give, tree, shardings, is_leaf=lambda x: isinstance(x, QTensor))


def replicated_sharding(layout: Layout) -> NamedSharding:
    """The sharding of what every device has whole."""
    return NamedSharding(layout.mesh, PartitionSpec())
