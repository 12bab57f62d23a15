"""The steps that are planned: training, prefill and decode as one `Program` each.

Decoding: a step of the model and the likeliest token, the cache given back in place. Prefill: the
whole context in one call. Training: the step of `v4jax.train`.
"""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from v4jax.model import sharded
from v4jax.model.transformer import Transformer
from v4jax.plan.job import Job
from v4jax.plan.program import Program, abstract_variables, with_shardings
from v4jax.plan.training import build_step
from v4jax.sharding.rules import Layout


def build(job: Job, layout: Layout) -> Program:
    """The program of a job on a mesh."""
    model = Transformer(
        job.config,
        dtype="bfloat16",
        numerics=job.numerics,
        sharding=layout,
        remat=job.mode == "train",
    )
    if job.mode == "train":
        return build_step(job, model)
    return _inference(job, model)


def _inference(job, model):
    layout = model.sharding
    whole = job.mode == "prefill"
    cache = jax.eval_shape(functools.partial(model.init_cache, job.batch, job.context))
    rows = NamedSharding(layout.mesh, layout.spec("batch"))
    tokens = (job.batch, job.context if whole else 1)
    arguments = {
        "weights": abstract_variables(job, model),
        "tokens": jax.ShapeDtypeStruct(tokens, jnp.int32, sharding=rows),
        "cache": with_shardings(cache, sharded.cache_shardings(layout, cache)),
    }
    return Program(functools.partial(_next_token, model), arguments, ("cache",))


def _next_token(model, variables, tokens_BT, cache):
    out = model.apply(variables, tokens_BT, cache=cache, logits="last")
    return jnp.argmax(out.logits[:, 0], axis=-1), out.cache
