"""The training step that is planned: v4jax.train's own, its state and batch as shapes."""

import functools

import jax
import jax.numpy as jnp

from v4jax import weights
from v4jax.model import sharded
from v4jax.model.transformer import Transformer
from v4jax.plan.job import Job
from v4jax.plan.program import Program, abstract_variables, replicated_sharding
from v4jax.train.batch import Batch
from v4jax.train.optimizer import OptimizerConfig, make_optimizer, state_like
from v4jax.train.step import Rates, StepConfig, TrainState, train_step

# The report finds bfloat16 products fine for Newton-Schulz.
OPTIMIZER = OptimizerConfig(muon_dtype="bfloat16")


def build_step(job: Job, model: Transformer) -> Program:
    """One step on packed rows: gradients of all parts of the batch, then Muon and AdamW."""
    optimizer = make_optimizer(OPTIMIZER, weights.parameters(job.config, model.min_repeats))
    variables = abstract_variables(job, model)
    whole = replicated_sharding(model.sharding)
    arguments = {
        "weights": variables,
        "optimizer": _moments(optimizer, variables["params"], model),
        "tokens": _batch(job, model),
        "scalars": (
            jax.ShapeDtypeStruct((), jnp.int32, sharding=whole),
            Rates(*(jax.ShapeDtypeStruct((), jnp.float32, sharding=whole) for _ in range(2))),
        ),
    }
    step = functools.partial(_step, model, optimizer, StepConfig(parts=job.parts))
    return Program(step, arguments, ("weights", "optimizer"))


def _moments(optimizer, params, model):
    """The optimiser's state, each moment next to its parameter."""
    shapes = jax.eval_shape(optimizer.init, params)
    shardings = sharded.variable_shardings(model)["params"]
    places = state_like(optimizer, params, shardings, replicated_sharding(model.sharding))
    return jax.tree.map(
        lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), shapes, places
    )


def _batch(job, model):
    rows, columns = (job.batch, job.context), 1 + len(job.config.mtp_layers)

    def array(shape, dtype):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=model.sharding.sharding("batch"))

    return Batch(
        tokens_BT=array(rows, jnp.int32),
        targets_BTJ=array((*rows, columns), jnp.int32),
        weights_BTJ=array((*rows, columns), jnp.float32),
        segment_ids_BT=array(rows, jnp.int32),
    )


def _step(model, optimizer, config, variables, moments, batch, scalars):
    done, rates = scalars
    state = TrainState(variables["params"], variables["buffers"], moments, done)
    state, noted = train_step(model, optimizer, config, state, batch, rates)
    return {"params": state.params, "buffers": state.buffers}, state.moments, noted
