"""The cache as an object: files, and calls that do not fit it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import v4jax
from tests.support.tiny import tiny_config, tiny_model
from v4jax.model.context import document_starts
from v4jax.model.transformer import Transformer


@pytest.fixture(scope="module")
def filled():
    model, variables = tiny_model()
    tokens = np.arange(70, dtype=np.int32)[None] % model.config.vocab_size
    cache = jax.jit(model.apply)(variables, tokens, cache=model.init_cache(1, 80, rollback=2)).cache
    return model, variables, cache


def test_a_saved_cache_goes_on_bit_for_bit(filled, tmp_path):
    model, variables, cache = filled
    path = tmp_path / "cache.safetensors"
    v4jax.save_cache(path, cache)
    loaded = v4jax.load_cache(path, like=model.init_cache(1, 80, rollback=2))
    assert jax.tree.structure(loaded) == jax.tree.structure(cache)
    for ours, stored in zip(jax.tree.leaves(loaded), jax.tree.leaves(cache), strict=True):
        np.testing.assert_array_equal(ours, stored)
    next_token = np.array([[3]], np.int32)
    step = jax.jit(lambda c: model.apply(variables, next_token, cache=c).logits)
    np.testing.assert_array_equal(step(loaded), step(cache))


def test_bad_cache_files_are_named(filled, tmp_path):
    model, _, cache = filled
    path = tmp_path / "cache.safetensors"
    v4jax.save_cache(path, cache)
    with pytest.raises(v4jax.InputError, match="max_length 80"):
        v4jax.load_cache(path, like=model.init_cache(1, 96, rollback=2))
    with pytest.raises(v4jax.InputError, match="expected int32"):
        v4jax.load_cache(path, like=model.init_cache(3, 80, rollback=2))
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(v4jax.InputError, match="cannot read a cache"):
        v4jax.load_cache(path, like=cache)
    with pytest.raises(v4jax.InputError, match="cannot read a cache"):
        v4jax.load_cache(tmp_path / "none", like=cache)
    with pytest.raises(v4jax.InputError, match="cannot write the cache"):
        v4jax.save_cache(tmp_path / "no" / "such" / "folder", cache)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"tokens": np.zeros((1, 11), np.int32)}, "to 81 tokens and the cache has room for 80"),
        ({"tokens": np.zeros((2, 1), np.int32)}, "2 rows and the cache 1"),
        ({"segment_ids": np.zeros((1, 4), np.int32)}, "a packed row has neither"),
        ({"mtp": True}, "need the whole row"),
        ({"logits": "some"}, "expected 'all', 'last', 'none' or 'normed'"),
        ({"aux": ("attention_maps",)}, "attention_maps"),
        ({"tokens": np.zeros((1, 0), np.int32)}, "no columns"),
    ],
)
def test_calls_that_do_not_fit(filled, options, message):
    model, variables, cache = filled
    tokens = options.pop("tokens", np.zeros((1, 4), np.int32))
    with pytest.raises(v4jax.InputError, match=message):
        model.apply(variables, tokens, cache=cache, **options)


@pytest.mark.parametrize("options", [{"batch": 0}, {"max_length": 0}, {"max_length": 5000}])
def test_caches_that_cannot_be(options):
    model = Transformer(tiny_config())
    with pytest.raises(v4jax.InputError, match="cache"):
        model.init_cache(**({"batch": 1, "max_length": 8} | options))


def test_weights_of_the_wrong_shape_are_named(filled):
    model, variables, _ = filled
    params = variables["params"]
    params = params | {"norm": {"weight": params["norm"]["weight"][:-1]}}
    variables = variables | {"params": params}
    with pytest.raises(v4jax.InputError, match=r"norm/weight has shape \(47,\); expected \(48,\)"):
        jax.eval_shape(model.apply, variables, np.zeros((1, 4), np.int32))


def test_document_starts_by_eye():
    ids = np.array([[1, 1, 2, 2, 2, 1, 0, 0]], np.int32)
    assert document_starts(jnp.asarray(ids))[0].tolist() == [0, 0, 2, 2, 2, 5, 6, 6]
