"""Which group of the optimiser every weight of the named configs is in, written out by hand."""

import dataclasses
import math
import re

import jax
import pytest

from v4jax import weights
from v4jax.config import DSpark
from v4jax.model.transformer import Transformer
from v4jax.named_configs import config_names, get_config
from v4jax.train import lora
from v4jax.train.optimizer import OptimizerConfig, group_of, table

MIN_REPEATS = 4

# Names of weights without the numbers of layers; "*" is a layer and the block of an MTP layer.
MUON = [
    "hc_head/fn",
    "mtp/e_proj/weight",
    "mtp/h_proj/weight",
    "mtp/hc_head/fn",
    "*/hc_attn/fn",
    "*/hc_ffn/fn",
    "*/attn/wq_a/weight",
    "*/attn/wq_b/weight",
    "*/attn/wkv/weight",
    "*/attn/wo_a/weight",
    "*/attn/wo_b/weight",
    "*/attn/compressor/wkv/weight",
    "*/attn/compressor/wgate/weight",
    "*/attn/indexer/wq_b/weight",
    "*/attn/indexer/weights_proj/weight",
    "*/attn/indexer/compressor/wkv/weight",
    "*/attn/indexer/compressor/wgate/weight",
    "*/ffn/gate/weight",
    "*/ffn/experts/w1",
    "*/ffn/experts/w2",
    "*/ffn/experts/w3",
    "*/ffn/shared_experts/w1/weight",
    "*/ffn/shared_experts/w2/weight",
    "*/ffn/shared_experts/w3/weight",
]
ADAMW = [
    "embed/weight",
    "head/weight",
    "norm/weight",
    "hc_head/base",
    "hc_head/scale",
    "mtp/enorm/weight",
    "mtp/hnorm/weight",
    "mtp/norm/weight",
    "mtp/hc_head/base",
    "mtp/hc_head/scale",
    "*/attn_norm/weight",
    "*/ffn_norm/weight",
    "*/hc_attn/base",
    "*/hc_attn/scale",
    "*/hc_ffn/base",
    "*/hc_ffn/scale",
    "*/attn/attn_sink",
    "*/attn/q_norm/weight",
    "*/attn/kv_norm/weight",
    "*/attn/compressor/ape",
    "*/attn/compressor/norm/weight",
    "*/attn/indexer/compressor/ape",
    "*/attn/indexer/compressor/norm/weight",
]


def without_numbers(path):
    path = re.sub(r"^(layers_\d+/block_\d+|(mtp|draft)_\d+/block)/", "*/", path)
    return re.sub(r"^(mtp|draft)_\d+", r"\1", path)


@pytest.mark.parametrize("name", config_names())
def test_groups_of_every_named_config(name):
    config = get_config(name)
    params = Transformer(config, min_repeats=MIN_REPEATS).abstract_variables()["params"]
    found = {"muon": set(), "adamw": set()}
    for row in table(params, OptimizerConfig(), weights.parameters(config, MIN_REPEATS)):
        found[row.group].add(without_numbers(row.path))
        # Those of wo_a, one an output group, lie one below the other.
        matrices = math.prod(row.shape[:-2]) * (config.o_groups if "/wo_a/" in row.path else 1)
        assert row.matrices == (matrices if row.group == "muon" else 0), row
        assert row.decayed, row
    assert found == {"muon": set(MUON), "adamw": set(ADAMW)}


def test_groups_of_a_draft():
    draft = {
        "mtp_layers": (),
        "draft_layers": 2,
        "dspark": DSpark(markov_rank=32, noise_token_id=5, target_layer_ids=(0, 1)),
    }
    config = dataclasses.replace(get_config("flash_tiny"), **draft)
    declared = weights.parameters(config, MIN_REPEATS)
    found = {
        without_numbers(path): group_of(path, declared, OptimizerConfig())
        for path in declared
        if path.startswith("draft_") and "/block/" not in path
    }
    of_muon = {path for path, group in found.items() if group == "muon"}
    heads = ("hc_head/fn", "markov_head/markov_w1/weight", "markov_head/markov_w2/weight")
    heads += ("main_proj/weight", "confidence_head/proj/weight")
    assert of_muon == {f"draft/{name}" for name in heads}
    small = ("main_norm/weight", "norm/weight", "hc_head/base", "hc_head/scale")
    assert found.keys() - of_muon == {f"draft/{name}" for name in small}


@pytest.mark.parametrize("name", ["flash", "pro_tiny"])
def test_adapters_have_the_declared_shapes_and_go_to_adamw(name):
    config, options = get_config(name), lora.LoraConfig(rank=2)
    declared = weights.parameters(config, MIN_REPEATS)
    adapters = lora.declared(declared, options)
    params = Transformer(config, min_repeats=MIN_REPEATS).abstract_variables()["params"]
    params = jax.eval_shape(lambda p: lora.add(p, options, jax.random.key(0)), params)
    rows = table(params, OptimizerConfig(frozen=lora.ALL_ELSE), declared | adapters)
    found = {row.path: row.shape for row in rows if row.group == "adamw"}
    assert found == {path: weight.shape for path, weight in adapters.items()}
    assert {row.group for row in rows} == {"adamw", "frozen"}
