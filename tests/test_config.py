"""The config's dataclasses, the cut into segments, and the named configs of configs/."""

import copy
import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import v4jax.config
from v4jax.accounting import count_parameters
from v4jax.config import (
    CSA,
    FULL,
    HCA,
    WINDOW,
    LayerSpec,
    ModelConfig,
    Segment,
    Yarn,
    layer_place,
    segments,
    with_hash_routing,
)
from v4jax.errors import InputError
from v4jax.named_configs import config_names, get_config

NAMES = [
    "flash",
    "flash_base",
    "flash_base_tiny",
    "flash_tiny",
    "nano",
    "pro",
    "pro_base",
    "pro_base_tiny",
    "pro_tiny",
    "small",
]


@pytest.mark.parametrize(
    "valid, name, value, message",
    [
        (HCA, "ratio", 4.5, "ratio is 4.5; expected 0 or more, a whole one"),
        (ModelConfig(), "hidden_size", 48.0, "hidden_size is 48.0; expected a positive number"),
        (ModelConfig(), "index_topk", 1.5, "index_topk is 1.5; .* a whole one, or None for all"),
        (ModelConfig(), "layers", [WINDOW], "layers is .*; expected a tuple of LayerSpec"),
        (ModelConfig(), "mtp_layers", ("window",), "mtp_layers is .*; expected a tuple of LayerSp"),
        (ModelConfig(), "rope_theta", "1e4", "rope_theta is 1e4; expected a positive number"),
    ],
)
def test_values_of_another_type_are_refused(valid, name, value, message):
    """Not by way of the constructor: in tests its annotations are checked before."""
    changed = copy.copy(valid)
    object.__setattr__(changed, name, value)
    with pytest.raises(InputError, match=message):
        changed.__post_init__()


def test_yarn_refuses_what_makes_no_sense():
    with pytest.raises(InputError, match="beta_fast is 1.0, below beta_slow 32.0"):
        Yarn(beta_fast=1.0, beta_slow=32.0)
    with pytest.raises(InputError, match="rope_scaling factor is inf; expected a positive"):
        Yarn(factor=float("inf"))


def test_a_base_of_one_is_fine_where_yarn_is_not_used():
    """Only YaRN divides by its logarithm."""
    for fields in ({"rope_scaling": None}, {"layers": (WINDOW,)}):
        assert ModelConfig(compress_rope_theta=1.0, **fields).compress_rope_theta == 1.0


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"attention": "hca", "ratio": -4}, "ratio is -4; expected 0 or more, a whole one"),
    ],
)
def test_layer_spec_refuses_a_ratio_that_is_none(fields, message):
    with pytest.raises(InputError, match=message):
        LayerSpec(**fields)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"attention": "mla"}, "attention is 'mla'"),
        ({"attention": "window", "routing": "random"}, "routing is 'random'"),
        ({"attention": "hca"}, "ratio 0; expected 2 or more"),
        ({"attention": "window", "ratio": 4}, "compresses nothing"),
        ({"attention": "full", "overlap": True}, "compresses nothing"),
    ],
)
def test_layer_spec_refuses_what_makes_no_sense(fields, message):
    with pytest.raises(InputError, match=message):
        LayerSpec(**fields)


@pytest.mark.parametrize(
    "fields, message",
    [
        (
            {"compress_rope_theta": 1.0},
            "compress_rope_theta is 1.0 .* more than 1, or rope_scaling",
        ),
        ({"compress_rope_theta": 0.5}, "expected a base of more than 1"),
        ({"rope_theta": float("inf")}, "rope_theta is inf; expected a positive number"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps is nan; expected a positive number"),
        ({"initializer_range": -0.1}, "initializer_range is -0.1; expected 0 or a positive"),
        ({"hc_mult": True}, "hc_mult is True; expected a positive number, a whole one"),
        ({"n_shared_experts": -1}, "n_shared_experts is -1; expected 0 or more, a whole one"),
        ({"num_attention_heads": 60}, "60, not divisible by o_groups 8"),
        ({"hidden_size": 0}, "hidden_size is 0"),
        ({"layers": ()}, "at least one layer"),
        ({"qk_rope_head_dim": 63}, "even number"),
        ({"qk_rope_head_dim": 256}, "at most index_head_dim = 128"),
        ({"index_head_dim": 96}, "power of 2"),
        ({"num_experts_per_tok": 257}, "more than n_routed_experts 256"),
        ({"scoring_func": "tanh"}, "scoring_func is 'tanh'"),
        ({"n_shared_experts": -1}, "0 or more"),
        ({"index_topk": 0}, "None for all"),
        ({"hc_mult": 9}, r"1 \(plain residual\) to 8"),
        ({"dtype": "float16"}, "expected 'float32' or 'bfloat16'"),
        ({"mtp_layers": (CSA,)}, "MTP block 0 has csa attention"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps is nan"),
    ],
)
def test_model_config_refuses_contradictions(fields, message):
    with pytest.raises(InputError, match=message):
        dataclasses.replace(ModelConfig(), **fields)


def test_model_config_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        ModelConfig().hidden_size = 1


def test_ablations_are_data():
    config = dataclasses.replace(
        get_config("nano"),
        layers=(FULL, LayerSpec("csa", ratio=8), LayerSpec("hca", ratio=16, overlap=True)),
        mtp_layers=(WINDOW, WINDOW),
        hc_mult=1,
        index_topk=None,
        n_shared_experts=0,
        scoring_func="softmax",
    )
    assert config.num_hidden_layers == 3
    assert config.shared_intermediate_size == 0


def test_layers_that_repeat_are_one_segment():
    flash = ModelConfig().layers
    unrolled = [Segment(i, 1, 1) for i in range(3)]
    assert segments(flash) == (*unrolled, Segment(3, 2, 20))
    assert segments((WINDOW,) * 4 + (CSA,) * 3) == (
        Segment(0, 1, 4),
        *(Segment(i, 1, 1) for i in (4, 5, 6)),
    )
    assert segments((WINDOW, CSA, HCA), min_repeats=1) == tuple(Segment(i, 1, 1) for i in range(3))


@pytest.mark.parametrize("min_repeats", [2, 4, 100])
@pytest.mark.parametrize("name", NAMES)
def test_every_layer_has_one_place(name, min_repeats):
    layers = get_config(name).layers
    cut = segments(layers, min_repeats)
    places = [layer_place(cut, i) for i in range(len(layers))]
    assert len(set(places)) == len(layers)
    for i, (segment, place, repeat) in enumerate(places):
        assert segment.start + repeat * segment.period + place == i
        assert layers[i] == layers[segment.start + place]
    with pytest.raises(InputError, match="is not one of the model's layers"):
        layer_place(cut, len(layers))


def test_named_configs():
    assert config_names() == NAMES
    with pytest.raises(InputError, match="no config 'flsh'.*flash, flash_base, .*pro_tiny"):
        get_config("flsh")
    with pytest.raises(InputError, match="no config '../configs/flash'"):
        get_config("../configs/flash")


def test_released_models_are_those_of_the_report():
    flash, pro = get_config("flash"), get_config("pro")
    kinds = [layer.attention for layer in flash.layers]
    assert (kinds.count("window"), kinds.count("csa"), kinds.count("hca")) == (2, 21, 20)
    kinds = [layer.attention for layer in pro.layers]
    assert (kinds.count("window"), kinds.count("csa"), kinds.count("hca")) == (0, 30, 31)
    for config in (flash, pro):
        assert [layer.routing for layer in config.layers[:4]] == ["hash"] * 3 + ["score"]
        assert config.mtp_layers == (WINDOW,)
        assert config.expert_dtype == "fp4"
        assert config.quantization["scale_fmt"] == "ue8m0"
    for config in (get_config("flash_base"), get_config("pro_base")):
        assert config.expert_dtype is None
        assert config.quantization["scale_fmt"] == "float32"


@pytest.mark.parametrize("name", ["flash", "flash_base", "pro", "pro_base"])
def test_tiny_twins_take_the_same_path(name):
    big, tiny = get_config(name), get_config(f"{name}_tiny")
    assert dict.fromkeys(big.layers).keys() == dict.fromkeys(tiny.layers).keys()
    assert [(s.period, s.repeats > 1) for s in segments(big.layers)] == [
        (s.period, s.repeats > 1) for s in segments(tiny.layers)
    ]
    for field in ("expert_dtype", "quantization", "mtp_layers", "hc_mult", "scoring_func"):
        assert getattr(big, field) == getattr(tiny, field)


def test_nano_has_every_kind_of_layer_and_packs_into_fp4():
    nano = get_config("nano")
    assert {layer.attention for layer in nano.layers} == {"window", "csa", "hca"}
    assert {layer.routing for layer in nano.layers} == {"hash", "score"}
    assert nano.hidden_size % 32 == nano.moe_intermediate_size % 32 == 0


def test_small_is_nano_with_four_to_six_times_the_parameters():
    """A laptop's model of 20 to 30 M parameters, of every kind of layer."""
    small, nano = get_config("small"), get_config("nano")
    assert {layer.attention for layer in small.layers} == {"window", "csa", "hca"}
    assert {layer.routing for layer in small.layers} == {"hash", "score"}
    assert small.hidden_size % 32 == small.moe_intermediate_size % 32 == 0
    count = count_parameters(small)
    assert (count.total, count.mtp_blocks, count.active) == (23_627_721, (3_353_793,), 10_430_409)
    assert 4 < count.total / count_parameters(nano).total < 6
    assert small.max_position_embeddings == 8192 and small.vocab_size == 2112


def test_configs_are_found_once_installed(tmp_path):
    # As in a wheel: the files of configs/ inside the package.
    package = Path(v4jax.config.__file__).parent
    installed = tmp_path / "v4jax"
    installed.mkdir()
    needed = ("config", "draft_sizes", "errors", "named_configs", "quantities")
    for name in (f"{module}.py" for module in needed):
        shutil.copy(package / name, installed)
    shutil.copytree(package.parent / "configs", installed / "configs")
    code = (
        "import json; from v4jax.named_configs import config_names, get_config;"
        "print(json.dumps([config_names(), len(get_config('pro_base_tiny').layers)]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert json.loads(done.stdout) == [NAMES, 11]


def test_with_hash_routing_leaves_the_rest():
    layers = with_hash_routing((WINDOW, CSA, HCA), 1)
    assert [layer.routing for layer in layers] == ["hash", "score", "score"]
    assert layers[1:] == (CSA, HCA)
