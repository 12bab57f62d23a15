"""What the parts of the recipe are for: the indexer learns where attention goes, loads even out."""

import functools

import jax
import jax.numpy as jnp
import pytest

from tests.support.tiny import drawn, tiny_config
from tests.support.train_models import small_batch
from v4jax import weights
from v4jax.config import CSA
from v4jax.model.transformer import Transformer
from v4jax.train.loss import LossWeights
from v4jax.train.optimizer import OptimizerConfig, make_optimizer
from v4jax.train.step import Rates, StepConfig, new_state, train_step

pytestmark = pytest.mark.slow  # compiles whole training programs, minutes of it

# One CSA layer whose 32 entries are four times its top-k.
SIZES = {"layers": (CSA,), "mtp_layers": (), "hc_mult": 1, "index_topk": 8, "vocab_size": 64}
WEIGHTS = LossWeights(mtp=0.0, indexer=1.0)


def trainer(config, **changes):
    """A state to begin with and a compiled step."""
    model = Transformer(tiny_config(**(SIZES | changes)))
    variables = drawn(model)
    optimizer = make_optimizer(
        OptimizerConfig(weight_decay=0.0), weights.parameters(model.config, model.min_repeats)
    )
    step = jax.jit(functools.partial(train_step, model, optimizer, config))
    return new_state(variables["params"], variables["buffers"], optimizer), step


def batch(seed):
    return small_batch(rows=4, length=128, ahead=1, seed=seed, packed=False, vocab_size=64)


def test_the_indexer_learns_what_attention_pays():
    config = StepConfig(losses=WEIGHTS, trained="/indexer/", dense=True, bias_step=0.0)
    state, step = trainer(config)
    lines = []
    for number in range(400):
        state, noted = step(state, batch(number), Rates(jnp.float32(5e-3), jnp.float32(0)))
        lines.append({k: float(v) for k, v in noted.items()})
    first, last = lines[0], lines[-1]
    assert last["indexer"] < 0.5 * last["indexer_uniform"], last
    assert last["indexer_captured"] > first["indexer_captured"] + 0.05
    print({k: (first[k], last[k]) for k in ("indexer", "indexer_uniform", "indexer_captured")})


def test_a_skewed_load_evens_out():
    # No parameter is trained: the biases do it alone, a thousandth a step.
    state, step = trainer(StepConfig(losses=LossWeights(0.0, 0.0, 0.0), trained="nothing"))
    skewed = jax.tree.map(
        lambda b: jnp.zeros_like(b).at[0].set(0.3) if b.shape == (6,) else b, state.buffers
    )
    state, spread = state.replace(buffers=skewed), []
    for number in range(400):
        state, noted = step(state, batch(number), Rates(jnp.float32(0), jnp.float32(0)))
        spread.append(float(noted["load_cv"]))
    assert spread[0] > 0.5 and max(spread[-10:]) < 0.2
    print("load_cv", spread[0], spread[-1])
