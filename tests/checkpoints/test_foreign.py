"""Checkpoints that other tools make: read where nothing is lost, and said; else one cause."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from tests.hf.test_transformers import assert_torch_weights
from tests.support.checkpoints import (
    add_tensors,
    change_config,
    change_index,
    rewrite,
    small_config,
    synthetic,
    tensors,
    transformers_model,
)
from v4jax.checkpoints.convert import convert
from v4jax.checkpoints.load import load, load_variables, open_checkpoint, save_official, save_orbax
from v4jax.config import CSA, WINDOW, with_hash_routing
from v4jax.errors import InputError
from v4jax.files.safetensors import INDEX_NAME, NUMPY_DTYPES

LAYERS = with_hash_routing((WINDOW, CSA), 1)


@pytest.fixture(scope="module")
def instruct(tmp_path_factory):
    """Two layers and an MTP block with FP4 experts; not to be changed."""
    return synthetic(tmp_path_factory.mktemp("instruct") / "model", small_config(layers=LAYERS))


@pytest.fixture(scope="module")
def expanded(instruct, tmp_path_factory):
    """The same in bf16; not to be changed."""
    target = tmp_path_factory.mktemp("expanded") / "model"
    convert(instruct, target, "official", "bf16", progress=False)
    return str(target)


@pytest.fixture
def copied(instruct, tmp_path):
    return str(shutil.copytree(instruct, tmp_path / "model"))


def assert_same(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def notes(directory):
    with open_checkpoint(directory) as source:
        return " / ".join(source.notes)


def refused(directory, *sentences):
    with pytest.raises(InputError) as caught:
        load_variables(directory)
    text = str(caught.value)
    assert "\n" not in text and len(text) < 600, text
    for sentence in sentences:
        assert sentence in text, text


def rename(directory, name):
    """Gives every tensor another name; the bytes stay."""
    stored = tensors(directory)
    files = json.loads(open_text(directory, INDEX_NAME))["weight_map"]
    for file in set(files.values()):
        new = {
            name(key): (stored[key][0], as_array(stored[key]))
            for key, holder in files.items()
            if holder == file
        }
        gone = [key for key, holder in files.items() if holder == file]
        change_index(directory, lambda index, gone=gone: [index.pop(key) for key in gone])
        add_tensors(directory, new, file)


def as_array(tensor):
    dtype, shape, raw = tensor
    return np.frombuffer(raw, NUMPY_DTYPES[dtype]).reshape(shape)


def open_text(directory, name="config.json"):
    with open(f"{directory}/{name}", encoding="utf-8") as file:
        return file.read()


def cast(directory, dtype, chosen):
    """Stores the chosen tensors as another type."""

    def change(key, old, array):
        return (dtype, array.astype(NUMPY_DTYPES[dtype])) if chosen(key) else (old, array)

    rewrite(directory, change)


# transformers


def test_the_names_of_transformers_modules(tmp_path):
    model = transformers_model()
    model.save_pretrained(tmp_path / "modules", save_original_format=False)
    assert any(".gate_up_proj" in key for key in tensors(tmp_path / "modules"))
    ours, variables = load(tmp_path / "modules")
    assert_torch_weights(model, variables)
    assert notes(tmp_path / "modules") == ""
    model.save_pretrained(tmp_path / "official")
    assert_same(variables, load(tmp_path / "official")[1])
    convert(tmp_path / "modules", tmp_path / "converted", "official", progress=False)
    assert_same(load_variables(tmp_path / "converted")[1], variables)


def test_regions_of_stacked_experts(tmp_path):
    transformers_model().save_pretrained(tmp_path, save_original_format=False)
    with open_checkpoint(tmp_path) as source, source.open_parts("layer_001") as read:
        for matrix in ("w1", "w2", "w3"):
            key = f"layers.1.ffn.experts.3.{matrix}.weight"
            spec = next(spec for spec in source.items["layer_001"] if spec.key == key)
            whole, part = np.empty(spec.shape, np.float32), np.empty((5, 7), np.float32)
            read(key, whole)
            read(key, part, ((2, 7), (4, 11)))
            np.testing.assert_array_equal(part, whole[2:7, 4:11])


@pytest.mark.parametrize("original", [True, False])
def test_a_base_model_has_no_head(tmp_path, original):
    transformers_model().model.save_pretrained(tmp_path, save_original_format=original)
    refused(tmp_path, "holds no output head", "DeepseekV4ForCausalLM")


def test_a_lost_tensor_is_named_as_the_files_would_name_it(tmp_path):
    transformers_model().save_pretrained(tmp_path, save_original_format=False)
    from safetensors.torch import load_file, save_file

    stored = load_file(tmp_path / "model.safetensors")
    del stored["model.layers.2.self_attn.kv_norm.weight"]
    save_file(stored, tmp_path / "model.safetensors")
    refused(tmp_path, "1 tensors do not fit", "model.layers.2.self_attn.kv_norm.weight is missing")


# Names


@pytest.mark.parametrize("prefix", ["model.", "module.model.", "_orig_mod."])
def test_official_names_behind_a_prefix(copied, instruct, tmp_path, prefix):
    rename(copied, lambda key: prefix + key)
    config, variables = load_variables(copied)
    assert config == load_variables(instruct)[0]  # with its MTP block
    assert_same(variables, load_variables(instruct)[1])
    convert(copied, tmp_path / "back", "official", progress=False)
    assert tensors(tmp_path / "back") == tensors(instruct)


def test_scales_by_another_name(copied, instruct):
    rename(copied, lambda key: key.replace(".scale", ".weight_scale_inv"))
    assert_same(load_variables(copied)[1], load_variables(instruct)[1])


def test_one_tensor_by_two_names(copied):
    add_tensors(copied, {"model.norm.weight": ("BF16", np.ones(64))}, "model-more.safetensors")
    refused(copied, "norm.weight and model.norm.weight are the same tensor")


def test_buffers_of_other_tools_are_left_out(copied, instruct, tmp_path):
    names = ("model.rotary_emb.inv_freq", "layers.0.attn.rotary_emb.main_original_inv_freq",
             "layers.0.attn.freqs_cis", "layers.1.attn.core._extra_state")  # fmt: skip
    new = {name: ("F32", np.ones(4)) for name in names}
    add_tensors(copied, new, "model-more.safetensors")
    assert_same(load_variables(copied)[1], load_variables(instruct)[1])
    assert "4 tensors are left out: layers.0.attn.freqs_cis is a buffer" in notes(copied)
    convert(copied, tmp_path / "back", "official", progress=False)
    assert tensors(tmp_path / "back") == tensors(instruct)


# Types


def test_a_quantization_config_that_was_left_behind(expanded, instruct, tmp_path):
    directory = str(shutil.copytree(expanded, tmp_path / "model"))
    stored = json.loads(open_text(instruct))
    change_config(directory, **{k: stored[k] for k in ("quantization_config", "expert_dtype")})
    config, variables = load_variables(directory)
    assert (config.quantization, config.expert_dtype) == (None, None)
    assert_same(variables, load_variables(expanded)[1])
    assert "no matrix is quantised: it was left behind" in notes(directory)
    convert(directory, tmp_path / "back", "official", progress=False)
    assert "quantization_config" not in json.loads(open_text(tmp_path / "back"))
    assert notes(tmp_path / "back") == ""


def test_a_quantization_config_that_is_missing(copied, instruct):
    change_config(copied, quantization_config=None, expert_dtype=None)
    config, variables = load_variables(copied)
    assert (config.quantization["scale_fmt"], config.expert_dtype) == ("ue8m0", "fp4")
    assert_same(variables, load_variables(instruct)[1])
    assert "config.json has no quantization_config: added" in notes(copied)


@pytest.mark.parametrize("base", ["flash_tiny", "flash_base_tiny"])
def test_an_mtp_block_in_bf16_in_a_quantised_model(tmp_path, base):
    source = synthetic(tmp_path / "source", small_config(base, layers=LAYERS))
    convert(source, tmp_path / "bf16", "official", "bf16", progress=False)
    plain = tensors(tmp_path / "bf16")
    mixed = str(shutil.copytree(source, tmp_path / "mixed"))

    def change(key, dtype, array):
        if not key.startswith("mtp."):
            return dtype, array
        return (plain[key][0], as_array(plain[key])) if key in plain else None

    rewrite(mixed, change)
    assert "BF16 and not quantised, as the others are: kept so" in notes(mixed)
    model, variables = load(mixed)
    _, expected = load_variables(source)
    expected["params"]["mtp_0"] = load_variables(tmp_path / "bf16")[1]["params"]["mtp_0"]
    assert_same(variables, expected)
    tokens = jnp.ones((1, 6), jnp.int32)
    assert bool(jnp.isfinite(jax.jit(model.apply)(variables, tokens).logits).all())
    for save, name in ((save_official, "official"), (save_orbax, "orbax")):
        save(tmp_path / name, model.config, variables)
        assert_same(load_variables(tmp_path / name)[1], variables)
    assert tensors(tmp_path / "official") == tensors(mixed)
    convert(mixed, tmp_path / "back", "orbax", progress=False)
    assert_same(load_variables(tmp_path / "back")[1], variables)


def test_mtp_left_out(copied, instruct, tmp_path):
    rewrite(copied, lambda key, dtype, array: None if key.startswith("mtp.") else (dtype, array))
    config, variables = load_variables(copied)
    assert config.mtp_layers == ()
    expected = load_variables(instruct)[1]
    for collection in expected.values():
        collection.pop("mtp_0", None)
    assert_same(variables, expected)
    assert "announces 1 MTP blocks and the files hold none" in notes(copied)
    convert(copied, tmp_path / "back", "official", progress=False)
    assert json.loads(open_text(tmp_path / "back"))["num_nextn_predict_layers"] == 0
    assert notes(tmp_path / "back") == ""


@pytest.mark.parametrize("dtype", ["I32", "I16", "U8"])
def test_tables_of_narrower_integers(copied, instruct, tmp_path, dtype):
    cast(copied, dtype, lambda key: key.endswith("tid2eid"))
    assert_same(load_variables(copied)[1], load_variables(instruct)[1])
    assert f"layers.0.ffn.gate.tid2eid) are {dtype} where I64 is usual" in notes(copied)
    convert(copied, tmp_path / "back", "official", progress=False)
    assert tensors(tmp_path / "back") == tensors(instruct)


def test_router_biases_and_other_control_tensors_in_bf16(copied, instruct, tmp_path):
    control = ("gate.bias", "attn_sink", "hc_attn_fn")
    cast(copied, "BF16", lambda key: key.endswith(control))
    assert "are BF16 where F32 is usual: read as F32, which holds the same" in notes(copied)
    _, variables = load_variables(copied)
    _, expected = load_variables(instruct)
    block, usual = (
        v["buffers"]["layers_1"]["block_0"]["ffn"]["gate"] for v in (variables, expected)
    )
    assert block["bias"].dtype == jnp.float32
    np.testing.assert_array_equal(block["bias"], usual["bias"].astype(jnp.bfloat16))
    convert(copied, tmp_path / "back", "official", progress=False)
    assert_same(load_variables(tmp_path / "back")[1], variables)


def test_wider_floats_are_kept(copied, instruct, tmp_path):
    cast(copied, "F32", lambda key: key.endswith(("gate.weight", "norm.weight")))
    model, variables = load(copied)
    assert variables["params"]["layers_1"]["block_0"]["ffn"]["gate"]["weight"].dtype == jnp.float32
    assert "are F32 where BF16 is usual: kept" in notes(copied)
    tokens = jnp.ones((1, 6), jnp.int32)
    found = jax.jit(model.apply)(variables, tokens).logits
    same, usual = load(instruct)
    np.testing.assert_allclose(
        found, jax.jit(same.apply)(usual, tokens).logits, rtol=2e-2, atol=2e-2
    )
    save_official(tmp_path / "saved", model.config, variables)
    assert tensors(tmp_path / "saved") == tensors(copied)


def test_half_precision_floats_are_read_as_float32(expanded, tmp_path):
    directory = str(shutil.copytree(expanded, tmp_path / "model"))
    stored = tensors(directory)
    halves = [key for key, tensor in stored.items() if tensor[0] == "BF16"]
    cast(directory, "F16", lambda key: key in halves)
    weight = load_variables(directory)[1]["params"]["embed"]["weight"]
    assert weight.dtype == jnp.float32
    half = as_array(tensors(directory)["embed.weight"])
    np.testing.assert_array_equal(weight, half.astype(np.float32))


def test_some_layers_left_in_bf16(instruct, expanded, tmp_path):
    """Layers of one array cannot be quantised in part; expanded they can."""
    layers = with_hash_routing((WINDOW,) * 5, 0)
    source = synthetic(tmp_path / "source", small_config(layers=layers, mtp_layers=()))
    convert(source, tmp_path / "bf16", "official", "bf16", progress=False)
    plain = tensors(tmp_path / "bf16")

    def change(key, dtype, array):
        if "layers.2.attn.w" not in key:
            return dtype, array
        return (plain[key][0], as_array(plain[key])) if key in plain else None

    rewrite(source, change)
    refused(source, "layers.2.attn.wq_a.weight is BF16 and layers.0.attn.wq_a.weight F8_E4M3",
            "--weights=bf16")  # fmt: skip
    assert_same(load_variables(source, "bf16")[1], load_variables(tmp_path / "bf16")[1])


# Fewer active experts


@pytest.mark.parametrize("form", ["official", "orbax"])
def test_fewer_active_experts_than_the_table_names(copied, instruct, tmp_path, form):
    directory = copied
    if form == "orbax":
        directory = str(tmp_path / "orbax")
        convert(copied, directory, "orbax", progress=False)
    usual = json.loads(open_text(directory))["num_experts_per_tok"]
    assert usual > 1
    change_config(directory, num_experts_per_tok=1)
    config, variables = load_variables(directory)
    _, expected = load_variables(instruct)
    for block in expected["buffers"].values():
        gate = block.get("block_0", {}).get("ffn", {}).get("gate", {})
        if "tid2eid" in gate:
            gate["tid2eid"] = gate["tid2eid"][:, :1]
    assert config.num_experts_per_tok == 1
    assert_same(variables, expected)
    assert "num_experts_per_tok is 1: the first 1 are read" in notes(directory)
    convert(directory, tmp_path / "back", "official", progress=False)
    again, found = load_variables(tmp_path / "back")
    assert again == config and notes(tmp_path / "back") == ""
    assert_same(found, expected)


def test_more_active_experts_are_refused(copied):
    change_config(copied, num_experts_per_tok=7)
    refused(copied, "num_experts_per_tok is 7 and layers.0.ffn.gate.tid2eid is I64 [512, 3]")


# What is refused


def test_counts_beyond_the_files(copied):
    change_config(copied, n_routed_experts=4096)
    refused(copied, "n_routed_experts is 4096 and the files hold 8 a layer")
    change_config(copied, n_routed_experts=8, num_hidden_layers=4096,
                  compress_ratios=[0] * 4097, num_hash_layers=1)  # fmt: skip
    refused(copied, "num_hidden_layers is 4096 and the files hold 2")


def test_adapters(copied):
    key = "base_model.model.model.layers.0.self_attn.q_a_proj.lora_A.weight"
    add_tensors(copied, {key: ("F32", np.ones((2, 64)))}, "model-more.safetensors")
    refused(copied, "is not a tensor of this model but of a LoRA adapter: merge", key)


@pytest.mark.parametrize("name", ["qweight", "weight_packed", "weight_scale", "absmax"])
def test_other_quantised_formats(copied, name):
    key = f"layers.0.attn.wq_a.{name}"
    add_tensors(copied, {key: ("U8", np.ones((2, 64)))}, "model-more.safetensors")
    refused(copied, f"{key} is of another quantised format", "expand it to bf16")


def test_another_model(copied):
    rename(copied, lambda key: "transformer.h." + key)
    refused(copied, "no tensor is called layers.0", "the weights of a DeepSeek-V4 model")


def test_an_unquantised_model_whose_config_says_nothing_else(expanded):
    assert notes(expanded) == ""
    config = load_variables(expanded)[0]
    assert dataclasses.replace(config, quantization=None, expert_dtype=None) == config
    assert ml_dtypes.bfloat16 == np.dtype(config.dtype)
