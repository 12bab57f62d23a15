"""Checkpoints of every layout into variables and back, and each way in which one can be wrong."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl import logging

from tests.checkpoints import (
    add_drafts,
    add_tensors,
    change_config,
    change_index,
    files,
    rewrite,
    small_config,
    synthetic,
    tensors,
)
from tests.tiny import tiny_config
from v4jax import quant
from v4jax.checkpoint import load, load_variables, save_official, save_orbax
from v4jax.config import WINDOW, segments
from v4jax.errors import InputError
from v4jax.model.transformer import Transformer
from v4jax.quant import QTensor
from v4jax.safetensors_io import NUMPY_DTYPES
from v4jax.weights import tensor_table, variable_place


@pytest.fixture(scope="module")
def instruct(tmp_path_factory):
    """A small checkpoint as the instruct release is stored; not to be changed."""
    return synthetic(tmp_path_factory.mktemp("instruct") / "model")


@pytest.fixture
def copied(tmp_path):
    """A small instruct checkpoint of one's own."""
    return synthetic(tmp_path / "model")


def is_quantized(leaf):
    return isinstance(leaf, QTensor)


def shapes(tree):
    """Logical shapes by path."""
    leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_quantized)
    return {jax.tree_util.keystr(path): tuple(leaf.shape) for path, leaf in leaves}


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


@pytest.mark.parametrize("min_repeats", [2, 4])
@pytest.mark.parametrize("folder", ["float32", "native"])
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


# transformers


def transformers_model(seed=0, **changes):
    torch = pytest.importorskip("torch")
    from transformers import DeepseekV4Config, DeepseekV4ForCausalLM

    torch.manual_seed(seed)
    sizes = {
        "vocab_size": 96, "hidden_size": 32, "moe_intermediate_size": 24, "num_hidden_layers": 4,
        "num_attention_heads": 4, "head_dim": 16, "q_lora_rank": 12, "num_experts_per_tok": 2,
        "n_routed_experts": 5, "partial_rotary_factor": 0.5, "o_groups": 2, "o_lora_rank": 6,
        "index_n_heads": 3, "index_head_dim": 8, "index_topk": 4, "sliding_window": 8,
        "max_position_embeddings": 256,
        "compress_rates": {"compressed_sparse_attention": 4, "heavily_compressed_attention": 8},
        "layer_types": [
            "sliding_attention", "compressed_sparse_attention", "heavily_compressed_attention",
            "compressed_sparse_attention",
        ],
        "mlp_layer_types": ["hash_moe", "hash_moe", "moe", "moe"],
    }  # fmt: skip
    model = DeepseekV4ForCausalLM(DeepseekV4Config(**(sizes | changes)))
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.is_floating_point():
                tensor.add_(torch.randn(tensor.shape) * 0.1)
    return model


TORCH_NAMES = {
    ("embed", "weight"): "model.embed_tokens.weight",
    ("head", "weight"): "lm_head.weight",
    ("norm", "weight"): "model.norm.weight",
    ("hc_head", "fn"): "model.hc_head.hc_fn",
}
TORCH_BLOCK_NAMES = {
    ("attn_norm", "weight"): "input_layernorm.weight",
    ("ffn_norm", "weight"): "post_attention_layernorm.weight",
    ("hc_attn", "fn"): "attn_hc.fn",
    ("hc_ffn", "scale"): "ffn_hc.scale",
    ("attn", "attn_sink"): "self_attn.sinks",
    ("attn", "wq_a", "weight"): "self_attn.q_a_proj.weight",
    ("attn", "wq_b", "weight"): "self_attn.q_b_proj.weight",
    ("attn", "kv_norm", "weight"): "self_attn.kv_norm.weight",
    ("attn", "wo_a", "weight"): "self_attn.o_a_proj.weight",
    ("ffn", "shared_experts", "w2", "weight"): "mlp.shared_experts.down_proj.weight",
    ("ffn", "experts", "w2"): "mlp.experts.down_proj",
    ("ffn", "gate", "weight"): "mlp.gate.weight",
}
TORCH_CSA_NAMES = {
    ("attn", "compressor", "ape"): "self_attn.compressor.position_bias",
    ("attn", "compressor", "norm", "weight"): "self_attn.compressor.kv_norm.weight",
    ("attn", "compressor", "wkv", "weight"): "self_attn.compressor.kv_proj.weight",
    ("attn", "indexer", "compressor", "ape"): "self_attn.compressor.indexer.position_bias",
    ("attn", "indexer", "compressor", "norm", "weight"): (
        "self_attn.compressor.indexer.kv_norm.weight"
    ),
    ("attn", "indexer", "wq_b", "weight"): "self_attn.compressor.indexer.q_b_proj.weight",
    ("attn", "indexer", "weights_proj", "weight"): (
        "self_attn.compressor.indexer.scorer.weights_proj.weight"
    ),
}


def get(tree, path):
    for name in path:
        tree = tree[name]
    return np.asarray(tree, np.float32)


def assert_torch_weights(model, variables):
    """Our variables against the tensors in the torch modules, by the modules' own names."""
    state = {key: tensor.float().numpy() for key, tensor in model.state_dict().items()}
    params = variables["params"]
    for path, name in TORCH_NAMES.items():
        np.testing.assert_array_equal(get(params, path), state[name], name)
    for layer in range(4):
        block, stem = params[f"layers_{layer}"]["block_0"], f"model.layers.{layer}."
        names = TORCH_BLOCK_NAMES | (TORCH_CSA_NAMES if layer in (1, 3) else {})
        for path, name in names.items():
            np.testing.assert_array_equal(get(block, path), state[stem + name], stem + name)
        experts = block["ffn"]["experts"]
        joined = np.concatenate([get(experts, ["w1"]), get(experts, ["w3"])], axis=1)
        np.testing.assert_array_equal(joined, state[stem + "mlp.experts.gate_up_proj"])
        gate = variables["buffers"][f"layers_{layer}"]["block_0"]["ffn"]["gate"]
        name, torch_name = (
            ("tid2eid", "tid2eid") if layer < 2 else ("bias", "e_score_correction_bias")
        )
        np.testing.assert_array_equal(np.asarray(gate[name]), state[f"{stem}mlp.gate.{torch_name}"])
        assert gate[name].dtype == (jnp.int32 if layer < 2 else jnp.float32)


def test_transformers_checkpoints(tmp_path):
    model = transformers_model()
    model.save_pretrained(tmp_path / "float32", max_shard_size="200KB")
    assert len(list((tmp_path / "float32").glob("*.safetensors"))) > 1
    ours, variables = load(tmp_path / "float32")
    assert shapes(variables) == shapes(ours.abstract_variables())
    assert_torch_weights(model, variables)


def test_transformers_checkpoints_in_bf16(tmp_path):
    """Cast as a whole, or loaded in bf16 with norms and control tensors kept in float32."""
    import torch
    from transformers import DeepseekV4ForCausalLM

    model = transformers_model().to(torch.bfloat16)
    model.save_pretrained(tmp_path / "cast")
    _, variables = load_variables(tmp_path / "cast")
    assert_torch_weights(model, variables)
    transformers_model().save_pretrained(tmp_path / "float32")
    mixed = DeepseekV4ForCausalLM.from_pretrained(tmp_path / "float32", dtype=torch.bfloat16)
    mixed.save_pretrained(tmp_path / "mixed")
    _, variables = load_variables(tmp_path / "mixed")
    assert_torch_weights(mixed, variables)
    block = variables["params"]["layers_0"]["block_0"]
    assert block["attn_norm"]["weight"].dtype == jnp.float32
    assert block["attn"]["wq_a"]["weight"].dtype == jnp.bfloat16


def test_a_transformers_checkpoint_that_lacks_a_tensor(tmp_path):
    from safetensors.torch import load_file, save_file

    transformers_model().save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    del stored["model.layers.2.attn.norm.weight"]
    stored["model.layers.9.attn.norm.weight"] = stored["model.norm.weight"].clone()
    save_file(stored, tmp_path / "model.safetensors")
    with pytest.raises(InputError) as caught:
        load_variables(tmp_path)
    assert "2 tensors do not fit" in str(caught.value)
    assert "model.layers.2.attn.norm.weight is missing (expected F32 [16])" in str(caught.value)
    assert "model.layers.9.attn.norm.weight, F32 [32], is not a tensor" in str(caught.value)


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


def random_variables(model):
    """Like `model.init`, without compiling it."""
    rng = np.random.default_rng(0)

    def draw(leaf):
        if jnp.issubdtype(leaf.dtype, jnp.integer):
            return jnp.asarray(rng.integers(0, 8, leaf.shape, np.int32))
        return jnp.asarray(rng.standard_normal(leaf.shape, np.float32))

    return jax.tree.map(draw, model.abstract_variables())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_fresh_variables_are_saved_in_their_own_type(tmp_path, dtype):
    config = small_config()  # announces FP8 and FP4, which fresh variables are not
    model = Transformer(config, min_repeats=2)

    def cast(x):
        return x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x

    variables = jax.tree.map(cast, random_variables(model))
    save_official(tmp_path / "saved", config, variables)
    found, again = load_variables(tmp_path / "saved", min_repeats=2)
    assert (found.dtype, found.quantization, found.expert_dtype) == (dtype, None, None)
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(x.astype(y.dtype), y), variables, again)


def test_quantized_variables_are_saved_quantized(tmp_path):
    """What a script does that trains in float32 and ships FP8 and FP4."""
    config = small_config()
    variables = random_variables(Transformer(config, min_repeats=9))
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


# What can be wrong


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
