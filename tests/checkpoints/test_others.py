"""Checkpoints that others make: what loses nothing is loaded, the rest refused with its cause."""

import json

import jax
import numpy as np
import pytest

from tests.support.checkpoints import change_config, rewrite, synthetic, tensors, transformers_model
from v4jax.checkpoints.convert import convert
from v4jax.checkpoints.load import load_variables, save_official
from v4jax.cli.main import main
from v4jax.errors import InputError


def assert_same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for left, right in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(np.asarray(left), np.asarray(right))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """One model as transformers saves it, in the original format, and its variables."""
    model = transformers_model()
    path = tmp_path_factory.mktemp("saved")
    model.save_pretrained(path)
    return model, path, load_variables(path)


def test_module_names_with_stacked_experts(saved, tmp_path):
    model, _, (config, variables) = saved
    model.save_pretrained(tmp_path, save_original_format=False)
    found = load_variables(tmp_path)
    assert found[0].layers == config.layers
    assert_same(found[1], variables)
    assert main(["v4jax", "inspect", str(tmp_path), "--check"]) == 0


def test_official_names_behind_a_prefix(saved, tmp_path):
    _, _, (config, variables) = saved
    save_official(tmp_path, config, variables)
    renamed = {k: f"model.{k}" for k in tensors(tmp_path) if not k.startswith("head.")}
    rename(tmp_path, renamed)
    assert_same(load_variables(tmp_path)[1], variables)


def rename(directory, names):
    """Gives tensors other names, in files and index."""
    from safetensors import numpy as files

    for path in directory.glob("*.safetensors"):
        stored = files.load_file(path)
        files.save_file({names.get(k, k): v for k, v in stored.items()}, path)
    index = directory / "model.safetensors.index.json"
    if index.exists():
        content = json.loads(index.read_text())
        content["weight_map"] = {names.get(k, k): v for k, v in content["weight_map"].items()}
        index.write_text(json.dumps(content))


@pytest.mark.parametrize("original", [True, False])
def test_a_base_model_without_a_head_is_refused_by_its_cause(saved, tmp_path, original):
    model, *_ = saved
    model.model.save_pretrained(tmp_path, save_original_format=original)
    with pytest.raises(InputError, match="holds no output head .* save the whole"):
        load_variables(tmp_path)


def test_buffers_that_a_config_states_are_left_out(saved, tmp_path):
    model, _, (_, variables) = saved
    model.save_pretrained(tmp_path)
    from safetensors import numpy as files

    path = tmp_path / "model.safetensors"
    extra = {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(4, np.float32)}
    files.save_file(files.load_file(path) | extra, path)
    assert_same(load_variables(tmp_path)[1], variables)
    # What may carry weights is still refused by name.
    files.save_file(files.load_file(path) | {"model.layers.0.attn.lora_A": np.ones(4)}, path)
    with pytest.raises(InputError, match="lora_A, F64 .* is not a tensor of this model"):
        load_variables(tmp_path)


@pytest.fixture
def quantized(tmp_path):
    """FP8 and FP4, with one MTP block."""
    synthetic(tmp_path / "c")
    return tmp_path / "c"


def plain(directory, dtype="bf16"):
    return load_variables(directory, weights=dtype)[1]


def expanded(directory, tmp_path, prefix):
    """Replaces the quantised weights under a prefix by what they stand for, in bf16."""
    save_official(tmp_path / "bf16", *load_variables(directory, weights="bf16"))
    wide = tensors(tmp_path / "bf16")

    def change(key, dtype, array):
        if not key.startswith(prefix):
            return dtype, array
        if key.endswith(".scale"):
            return None
        new_dtype, shape, raw = wide[key]
        if dtype in ("F32", "I64", "I32"):
            return dtype, array
        assert new_dtype == "BF16"
        bits = np.frombuffer(raw, np.uint16).reshape(shape).astype(np.uint32) << 16
        return "BF16", bits.view(np.float32)

    rewrite(directory, change)


def test_a_quantization_config_left_behind(quantized, tmp_path):
    wanted = plain(quantized)
    expanded(quantized, tmp_path, "")
    config, variables = load_variables(quantized)
    assert config.quantization is None and config.expert_dtype is None
    assert_same(plain(quantized), wanted)
    convert(quantized, tmp_path / "official", "official")
    assert "quantization_config" not in json.loads((tmp_path / "official/config.json").read_text())
    assert_same(load_variables(tmp_path / "official")[1], variables)


def test_a_bf16_mtp_block_in_a_quantized_model(quantized, tmp_path):
    wanted = plain(quantized)
    expanded(quantized, tmp_path, "mtp.")
    _, variables = load_variables(quantized)
    assert variables["params"]["mtp_0"]["block"]["attn"]["wq_a"]["weight"].dtype == "bfloat16"
    assert_same(plain(quantized), wanted)
    convert(quantized, tmp_path / "orbax", "orbax", verify=True)
    assert_same(load_variables(tmp_path / "orbax")[1], variables)
    save_official(tmp_path / "again", *load_variables(quantized))
    assert_same(load_variables(tmp_path / "again")[1], variables)


def test_mtp_left_out(quantized):
    rewrite(quantized, lambda key, dtype, a: None if key.startswith("mtp.") else (dtype, a))
    config, variables = load_variables(quantized)
    assert config.mtp_layers == () and "mtp_0" not in variables["params"]


def test_narrow_tables_and_biases(quantized):
    wanted = load_variables(quantized)[1]

    def change(key, dtype, array):
        if key.endswith("tid2eid"):
            return "I32", array
        if key.endswith("gate.bias"):
            return "BF16", np.round(array, 1)
        return dtype, array

    rewrite(quantized, change)
    found = load_variables(quantized)[1]
    for left, right in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        assert (left.shape, left.dtype) == (right.shape, right.dtype)


@pytest.mark.parametrize("to", ["official", "orbax"])
def test_fewer_experts_than_the_table_lists(quantized, tmp_path, to):
    """A plain ablation: the first experts of each token, and the rest of the model as it was."""
    if to == "orbax":
        convert(quantized, tmp_path / "orbax", "orbax")
    directory = quantized if to == "official" else tmp_path / "orbax"
    wanted = load_variables(directory)[1]
    fewer = json.loads((directory / "config.json").read_text())["num_experts_per_tok"] - 1
    change_config(directory, num_experts_per_tok=fewer)
    config, variables = load_variables(directory)
    assert config.num_experts_per_tok == fewer

    def cut(path, leaf):
        return leaf[..., :fewer] if "tid2eid" in jax.tree_util.keystr(path) else leaf

    assert_same(variables, jax.tree_util.tree_map_with_path(cut, wanted))
    # More than it lists cannot be made up.
    change_config(directory, num_experts_per_tok=fewer + 2)
    with pytest.raises(InputError, match=r"tid2eid is I64 .*expected"):
        load_variables(directory)


def test_damaged_bytes_of_our_format_are_found(quantized, tmp_path, capsys):
    convert(quantized, tmp_path / "orbax", "orbax")
    leaf = tmp_path / "orbax" / "items" / "layer_001" / "params.ffn.experts.w2.values"
    path = next(path for path in leaf.iterdir() if path.name != ".zarray")
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 4
    path.write_bytes(raw)
    with pytest.raises(InputError, match="the bytes of layers.1.ffn.experts.*w2.weight are not"):
        load_variables(tmp_path / "orbax")
    with pytest.raises(InputError, match="the bytes of layers.1"):
        convert(tmp_path / "orbax", tmp_path / "back", "official")
    assert main(["v4jax", "inspect", str(tmp_path / "orbax"), "--check"]) == 1
    found = capsys.readouterr().out  # as any other finding: the check goes on behind it
    assert "Check: 1 found" in found and "the bytes of layers.1" in found


@pytest.mark.parametrize("value", [None, "1", 1.5, True, -1, 1 << 32, [1]])
def test_a_checksum_that_is_none(quantized, tmp_path, value):
    convert(quantized, tmp_path / "orbax", "orbax")
    path = tmp_path / "orbax" / "v4jax.json"
    manifest = json.loads(path.read_text())
    manifest["items"]["embed"]["embed.weight"]["crc32"] = value
    path.write_text(json.dumps(manifest))
    with pytest.raises(InputError, match="v4jax.json: .*embed.weight.*crc32"):
        load_variables(tmp_path / "orbax")
