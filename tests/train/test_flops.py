"""Operations of a step, by what is trained."""

import functools

import numpy as np
import pytest

from tests.support.tiny import tiny_config
from v4jax import accounting
from v4jax.model.transformer import Transformer
from v4jax.train.flops import Passes, passes, step_flops


@functools.cache
def shapes():
    return Transformer(tiny_config(), min_repeats=2).abstract_variables()["params"]


def trained_flops(trained, adapters=None):
    """Operations of a step of a token, by what is trained, and of the forward pass's parts."""
    config = tiny_config()
    shares = passes(shapes() | (adapters or {}), trained, config)
    parts = accounting.flops_per_token(config, 32, accounting.ONE_EACH)
    return step_flops(config, 1, 64, shares), parts, sum(parts.values())


ADAPTER = {"a": np.zeros((1, 4)), "b": np.zeros((2, 1))}
ADAPTERS = {"lora": {"layers_0": {"block_0": {"attn": {"wq_a": ADAPTER}}}}}


def test_operations_are_those_of_what_is_trained():
    found, parts, forward = trained_flops(None)
    assert found == pytest.approx(3 * forward)
    assert trained_flops("^nothing/")[0] == pytest.approx(forward)
    # The indexer learns from a loss of its own, through which nothing else does.
    assert trained_flops("/indexer/")[0] == pytest.approx(forward + 2 * parts["indexer"])
    assert trained_flops("^(?!.*/indexer/)")[0] == pytest.approx(found - 2 * parts["indexer"])
    # Nothing flows back behind the head, and an embedding is a lookup.
    # Norms and biases are leaves without a product: shares of weights are off by a hundredth.
    assert trained_flops("^head/")[0] == pytest.approx(forward + 2 * parts["head"], rel=0.02)
    rest = forward - parts["indexer"]
    assert trained_flops("^embed/")[0] == pytest.approx(forward + rest + parts["attention"])
    adapted = trained_flops("^lora/", ADAPTERS)[0]
    assert adapted == pytest.approx(forward + rest + parts["attention"])


def test_experts_cost_what_a_token_chooses_of_them():
    whole, _, _ = trained_flops(None)
    experts, parts, _ = trained_flops("/experts/")
    rest, _, _ = trained_flops("^(?!.*/experts/)")
    lookup, _, _ = trained_flops("^embed/")  # gradients of activations alone
    config = tiny_config()
    chosen = 2 * 3 * config.hidden_size * config.moe_intermediate_size * len(config.layers)
    chosen *= config.num_experts_per_tok
    assert experts - lookup == pytest.approx(chosen, rel=0.02)
    assert whole > rest > lookup


def test_dense_attention_is_counted_whole():
    config = tiny_config(index_topk=2)
    sparse, dense = (step_flops(config, 1, 512, Passes(), dense) for dense in (False, True))
    assert sparse < dense
