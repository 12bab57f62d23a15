"""Each way in which a checkpoint can be wrong, and the sentence that says so."""

import json
import shutil

import numpy as np
import pytest

from tests.support.checkpoints import (
    add_tensors,
    change_config,
    rewrite,
    small_config,
    synthetic,
    tensors,
)
from v4jax.checkpoints.load import load_variables, save_official, save_orbax
from v4jax.errors import InputError


@pytest.fixture(scope="module")
def instruct(tmp_path_factory):
    """A small checkpoint as the instruct release is stored; not to be changed."""
    return synthetic(tmp_path_factory.mktemp("instruct") / "model")


@pytest.fixture
def copied(instruct, tmp_path):
    """The same, to be spoilt."""
    return str(shutil.copytree(instruct, tmp_path / "model"))


def refused(directory, *sentences):
    with pytest.raises(InputError) as caught:
        load_variables(directory)
    text = str(caught.value)
    assert "\n" not in text
    for sentence in sentences:
        assert sentence in text, text


def test_a_missing_and_an_extra_tensor(copied):
    gone = "layers.3.attn.wo_b.scale"
    rewrite(copied, lambda key, dtype, array: None if key == gone else (dtype, array))
    new = {"layers.3.attn.q_bias": ("F32", np.zeros(4))}
    add_tensors(copied, new, "model-more.safetensors")
    refused(
        copied,
        "2 tensors do not fit config.json",
        "layers.3.attn.wo_b.scale is missing (expected F8_E8M0 [1, 1])",
        "layers.3.attn.q_bias, F32 [4], is not a tensor of this model",
    )


def test_wrong_types_and_shapes(copied):
    def change(key, dtype, array):
        if key == "layers.1.attn.wkv.weight":
            return "BF16", array
        if key == "layers.2.ffn.gate.weight":
            return dtype, array[:-1]
        if key == "layers.4.ffn.experts.2.w1.scale":
            return "F32", array
        return dtype, array

    rewrite(copied, change)
    refused(
        copied,
        "3 tensors do not fit",
        "layers.1.attn.wkv.weight is BF16 [32, 64] (expected F8_E4M3 [32, 64])",
        "layers.2.ffn.gate.weight is BF16 [7, 64] (expected BF16 [8, 64])",
        "layers.4.ffn.experts.2.w1.scale is F32 [32, 2] (expected F8_E8M0 [32, 2])",
    )


def test_a_config_with_another_number_of_layers(copied):
    config = json.loads(open_text(copied))
    change_config(copied, num_hidden_layers=5, compress_ratios=[*config["compress_ratios"][:5], 0])
    refused(copied, "88 tensors do not fit", "layers.5.attn.attn_sink, F32 [4], is not a tensor")


def open_text(directory):
    with open(f"{directory}/config.json", encoding="utf-8") as file:
        return file.read()


def test_a_nan_scale_is_an_error_even_if_nothing_is_expanded(copied):
    def spoil(key, dtype, array):
        if key == "layers.2.ffn.experts.1.w3.scale":
            array = array.copy()
            array.view(np.uint8)[3, 1] = 255
        return dtype, array

    rewrite(copied, spoil)
    refused(copied, "layers.2.ffn.experts.1.w3.scale", "1 of 64 E8M0 scales are NaN (byte 255)")


def test_an_overflowing_scale_is_an_error_when_it_is_expanded(copied):
    def grow(key, dtype, array):
        big = np.full(array.shape, 254, np.uint8)
        spoilt = key == "layers.0.ffn.experts.0.w1.scale"
        return dtype, big.view(array.dtype) if spoilt else array

    rewrite(copied, grow)
    load_variables(copied)
    with pytest.raises(InputError, match="experts.0.w1.weight: a value times its scale"):
        load_variables(copied, "bf16")


def test_a_table_that_names_no_expert(copied):
    def spoil(key, dtype, array):
        return dtype, array + 3 if key.endswith("tid2eid") else array

    rewrite(copied, spoil)
    refused(copied, "tid2eid holds expert numbers from 3 to 10; expected 0 to 7")


def test_an_unknown_scale_format(copied):
    quantization = json.loads(open_text(copied))["quantization_config"]
    change_config(copied, quantization_config=quantization | {"scale_fmt": "ue5m3"})
    refused(copied, "scale_fmt", "ue5m3")


def test_base_files_whose_config_says_ue8m0(tmp_path):
    source = synthetic(tmp_path / "model", small_config("flash_base_tiny"))
    quantization = json.loads(open_text(source))["quantization_config"]
    change_config(source, quantization_config=quantization | {"scale_fmt": "ue8m0"})
    config, variables = load_variables(source)
    save_official(tmp_path / "saved", config, variables)
    assert tensors(tmp_path / "saved") == tensors(source)
    assert load_variables(tmp_path / "saved")[0] == config


def test_broken_directories(copied, tmp_path):
    refused(tmp_path / "none", "no such directory")
    refused(tmp_path, "no checkpoint")
    (tmp_path / "model" / "config.json").unlink()
    refused(copied, "config.json cannot be read")


def test_broken_files(copied, tmp_path):
    shard = tmp_path / "model" / "model-00003-of-00009.safetensors"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-10])
    refused(copied, str(shard), "truncated")
    shard.write_bytes(b"\xff" * 64)
    refused(copied, str(shard), "not a safetensors file")
    shard.unlink()
    refused(copied, "missing, first model-00003-of-00009.safetensors")


def test_broken_orbax_directories(instruct, tmp_path):
    config, variables = load_variables(instruct)
    saved = tmp_path / "saved"
    save_orbax(saved, config, variables)
    (saved / "v4jax.json").rename(saved / "aside")
    refused(saved, "no checkpoint")
    manifest = json.loads((saved / "aside").read_text())
    (saved / "v4jax.json").write_text(json.dumps(manifest | {"version": 2}))
    refused(saved, "version 2; this v4jax reads 'v4jax-orbax', version 1")
    (saved / "v4jax.json").write_text("{}")
    refused(saved, "not a manifest of ours")
    (saved / "aside").rename(saved / "v4jax.json")
    leaf = saved / "items" / "layer_002" / "params.attn.wq_a.weight.values"
    chunk = next(path for path in leaf.iterdir() if path.name != ".zarray")
    chunk.write_bytes(chunk.read_bytes()[:100])
    refused(saved, "layer_002/params.attn.wq_a.weight.values: holds 100 bytes; expected 2048")
    (leaf / ".zarray").write_text("{}")
    chunk.write_bytes(bytes(2048))
    refused(saved, "items/layer_002: cannot be restored")
    (saved / "items" / "layer_002").rename(tmp_path / "gone")
    refused(saved, "1 of 9 items are missing, first items/layer_002")
