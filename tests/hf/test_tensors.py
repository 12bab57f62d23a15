"""The tensor table against the released sizes, the golden checkpoints and the model's variables."""

import collections
import dataclasses

import jax
import pytest

from tests.support.checkpoints import small_config, tensors
from tests.support.selection import first
from tests.support.tiny import VARIANTS, tiny_config
from v4jax import weights
from v4jax.config import WINDOW, segments
from v4jax.errors import InputError
from v4jax.hf.config import read_config
from v4jax.hf.tensors import (
    expanded_config,
    stored_form,
    tensor_table,
    transformers_key,
)
from v4jax.model.transformer import Transformer
from v4jax.named_configs import get_config
from v4jax.weights import variable_place


@pytest.mark.parametrize(
    ("name", "count", "nbytes"),
    [("flash", 69_187, 159_609_485_896), ("pro", 145_116, 864_704_792_696)],
)
def test_released_sizes(name, count, nbytes):
    table = tensor_table(get_config(name))
    assert len(table) == len({spec.key for spec in table}) == count
    assert sum(spec.nbytes for spec in table) == nbytes


def test_base_has_the_same_keys_in_other_types():
    flash = {spec.key: spec for spec in tensor_table(get_config("flash"))}
    base = {spec.key: spec for spec in tensor_table(get_config("flash_base"))}
    assert base.keys() == flash.keys()
    expert = base["layers.7.ffn.experts.255.w2.weight"]
    scale = base["layers.7.ffn.experts.255.w2.scale"]
    assert (expert.dtypes, expert.shape) == (("F8_E4M3",), (4096, 2048))
    assert (scale.dtypes, scale.shape) == (("F32",), (32, 16))
    assert {spec.dtypes for spec in base.values() if spec.role == "scale"} == {("F32",)}


def test_the_shapes_of_the_specification():
    table = {spec.key: spec for spec in tensor_table(get_config("flash"))}
    expected = {
        "embed.weight": ("BF16", (129280, 4096)),
        "hc_head_fn": ("F32", (4, 16384)),
        "layers.0.hc_attn_fn": ("F32", (24, 16384)),
        "layers.0.attn.attn_sink": ("F32", (64,)),
        "layers.0.attn.wq_b.weight": ("F8_E4M3", (32768, 1024)),
        "layers.0.attn.wq_b.scale": ("F8_E8M0", (256, 8)),
        "layers.0.attn.wo_a.weight": ("F8_E4M3", (8192, 4096)),
        "layers.2.attn.compressor.ape": ("F32", (4, 1024)),
        "layers.3.attn.compressor.ape": ("F32", (128, 512)),
        "layers.2.attn.indexer.weights_proj.weight": ("BF16", (64, 4096)),
        "layers.2.attn.indexer.compressor.wkv.weight": ("BF16", (256, 4096)),
        "layers.2.ffn.gate.tid2eid": ("I64", (129280, 6)),
        "layers.3.ffn.gate.bias": ("F32", (256,)),
        "layers.3.ffn.experts.9.w1.weight": ("I8", (2048, 2048)),
        "layers.3.ffn.experts.9.w1.scale": ("F8_E8M0", (2048, 128)),
        "mtp.0.e_proj.scale": ("F8_E8M0", (32, 32)),
        "mtp.0.hc_head_base": ("F32", (4,)),
    }
    for key, (dtype, shape) in expected.items():
        assert (table[key].dtypes[0], table[key].shape) == (dtype, shape), key
    assert "layers.0.attn.compressor.ape" not in table
    assert "layers.3.attn.indexer.wq_b.weight" not in table


def test_one_file_of_flash_for_each_item():
    items = [item for item, *_ in weights.items(get_config("flash"))]
    assert len(items) == 46
    assert (items[0], items[1], items[43], items[44:]) == (
        "embed", "layer_000", "layer_042", ["head", "mtp_0"],
    )  # fmt: skip


@pytest.mark.parametrize("folder", ["float32", "native"])
def test_golden_tables(golden, folder):
    table = tensor_table(read_config(golden / folder))
    expected = {spec.key: (spec.dtypes[0], spec.shape) for spec in table}
    assert expected == {k: (d, s) for k, (d, s, _) in tensors(golden / folder).items()}


CONFIGS = {name: tiny_config(**changes) for name, changes in VARIANTS.items()} | {
    "instruct": small_config(),
    "base": small_config("flash_base_tiny"),
    "two MTP blocks": tiny_config(mtp_layers=(WINDOW, WINDOW)),
    "no MTP, two shared experts": tiny_config(mtp_layers=(), n_shared_experts=2),
}


@pytest.mark.parametrize("min_repeats", first([2], [2, 4]))
@pytest.mark.parametrize("name", CONFIGS)
def test_every_variable_of_the_model_has_its_tensors(name, min_repeats):
    config = CONFIGS[name]
    cut = segments(config.layers, min_repeats)
    parts = collections.defaultdict(list)
    for spec in tensor_table(dataclasses.replace(config, quantization=None, expert_dtype=None)):
        path, repeat = variable_place(cut, spec.item, spec.path)
        parts[path].append((repeat, spec.expert, spec.shape))
    abstract = Transformer(config, min_repeats=min_repeats).abstract_variables()
    leaves = {
        tuple(entry.key for entry in path): leaf.shape
        for path, leaf in jax.tree_util.tree_leaves_with_path(abstract)
    }
    assert {path: stacked(found) for path, found in parts.items()} == leaves


def stacked(found):
    """The shape of a leaf that these parts fill, each once."""
    repeats, experts = ({part[i] for part in found} for i in (0, 1))
    assert len(found) == len(set(found)) == len(repeats) * len(experts)
    sizes = [len(indices) for indices in (repeats, experts) if indices != {None}]
    return (*sizes, *found[0][2])


def test_transformers_names():
    table = tensor_table(tiny_config(mtp_layers=()), "transformers")
    keys = {spec.key for spec in table}
    assert {
        "model.embed_tokens.weight", "head.weight", "model.norm.weight", "model.hc_head.hc_fn",
        "model.layers.1.attn.norm.weight", "model.layers.1.attn.compressor.norm.weight",
        "model.layers.0.ffn.gate.tid2eid", "model.layers.2.ffn.experts.3.w2.weight",
    } <= keys  # fmt: skip
    assert transformers_key("layers.4.attn.q_norm.weight") == "model.layers.4.attn.q_norm.weight"


def test_expanded_configs():
    flash = get_config("flash")
    assert expanded_config(flash, "stored") is flash
    form = stored_form(expanded_config(flash, "bf16"))
    assert (form.plain, form.matrices, form.experts, form.scale) == ("BF16", "BF16", "BF16", None)
    assert stored_form(expanded_config(flash, "float32")).experts == "F32"


def test_base_scales_whatever_its_config_says():
    quantization = get_config("flash").quantization  # says "ue8m0", as the base release does
    base = dataclasses.replace(get_config("flash"), expert_dtype=None, quantization=quantization)
    assert stored_form(base).scale == "F32"
    assert stored_form(base, "F8_E8M0").scale == "F8_E8M0"
    assert stored_form(get_config("flash_base"), "F8_E8M0").scale == "F32"


def test_other_bad_arguments():
    with pytest.raises(InputError, match="scale_fmt is 'ue5m3', an unknown scale format"):
        stored_form(small_config(quantization={"scale_fmt": "ue5m3"}))
    with pytest.raises(InputError, match="48 input channels; FP4 needs a multiple of 32"):
        tensor_table(small_config(hidden_size=48))
    with pytest.raises(InputError, match="layout is 'gguf'"):
        tensor_table(small_config(), "gguf")
    with pytest.raises(InputError, match="weights is 'fp8'"):
        expanded_config(small_config(), "fp8")
