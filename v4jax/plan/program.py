"""The programs that are planned, with arguments that are shapes with shardings: nothing is there.

Decoding: a step of the model and the likeliest token, the cache given back in place. Prefill: the
whole context in one call. Training: the step of `v4jax.train`.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from v4jax.model import sharded
from v4jax.model.transformer import Transformer
from v4jax.plan.job import Job
from v4jax.plan.variables import stored_variables
from v4jax.quant import QTensor
from v4jax.sharding.rules import Shards


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


def build(job: Job, shards: Shards) -> Program:
    """The program of a job on a mesh."""
    model = Transformer(job.config, dtype="bfloat16", sharding=shards, remat=job.mode == "train")
    if job.mode == "train":
        from v4jax.plan.training import build_step  # the training loop's imports

        return build_step(job, model)
    return _inference(job, model)


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


def _inference(job, model):
    shards = model.sharding
    whole = job.mode == "prefill"
    cache = jax.eval_shape(functools.partial(model.init_cache, job.batch, job.context))
    rows = NamedSharding(shards.mesh, shards.spec("batch"))
    tokens = (job.batch, job.context if whole else 1)
    arguments = {
        "weights": abstract_variables(job, model),
        "tokens": jax.ShapeDtypeStruct(tokens, jnp.int32, sharding=rows),
        "cache": with_shardings(cache, sharded.cache_shardings(shards, cache)),
    }
    return Program(functools.partial(_next_token, model), arguments, ("cache",))


def _next_token(model, variables, tokens_BT, cache):
    out = model.apply(variables, tokens_BT, cache=cache, logits="last")
    return jnp.argmax(out.logits[:, 0], axis=-1), out.cache


def everywhere(shards: Shards) -> NamedSharding:
    """The sharding of what every device has whole."""
    return NamedSharding(shards.mesh, PartitionSpec())
