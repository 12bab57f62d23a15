"""Checkpoints of every layout into variables and back, and each way in which one can be wrong."""

import dataclasses
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl import logging

from tests.support.checkpoints import (
    add_drafts,
    change_index,
    files,
    is_quantized,
    rewrite,
    shapes,
    small_config,
    synthetic,
    tensors,
)
from tests.support.tiny import drawn_wide, tiny_config
from v4jax import quant
from v4jax.checkpoints.load import load, load_variables, save_official, save_orbax
from v4jax.config import CSA, WINDOW, segments, with_hash_routing
from v4jax.errors import InputError
from v4jax.files.safetensors import NUMPY_DTYPES
from v4jax.hf.tensors import tensor_table
from v4jax.model.transformer import Transformer
from v4jax.weights import variable_place


@pytest.fixture(scope="module")
def instruct(tmp_path_factory):
    """A small checkpoint as the instruct release is stored; not to be changed."""
    return synthetic(tmp_path_factory.mktemp("instruct") / "model")


@pytest.fixture
def copied(instruct, tmp_path):
    """The same, to be changed."""
    return str(shutil.copytree(instruct, tmp_path / "model"))


def leaf_of(variables, config, spec, min_repeats):
    """The part of the variables that a tensor of the table fills."""
    path, repeat = variable_place(segments(config.layers, min_repeats), spec.item, spec.path)
    leaf = variables
    for name in path:
        leaf = leaf[name]
    leaf = np.asarray(leaf if spec.part == "array" else getattr(leaf, spec.part))
    leaf = leaf if repeat is None else leaf[repeat]
    return leaf if spec.expert is None else leaf[spec.expert]


def assert_stored_bytes(directory, min_repeats):
    """Every tensor's bytes are found where the table says, and the tree is the model's."""
    config, variables = load_variables(directory, min_repeats=min_repeats)
    stored = tensors(directory)
    form = {spec.key: spec for spec in tensor_table(config)}
    assert form.keys() == stored.keys()
    for key, spec in form.items():
        dtype, shape, raw = stored[key]
        ours = leaf_of(variables, config, spec, min_repeats)
        expected = np.frombuffer(raw, NUMPY_DTYPES[dtype]).reshape(shape)
        if dtype == "I64":
            np.testing.assert_array_equal(ours, expected, key)
            assert ours.dtype == np.int32
        else:
            assert ours.tobytes() == raw, key
    model = Transformer(config, min_repeats=min_repeats)
    assert shapes(variables) == shapes(model.abstract_variables())
    return variables


@pytest.mark.parametrize(("folder", "min_repeats"), [("float32", 4), ("native", 2)])
def test_golden_variables_are_the_stored_bytes(golden, folder, min_repeats):
    assert_stored_bytes(golden / folder, min_repeats)


@pytest.mark.parametrize("name", ["flash_tiny", "flash_base_tiny"])
def test_synthetic_variables_are_the_stored_bytes(tmp_path, name):
    directory = synthetic(tmp_path / "model", small_config(name))
    variables = assert_stored_bytes(directory, min_repeats=2)
    expert = variables["params"]["layers_1"]["block_0"]["ffn"]["experts"]["w1"]
    assert (expert.kind, expert.shape) == ("fp4" if name == "flash_tiny" else "fp8", (2, 8, 32, 64))


def test_load_builds_the_model(instruct):
    model, variables = load(instruct, dtype="float32", min_repeats=2)
    assert (model.dtype, model.min_repeats) == ("float32", 2)
    assert shapes(variables) == shapes(model.abstract_variables())
    with pytest.raises(InputError, match="numerics is 'fast'"):
        load(instruct, numerics="fast")
    with pytest.raises(InputError, match="weights is 'int8'"):
        load(instruct, weights="int8")


@pytest.mark.parametrize("weights", ["bf16", "float32"])
@pytest.mark.parametrize("name", ["flash_tiny", "flash_base_tiny"])
def test_expanded_weights(tmp_path, monkeypatch, name, weights):
    said = []
    monkeypatch.setattr(logging, "warning", lambda text, *args: said.append(text % args))
    directory = synthetic(tmp_path / "model", small_config(name))
    _, stored = load_variables(directory)
    _, expanded = load_variables(directory, weights)
    dtype = jnp.bfloat16 if weights == "bf16" else jnp.float32
    assert bool(said) == (name == "flash_base_tiny")

    def check(path, before, after):
        key = jax.tree_util.keystr(path)
        if is_quantized(before):
            assert after.dtype == dtype
            np.testing.assert_array_equal(after, before.dequantize(dtype), key)
        elif before.dtype in (jnp.bfloat16, jnp.float32):
            control = any(name in key for name in ("hc_", "ape", "sink", "bias"))
            assert after.dtype == (jnp.float32 if control else dtype), key
            np.testing.assert_array_equal(before.astype(after.dtype), after, key)

    jax.tree_util.tree_map_with_path(check, stored, expanded, is_leaf=is_quantized)


def test_expansion_is_exact_where_xla_flushes(tmp_path, copied):
    """The smallest scale, 2^-127, makes subnormal float32 numbers."""
    key = "layers.0.attn.wq_a"

    def shrink(name, dtype, array):
        tiny = np.zeros(array.shape, np.uint8)
        return dtype, tiny.view(array.dtype) if name == key + ".scale" else array

    rewrite(copied, shrink)
    _, expanded = load_variables(copied, "float32")
    dtype, shape, raw = tensors(copied)[key + ".weight"]
    values = np.frombuffer(raw, NUMPY_DTYPES[dtype]).reshape(shape).astype(np.float64)
    ours = expanded["params"]["layers_0"]["block_0"]["attn"]["wq_a"]["weight"]
    np.testing.assert_array_equal(np.asarray(ours), values * 2.0**-127)
    assert np.abs(values * 2.0**-127).min() < np.finfo(np.float32).tiny


def test_float_types_are_kept_and_control_tensors_are_float32(tmp_path):
    config = tiny_config(dtype="bfloat16")
    directory = synthetic(tmp_path / "model", config)
    rewrite(directory, lambda key, dtype, array: ("BF16" if dtype == "F32" else dtype, array))
    _, variables = load_variables(directory)
    block = variables["params"]["layers_0"]["block_0"]
    assert block["attn"]["wq_a"]["weight"].dtype == jnp.bfloat16
    assert block["attn_norm"]["weight"].dtype == jnp.bfloat16
    assert block["hc_attn"]["fn"].dtype == block["attn"]["attn_sink"].dtype == jnp.float32


# Saving


@pytest.mark.parametrize("min_repeats", [2, 9])
@pytest.mark.parametrize("name", ["flash_tiny", "flash_base_tiny"])
def test_save_official_writes_the_same_tensors(tmp_path, name, min_repeats):
    source = synthetic(tmp_path / "source", small_config(name))
    config, variables = load_variables(source, min_repeats=min_repeats)
    save_official(tmp_path / "saved", config, variables)
    assert tensors(tmp_path / "saved") == tensors(source)
    assert files(tmp_path / "saved").keys() == files(source).keys()
    again, _ = load_variables(tmp_path / "saved")
    assert again == config


def test_save_orbax_and_load_again(instruct, tmp_path):
    config, variables = load_variables(instruct, min_repeats=2)
    save_orbax(tmp_path / "saved", config, variables)
    assert (tmp_path / "saved" / "items" / "layer_003").is_dir()
    same, again = load_variables(tmp_path / "saved", min_repeats=2)
    assert same == config
    assert jax.tree.structure(again) == jax.tree.structure(variables)
    jax.tree.map(np.testing.assert_array_equal, again, variables)
    assert [x.dtype for x in jax.tree.leaves(again)] == [
        x.dtype for x in jax.tree.leaves(variables)
    ]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_fresh_variables_are_saved_in_their_own_type(tmp_path, dtype):
    layers = with_hash_routing((WINDOW, CSA, CSA), 1)
    config = small_config(layers=layers)  # announces FP8 and FP4, which fresh variables are not
    model = Transformer(config, min_repeats=2)

    def cast(x):
        return x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x

    variables = jax.tree.map(cast, drawn_wide(model))
    save_official(tmp_path / "saved", config, variables)
    found, again = load_variables(tmp_path / "saved", min_repeats=2)
    assert (found.dtype, found.quantization, found.expert_dtype) == (dtype, None, None)
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(x.astype(y.dtype), y), variables, again)


def test_quantized_variables_are_saved_quantized(tmp_path):
    """What a script does that trains in float32 and ships FP8 and FP4."""
    config = small_config(layers=with_hash_routing((WINDOW, CSA), 1))
    variables = drawn_wide(Transformer(config, min_repeats=9))
    form = {(spec.item, spec.path): spec for spec in tensor_table(config) if spec.part != "scales"}
    cut = segments(config.layers, 9)
    for (item, path), spec in form.items():
        where, _ = variable_place(cut, item, path)
        node = variables
        for name in where[:-1]:
            node = node[name]
        leaf = node[where[-1]]
        if spec.dtypes == ("F8_E4M3",):
            node[where[-1]] = quant.quantize_fp8(leaf)
        elif spec.dtypes == ("I8",):
            node[where[-1]] = quant.quantize_fp4(leaf)
        elif spec.dtypes == ("BF16",):
            node[where[-1]] = leaf.astype(jnp.bfloat16)
    save_official(tmp_path / "saved", config, variables)
    found, again = load_variables(tmp_path / "saved", min_repeats=9)
    assert (found.expert_dtype, found.quantization) == ("fp4", config.quantization)
    jax.tree.map(np.testing.assert_array_equal, again, variables)


def test_saving_refuses_what_it_cannot_write(tmp_path, instruct):
    config, variables = load_variables(instruct)
    save_official(tmp_path / "saved", config, variables)
    with pytest.raises(InputError, match="holds a checkpoint"):
        save_official(tmp_path / "saved", config, variables)
    with pytest.raises(InputError, match="holds a checkpoint"):
        save_orbax(tmp_path / "saved", config, variables)
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be written"):
        save_official(tmp_path / "file" / "below", config, variables)


def test_saving_refuses_other_variables(tmp_path, instruct):
    config, variables = load_variables(instruct)
    shorter = dataclasses.replace(config, layers=config.layers[:3])
    with pytest.raises(InputError, match="no cut of the config's 3 layers"):
        save_official(tmp_path / "x", shorter, variables)
    block = variables["params"]["layers_0"]["block_0"]
    sink = block["attn"].pop("attn_sink")
    with pytest.raises(InputError, match="layers.0.attn.attn_sink is missing"):
        save_official(tmp_path / "x", config, variables)
    block["attn"]["attn_sink"] = sink
    block["attn"]["extra"] = sink
    with pytest.raises(InputError, match="params/layers_0/block_0/attn/extra, F32 .* is not a"):
        save_official(tmp_path / "x", config, variables)
    del block["attn"]["extra"]
    block["attn"]["attn_sink"] = sink[:2]
    with pytest.raises(InputError, match=r"attn_sink is F32 \[2\] \(expected F32 \[4\]\)"):
        save_official(tmp_path / "x", config, variables)
    block["attn"]["attn_sink"] = sink
    block["ffn"]["experts"]["w1"] = block["ffn"]["experts"]["w1"].dequantize()
    with pytest.raises(InputError, match="some matrices are quantised and others are not"):
        save_official(tmp_path / "x", config, variables)
    assert not (tmp_path / "x").exists()


# DSpark


def test_drafts_are_carried_along_and_written_back(tmp_path):
    source = synthetic(tmp_path / "model", small_config(mtp_layers=(), layers=(WINDOW,)))
    drafts = add_drafts(source)
    model, variables = load(source)
    assert (model.config.draft_layers, model.config.mtp_layers) == (3, ())
    assert variables["carried"].keys() == drafts.keys()
    for key, (dtype, array) in drafts.items():
        carried = np.asarray(variables["carried"][key])
        assert carried.dtype == NUMPY_DTYPES[dtype]
        np.testing.assert_array_equal(carried, array.astype(carried.dtype), key)
    logits = jax.jit(model.apply)(variables, jnp.ones((1, 4), jnp.int32)).logits
    assert bool(jnp.isfinite(logits).all())
    save_official(tmp_path / "saved", model.config, variables)
    assert tensors(tmp_path / "saved") == tensors(source)
    assert load_variables(tmp_path / "saved")[0] == model.config


def test_drafts_are_counted_by_keys(tmp_path):
    config = small_config(mtp_layers=(), layers=(WINDOW,))
    add_drafts(synthetic(tmp_path / "three", config), 3, announced=1)
    found, _ = load_variables(tmp_path / "three")
    assert (found.draft_layers, found.mtp_layers) == (3, ())
    add_drafts(synthetic(tmp_path / "two", config), 2, announced=3)
    with pytest.raises(InputError, match="announces 3 blocks .* hold 2 draft blocks"):
        load_variables(tmp_path / "two")


def test_drafts_that_are_missing(tmp_path):
    source = synthetic(tmp_path / "model", small_config(mtp_layers=()))
    drafts = add_drafts(source)
    (tmp_path / "model" / "model-drafts.safetensors").unlink()
    change_index(source, lambda weight_map: [weight_map.pop(key) for key in drafts])
    with pytest.raises(InputError, match="announces 3 draft blocks and the files hold no mtp"):
        load_variables(source)
