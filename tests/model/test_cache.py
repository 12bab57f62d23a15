"""The cache as an object: files, and calls that do not fit it."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.flax import save_file

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
    v4jax.save_cache(path, cache, model, variables)
    like = model.init_cache(1, 80, rollback=2)
    loaded = v4jax.load_cache(path, like, model, variables)
    assert jax.tree.structure(loaded) == jax.tree.structure(cache)
    for ours, stored in zip(jax.tree.leaves(loaded), jax.tree.leaves(cache), strict=True):
        np.testing.assert_array_equal(ours, stored)
    next_token = np.array([[3]], np.int32)
    step = jax.jit(lambda c: model.apply(variables, next_token, cache=c).logits)
    np.testing.assert_array_equal(step(loaded), step(cache))


def test_bad_cache_files_are_named(filled, tmp_path):
    model, variables, cache = filled
    path, bound = tmp_path / "cache.safetensors", (model, variables)

    def refused(message, like=cache, path=path):
        with pytest.raises(v4jax.InputError, match=message):
            v4jax.load_cache(path, like, *bound)

    v4jax.save_cache(path, cache, *bound)
    refused("max_length 80", model.init_cache(1, 96, rollback=2))
    refused("expected int32", model.init_cache(3, 80, rollback=2))
    path.write_bytes(path.read_bytes()[:1000])
    refused("cannot read a cache")
    refused("cannot read a cache", path=tmp_path / "none")
    with pytest.raises(v4jax.InputError, match="cannot write the cache"):
        v4jax.save_cache(tmp_path / "no" / "such" / "folder", cache, *bound)


@pytest.mark.parametrize(
    "changes, options, message",
    [
        (
            {"index_topk": 11},
            {},
            "with index_topk 12 and this model has 11; load it with the model",
        ),
        ({"rope_theta": 20000.0}, {}, "with rope_theta 10000.0 and this model has 20000.0"),
        ({"rope_scaling": None}, {}, "with rope_scaling .* and this model has None"),
        ({"swiglu_limit": 9.0}, {}, "with swiglu_limit 10.0 and this model has 9.0"),
        ({}, {"dtype": "bfloat16"}, "with dtype float32 and this model has bfloat16"),
        ({}, {"numerics": "native"}, "with dtype float32 and this model has bfloat16"),
    ],
)
def test_a_cache_file_is_bound_to_its_model(filled, tmp_path, changes, options, message):
    """All of these have the same arrays, or are told apart before arrays are compared."""
    model, variables, cache = filled
    v4jax.save_cache(tmp_path / "cache", cache, model, variables)
    other = model.clone(config=dataclasses.replace(model.config, **changes), **options)
    with pytest.raises(v4jax.InputError, match=message):
        v4jax.load_cache(tmp_path / "cache", cache, other, variables)


def test_what_changes_no_cached_number_does_not_count(filled, tmp_path):
    model, variables, cache = filled
    v4jax.save_cache(tmp_path / "cache", cache, model, variables)
    free = {"eos_token_id": 7, "max_position_embeddings": 8192, "extra": {"note": 1}}
    other = model.clone(config=dataclasses.replace(model.config, **free), kernels="xla")
    carried = variables | {"carried": {"draft": 1}}
    found = v4jax.load_cache(tmp_path / "cache", cache, other, carried)
    jax.tree.map(np.testing.assert_array_equal, found, cache)


def test_a_cache_file_is_bound_to_its_weights(filled, tmp_path):
    """One number of one small weight is enough; of a large one, one in every thousand is read."""
    model, variables, cache = filled
    v4jax.save_cache(tmp_path / "cache", cache, model, variables)
    leaves, tree = jax.tree.flatten(variables)
    smallest = min(range(len(leaves)), key=lambda i: leaves[i].size)
    leaves[smallest] = leaves[smallest].at[-1].add(1)
    with pytest.raises(v4jax.InputError, match="filled by other weights than these"):
        v4jax.load_cache(tmp_path / "cache", cache, model, jax.tree.unflatten(tree, leaves))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"lengths": [81]}, r"is damaged: lengths is \[81\]; expected 0 to 80"),
        ({"lengths": [-1]}, r"is damaged: lengths is \[-1\]; expected 0 to 80"),
        ({"spare": [3]}, r"is damaged: spare is \[3\]; expected 0 to \[2\]"),
        ({"lengths": [1], "spare": [2]}, r"is damaged: spare is \[2\]; expected 0 to \[1\]"),
    ],
)
def test_counts_beyond_the_cache_are_refused(filled, tmp_path, changes, message):
    model, variables, cache = filled
    wrong = cache.replace(**{name: jnp.int32(value) for name, value in changes.items()})
    v4jax.save_cache(tmp_path / "cache", wrong, model, variables)
    with pytest.raises(v4jax.InputError, match=message):
        v4jax.load_cache(tmp_path / "cache", cache, model, variables)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"format": "v4jax-cache-1"}, "of an older version, which does not say what model"),
        ({"format": "x" * 999}, "is not a cache file: its format is 'xxx"),
        ({"model": "{"}, "does not say what model filled it"),
        ({"model": "[" * 100_000}, "does not say what model filled it"),
        ({"model": None}, "does not say what model filled it"),
        ({"max_length": "many"}, "was made with max_length many"),
        ({"max_length": None}, "was made with max_length unknown"),
        ({"weights": None}, "filled by other weights"),
    ],
)
def test_damaged_metadata_is_named(filled, tmp_path, changes, message):
    """Also files from before they said what model filled them: those are refused."""
    model, variables, cache = filled
    path = tmp_path / "cache"
    v4jax.save_cache(path, cache, model, variables)
    with safe_open(path, "flax") as file:
        about = file.metadata() | changes
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    about = {name: value for name, value in about.items() if value is not None}
    save_file(tensors, path, metadata=about)
    with pytest.raises(v4jax.InputError, match=message) as caught:
        v4jax.load_cache(path, cache, model, variables)
    assert len(str(caught.value)) < 600


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
