"""The training step that is planned: v4jax.train's loss and optimiser on a described mesh.

The loss runs inside one `shard_map`, its gradient is taken outside, and microbatches add up in a
scan. The batch comes as [parts, rows, tokens], so that no microbatch is cut across devices.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from v4jax.model import sharded
from v4jax.model.transformer import Transformer
from v4jax.plan.job import Job
from v4jax.plan.program import Program, abstract_variables, everywhere
from v4jax.train.batch import Batch
from v4jax.train.loss import LossWeights, count, loss
from v4jax.train.optimizer import OptimizerConfig, make_optimizer, state_like

_BFLOAT16_MUON = OptimizerConfig(muon_dtype="bfloat16")


def build_step(job: Job, model: Transformer) -> Program:
    """One step: gradients of all parts of the batch, then Muon and AdamW."""
    optimizer = make_optimizer(_BFLOAT16_MUON, job.config.o_groups)
    weights = abstract_variables(job, model)
    arguments = {
        "weights": weights,
        "optimizer": _moments(optimizer, weights["params"], model),
        "tokens": _batch(job, model),
    }
    step = functools.partial(_step, model, optimizer)
    return Program(step, arguments, ("weights", "optimizer"))


def _moments(optimizer, params, model):
    shapes = jax.eval_shape(optimizer.init, params)
    shardings = sharded.variable_shardings(model)["params"]
    placed = state_like(optimizer, params, shardings, everywhere(model.sharding))
    return jax.tree.map(
        lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), shapes, placed
    )


def _batch(job, model):
    shards, columns = model.sharding, 1 + len(job.config.mtp_layers)
    rows = (job.parts, job.batch // job.parts, job.context)

    def array(shape, dtype, *axes):
        place = NamedSharding(shards.mesh, shards.spec(None, *axes))
        return jax.ShapeDtypeStruct(shape, dtype, sharding=place)

    return Batch(
        tokens_BT=array(rows, jnp.int32, "batch"),
        targets_BTJ=array((*rows, columns), jnp.int32, "batch", "sequence"),
        weights_BTJ=array((*rows, columns), jnp.float32, "batch", "sequence"),
    )


def _step(model, optimizer, variables, moments, batch):
    params, buffers = variables["params"], variables["buffers"]
    gradient = jax.grad(functools.partial(_loss, model))
    zeros = jax.tree.map(jnp.zeros_like, params)

    def add(total, part):
        found = gradient(params, buffers, part)
        return jax.tree.map(jnp.add, total, found), None

    if batch.tokens_BT.shape[0] == 1:
        gradients = gradient(params, buffers, jax.tree.map(lambda x: x[0], batch))
    else:
        gradients, _ = jax.lax.scan(add, zeros, batch)
    directions, moments = optimizer.update(gradients, moments, params)
    rate = jnp.float32(2.7e-4)
    params = jax.tree.map(lambda w, d: w - rate * d, params, directions)
    return {"params": params, "buffers": buffers}, moments


def _loss(model, params, buffers, batch):
    """The mean loss of a part of the batch, on the model's mesh."""
    shards, specs = model.sharding, sharded.variable_specs(model)
    row, token = shards.spec("batch"), shards.spec("batch", "sequence")
    body = functools.partial(loss_local, model.clone(inside=True))
    return jax.shard_map(
        body,
        mesh=shards.mesh,
        in_specs=(specs["params"], specs["buffers"], Batch(row, token, token, None)),
        out_specs=jax.sharding.PartitionSpec(),
        check_vma=False,
    )(params, buffers, batch)


def loss_local(model: Transformer, params: Any, buffers: Any, batch: Batch):
    """The loss over all shards, of this shard's rows."""
    shards = model.sharding
    variables = {"params": params, "buffers": buffers}
    counts = count(batch, 1, shards)
    return loss(model, variables, batch, LossWeights(), counts, shards=shards)[0]
