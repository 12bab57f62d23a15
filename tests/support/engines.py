"""An engine of a tiny model, and what its tests ask of it again and again."""

import numpy as np

from tests.support.tiny import tiny_model
from v4jax.engine.engine import Engine
from v4jax.engine.request import Request

SIZES = {"slots": 4, "max_length": 384, "prefill_chunk": 128, "exact": True, "draft": None}


def tiny_engine(variant="released", options=(), **changes):
    """An engine and its model and params; few programs, so that tests share them."""
    model, params = tiny_model(variant, **dict(options))
    return Engine(model, params, **(SIZES | changes)), model, params


def prompt_of(length, seed=0):
    return np.random.default_rng([length, seed]).integers(0, 331, length).tolist()


def answer(engine, tokens, count=8, **options):
    """The tokens of one request, run until it ends."""
    return engine.submit(Request(tokens, max_new_tokens=count, **options)).result().tokens
