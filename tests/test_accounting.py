"""Parameters, KV bytes and FLOPs against the report's figures, and on ablations by hand."""

import dataclasses
import math

import pytest

from v4jax import accounting
from v4jax.config import CSA, FULL, HCA, WINDOW, LayerSpec
from v4jax.hf.tensors import tensor_table
from v4jax.named_configs import get_config

MILLION = 2**20


@pytest.mark.parametrize(
    "name, total, active, mtp",
    [("flash", 284.33, 13.27, 6.61), ("pro", 1573.0, 48.85, 25.84)],
)
def test_parameters_of_the_released_models(name, total, active, mtp):
    counted = accounting.count_parameters(get_config(name))
    assert round(counted.total / 1e9, 2) == total
    assert round(counted.active / 1e9, 2) == active
    assert [round(count / 1e9, 2) for count in counted.mtp_blocks] == [mtp]


def test_base_checkpoints_hold_the_same_parameters():
    tiny, base = get_config("flash_tiny"), get_config("flash_base_tiny")
    assert accounting.count_parameters(tiny) == accounting.count_parameters(base)


def test_kv_bytes():
    assert accounting.main_entry_bytes(get_config("flash")) == 584
    assert accounting.index_entry_bytes(get_config("flash")) == 68
    assert accounting.kv_bytes_per_token(get_config("flash")) == 3514.25
    assert accounting.kv_bytes_per_token(get_config("pro")) == 5031.4375
    assert accounting.V32().kv_bytes_per_token() == 48068


def test_flops_at_a_million_tokens():
    v32 = sum(accounting.V32().flops_per_token(MILLION).values())
    pro = accounting.flops_per_token(get_config("pro"), MILLION)
    flash = accounting.flops_per_token(get_config("flash"), MILLION)
    assert round(v32 / 1e9) == 1197
    assert round(sum(pro.values()) / 1e9) == 319
    assert round(sum(flash.values()) / 1e9) == 121
    assert round(100 * sum(pro.values()) / v32, 1) == 26.7
    assert round(100 * sum(flash.values()) / v32, 1) == 10.1
    assert round(pro["attention"] / 1e9) == 153
    assert round(pro["projections"] / 1e9) == 37


def _small(**changes):
    return dataclasses.replace(get_config("flash_tiny"), **changes)


def test_attended_entries_by_hand():
    config = _small(sliding_window=32, index_topk=16)
    entries = {
        (layer, context): accounting.attended_entries(config, layer, context)
        for layer in (WINDOW, CSA, HCA, FULL)
        for context in (8, 100, 1000)
    }
    assert entries == {
        (WINDOW, 8): 8,
        (WINDOW, 100): 32,
        (WINDOW, 1000): 32,
        (CSA, 8): 8 + 2,
        (CSA, 100): 32 + 16,
        (CSA, 1000): 32 + 16,
        (HCA, 8): 8,
        (HCA, 100): 32,
        (HCA, 1000): 32 + 7,
        (FULL, 8): 8,
        (FULL, 100): 100,
        (FULL, 1000): 1000,
    }
    everything = dataclasses.replace(config, index_topk=None)
    assert accounting.attended_entries(everything, CSA, 1000) == 32 + 250


def test_ablations_are_counted():
    context = 1000
    dense = _small(layers=(FULL,) * 3, hc_mult=1, mtp_layers=())
    parts = accounting.flops_per_token(dense, context)
    assert parts["residual"] == parts["compressor"] == parts["indexer"] == 0
    assert parts["attention"] == 3 * 2 * 4 * context * (2 * 32) * 2
    assert accounting.kv_bytes_per_token(dense) == 3 * accounting.main_entry_bytes(dense)
    assert accounting.window_bytes(dense) == 0
    assert accounting.count_parameters(dense).mtp_blocks == ()

    config = _small(layers=(LayerSpec("hca", ratio=16, overlap=True),))
    parts = accounting.flops_per_token(config, context)
    assert parts["compressor"] == 2 * 2 * 64 * (2 * 32) * 2
    assert accounting.kv_bytes_per_token(config) == accounting.main_entry_bytes(config) / 16


def test_parameters_add_up():
    config = _small(mtp_layers=(WINDOW,) * 2)
    counted = accounting.count_parameters(config)
    embedding = config.vocab_size * config.hidden_size
    outside = 2 * embedding + config.hidden_size + 4 * 256 + 4 + 1
    assert counted.total == sum(counted.layers) + outside
    assert counted.active == sum(counted.active_layers) + outside - embedding
    idle = config.n_routed_experts - config.num_experts_per_tok
    expert = 3 * config.hidden_size * config.moe_intermediate_size
    for total, active in zip(counted.layers, counted.active_layers, strict=True):
        assert total - active == idle * expert
    assert len(counted.mtp_blocks) == 2 and counted.mtp_blocks[0] == counted.mtp_blocks[1]


def test_packed_fp4_counts_two_values_a_byte():
    config = _small()
    stored = {spec.key: spec for spec in tensor_table(config)}
    packed = stored["layers.0.ffn.experts.0.w1.weight"]
    assert packed.dtypes == ("I8",)
    plain = dataclasses.replace(config, quantization=None, expert_dtype=None)
    unpacked = {spec.key: spec for spec in tensor_table(plain)}[packed.key]
    assert 2 * math.prod(packed.shape) == math.prod(unpacked.shape)
    assert accounting.count_parameters(config) == accounting.count_parameters(plain)
