"""config.json: official and back without a change, transformers' form, and every refusal."""

import contextlib
import copy
import dataclasses
import json
import math
import time

import pytest

from v4jax.config import CSA, FULL, HCA, WINDOW, LayerSpec, ModelConfig, Yarn, with_hash_routing
from v4jax.errors import InputError
from v4jax.hf.config import from_hf, read_config, to_hf
from v4jax.named_configs import config_names, get_config


@pytest.fixture
def official():
    """The config.json of Flash, as it was published."""
    return {
        "architectures": ["DeepseekV4ForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "expert_dtype": "fp4",
        "hc_eps": 1e-06,
        "hc_mult": 4,
        "hc_sinkhorn_iters": 20,
        "head_dim": 512,
        "hidden_act": "silu",
        "hidden_size": 4096,
        "index_head_dim": 128,
        "index_n_heads": 64,
        "index_topk": 512,
        "initializer_range": 0.02,
        "max_position_embeddings": 1048576,
        "model_type": "deepseek_v4",
        "moe_intermediate_size": 2048,
        "n_routed_experts": 256,
        "n_shared_experts": 1,
        "norm_topk_prob": True,
        "num_attention_heads": 64,
        "num_experts_per_tok": 6,
        "num_hash_layers": 3,
        "num_hidden_layers": 43,
        "num_key_value_heads": 1,
        "num_nextn_predict_layers": 1,
        "o_groups": 8,
        "o_lora_rank": 1024,
        "q_lora_rank": 1024,
        "qk_rope_head_dim": 64,
        "quantization_config": {
            "activation_scheme": "dynamic",
            "fmt": "e4m3",
            "quant_method": "fp8",
            "scale_fmt": "ue8m0",
            "weight_block_size": [128, 128],
        },
        "rms_norm_eps": 1e-06,
        "rope_scaling": {
            "beta_fast": 32,
            "beta_slow": 1,
            "factor": 16,
            "original_max_position_embeddings": 65536,
            "type": "yarn",
        },
        "rope_theta": 10000,
        "routed_scaling_factor": 1.5,
        "scoring_func": "sqrtsoftplus",
        "sliding_window": 128,
        "swiglu_limit": 10.0,
        "tie_word_embeddings": False,
        "topk_method": "noaux_tc",
        "torch_dtype": "bfloat16",
        "transformers_version": "4.57.1",
        "use_cache": True,
        "vocab_size": 129280,
        "compress_rope_theta": 160000,
        "compress_ratios": [0, 0] + [4, 128] * 20 + [4] + [0],
    }


def test_official_and_back(official):
    config = from_hf(official)
    assert dataclasses.replace(config, extra={}) == get_config("flash")
    assert to_hf(config) == official
    del official["transformers_version"]
    assert to_hf(get_config("flash")) == official


@pytest.mark.parametrize("folder", ["float32", "native"])
def test_golden_and_back(golden, folder, tmp_path):
    keys = json.loads((golden / folder / "config.json").read_text())
    config = read_config(golden / folder)
    assert config == from_hf(keys) == read_config(golden / folder / "config.json")
    assert to_hf(config) == keys
    kinds = [layer.attention for layer in config.layers]
    assert kinds == ["window", "hca", "csa", "hca", "csa", "window"]
    (tmp_path / "config.json").write_text(json.dumps(to_hf(config)))
    assert read_config(str(tmp_path)) == config


@pytest.mark.parametrize("name", config_names())
def test_named_configs_and_back(name):
    config = get_config(name)
    again = from_hf(json.loads(json.dumps(to_hf(config))))
    assert dataclasses.replace(again, extra={}) == config


@pytest.mark.parametrize(
    "changes",
    [
        {"layers": (FULL, FULL)},
        {"layers": (LayerSpec("csa", 4, overlap=False), LayerSpec("hca", 128, overlap=True))},
        {"layers": (LayerSpec("csa", 8, overlap=True), LayerSpec("hca", 16, routing="hash"))},
        {"layers": (LayerSpec("csa", 128), LayerSpec("hca", 4, overlap=True))},
        {"layers": (WINDOW, CSA, LayerSpec("window", routing="hash"))},
        {"layers": with_hash_routing((WINDOW, CSA, HCA), 3)},
        {"hc_mult": 1},
        {"mtp_layers": ()},
        {"mtp_layers": (WINDOW,) * 2},
        {"index_topk": None},
        {"rope_scaling": None},
        {"rope_scaling": Yarn(4.0, 100, 16.0, 2.0)},
        {"scoring_func": "softmax"},
        {"n_shared_experts": 0},
        {"bos_token_id": None, "eos_token_id": None},
        {"eos_token_id": (1, 7)},
        {"dtype": "float32", "quantization": None, "expert_dtype": None},
    ],
)
def test_ablations_and_back(changes):
    config = dataclasses.replace(get_config("nano"), **changes)
    again = from_hf(json.loads(json.dumps(to_hf(config))))
    assert dataclasses.replace(again, extra={}) == config


def test_only_what_official_keys_cannot_say_goes_through_our_key():
    assert "v4jax_layers" not in to_hf(get_config("pro"))
    keys = to_hf(dataclasses.replace(get_config("nano"), layers=(FULL, HCA)))
    assert keys["compress_ratios"] == [-1, 128, 0]  # -1: other readers stop here
    assert keys["v4jax_layers"][0]["attention"] == "full"


def test_changes_win_over_what_was_read(official):
    config = from_hf(official | {"dtype": "bfloat16", "eos_token_id": None})
    changed = to_hf(dataclasses.replace(config, hidden_size=64, eos_token_id=5, dtype="float32"))
    assert (changed["hidden_size"], changed["eos_token_id"], changed["dtype"]) == (64, 5, "float32")


def test_draft_blocks_are_counted_by_compress_ratios(official):
    official["compress_ratios"] += [0, 0]  # num_nextn_predict_layers still says 1
    config = from_hf(official)
    assert (config.mtp_layers, config.draft_layers) == ((), 3)
    assert to_hf(config) == official
    official["dspark_block_size"] = 5
    config = from_hf(official)
    assert config.draft_layers == 3
    assert to_hf(config) == official
    without = dataclasses.replace(config, draft_layers=0, mtp_layers=(WINDOW,))
    assert from_hf(to_hf(without)).mtp_layers == (WINDOW,)


def test_harmless_variants(official):
    official["expert_dtype"] = None
    official["rope_scaling"] = None
    official["num_nextn_predict_layers"] = 0
    official["compress_ratios"].pop()
    config = from_hf(official)
    assert (config.expert_dtype, config.rope_scaling, config.mtp_layers) == (None, None, ())
    assert to_hf(config) == official
    official["scoring_func"], official["norm_topk_prob"] = "softmax", False
    assert to_hf(from_hf(official)) == official


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"sliding_window_size": 5}, "'sliding_window_size' .= 5. is unknown"),
        ({"n_group": 8}, "n_group is 8"),
        ({"attention_bias": True}, "attention_bias is true"),
        ({"hidden_act": "gelu"}, "only 'silu' is implemented"),
        ({"norm_topk_prob": False}, "norm_topk_prob is false"),
        ({"topk_method": "greedy"}, "topk_method is .greedy."),
        ({"tie_word_embeddings": True}, "tie_word_embeddings is true"),
        ({"num_key_value_heads": 8}, "num_key_value_heads is 8"),
        ({"model_type": "deepseek_v3"}, "model_type is .deepseek_v3."),
        ({"first_k_dense_replace": 3}, "first_k_dense_replace is 3"),
        ({"hidden_size": "4096"}, 'hidden_size is "4096"; expected an integer'),
        ({"hidden_size": True}, "hidden_size is true; expected an integer"),
        ({"hidden_size": 4096.5}, "hidden_size is 4096.5; expected an integer"),
        ({"rope_theta": None}, "rope_theta is null; expected a number"),
        ({"rms_norm_eps": math.inf}, "rms_norm_eps is Infinity; expected a number"),
        ({"num_hidden_layers": 42}, r"ends in \[4, 0\] after the 42 layers"),
        ({"num_hidden_layers": 50}, "44 entries and num_hidden_layers is 50; expected one ratio"),
        ({"num_nextn_predict_layers": 2}, "has 44 entries, but num_hidden_layers is 43"),
        ({"num_hash_layers": 44}, "num_hash_layers is 44; expected 0 to 43"),
        ({"compress_ratios": [8] * 44}, r"compress_ratios\[0\] is 8; .*v4jax_layers"),
        ({"compress_ratios": 4}, "compress_ratios is 4"),
        ({"v4jax_layers": [{"attention": "hca", "ratio": 8}]}, "contradict each other"),
        (
            {"v4jax_layers": [{"attention": "hca", "ratio": "8"}]},
            "has ratio = .8.; expected a value of type int",
        ),
        ({"v4jax_layers": [{"kind": "hca"}]}, r"v4jax_layers\[0\] is .*expected an object"),
        ({"num_attention_heads": 60}, "not divisible by o_groups 8"),
        (
            {"rope_scaling": {"type": "linear", "factor": 2}},
            "type = .linear., .* expected type yarn",
        ),
        ({"rope_scaling": {"factor": 2}}, "rope_scaling has no 'type'"),
        ({"rope_scaling": {"type": "yarn", "factor": 2}}, "no 'original_max_position"),
        ({"torch_dtype": "float16"}, "dtype is 'float16'"),
        ({"dtype": "float32"}, "torch_dtype and dtype are .*; keep the right one"),
        ({"expert_dtype": "nvfp4"}, "expert_dtype is .nvfp4."),
        ({"quantization_config": None}, "there is no quantization_config"),
        ({"eos_token_id": "</s>"}, "eos_token_id is .* expected an integer"),
    ],
)
def test_what_would_change_the_numbers_is_an_error(official, changes, message):
    with pytest.raises(InputError, match=f"^the config: .*{message}"):
        from_hf(official | changes)


@pytest.mark.parametrize(
    "key, value, message",
    [
        ("mscale", 1.0, "rope_scaling has mscale = 1.0, which is not implemented"),
        ("rope_theta", 500, "rope_scaling has rope_theta = 500"),
        ("factor", -1, "factor is -1.0; expected a positive"),
        ("scale_fmt", "ue4m3", "scale_fmt is .ue4m3.; expected 'ue8m0' or 'float32'"),
        ("quant_method", "awq", "quant_method is .awq."),
        ("weight_block_size", [64, 64], r"weight_block_size is \[64, 64\]"),
        ("bits", 4, "unknown key 'bits'"),
        ("expert_dtype", "fp8", "contradict each other"),
    ],
)
def test_nested_keys_are_checked_too(official, key, value, message):
    nested = "rope_scaling" if key in ("mscale", "rope_theta", "factor") else "quantization_config"
    official[nested] = official[nested] | {key: value}
    with pytest.raises(InputError, match=message):
        from_hf(official)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"n_routed_experts": 10**7}, "n_routed_experts is 10000000; expected 0 to 65536"),
        ({"n_routed_experts": 60000}, "is 60000 and num_hidden_layers 43; expected 262144 experts"),
        ({"compress_ratios": [0] * 10**7}, "compress_ratios has 10000000 entries; expected 4160"),
        ({"compress_ratios": [0] * 200}, "200 entries|has 157 entries after the 43 layers"),
        ({"v4jax_layers": [{"attention": "window"}] * 10**6}, "v4jax_layers has 1000000 entries"),
        ({"num_nextn_predict_layers": 10**10}, "num_nextn_predict_layers is 10000000000; expected"),
        ({"num_hidden_layers": 10**10}, "num_hidden_layers is 10000000000; expected 0 to 4096"),
        ({"num_hidden_layers": -1}, "num_hidden_layers is -1; expected 0 to"),
        ({"num_nextn_predict_layers": -1}, "num_nextn_predict_layers is -1; expected 0 to 64"),
        ({"num_hash_layers": -3}, "num_hash_layers is -3; expected 0 to"),
        ({"n_routed_experts": -8}, "n_routed_experts is -8; expected 0 to"),
        ({"n_shared_experts": -1}, "n_shared_experts is -1; expected 0 to"),
        ({"hc_sinkhorn_iters": 10**9}, "hc_sinkhorn_iters is 1000000000; expected 0 to 1000"),
    ],
)
def test_counts_are_bounded_before_anything_is_built(official, changes, message):
    started = time.monotonic()
    with pytest.raises(InputError, match=message) as caught:
        from_hf(official | changes)
    assert time.monotonic() - started < 1 and len(str(caught.value)) < 300
    without = {k: v for k, v in official.items() if k != "compress_ratios"}
    if "compress_ratios" not in changes:
        layers = {"v4jax_layers": [{"attention": "window"}] * 43}
        with pytest.raises(InputError, match=message):
            from_hf(without | layers | changes)


def test_counts_of_the_transformers_form_are_bounded(transformers_config):
    keys = _transformers(transformers_config).to_dict()
    for name, value in (("num_hidden_layers", 10**10), ("n_routed_experts", 10**7),
                        ("num_hidden_layers", -1), ("n_routed_experts", -2)):  # fmt: skip
        with pytest.raises(InputError, match=f"{name} is {value}; expected 0 to"):
            from_hf(keys | {name: value})


def test_keys_of_other_tools_change_nothing(official):
    others = {"unsloth_version": "2026.1", "use_bfloat16": False, "repetition_penalty": 1.0,
              "do_sample": True, "temperature": 0.6, "add_cross_attention": False}  # fmt: skip
    config = from_hf(official | others)
    assert dataclasses.replace(config, extra=from_hf(official).extra) == (from_hf(official))
    assert to_hf(config) == official | others


WRONG = (None, True, 0, -1, 1, 3, 1.5, math.nan, "x", [], ["x"], [None], {}, {"x": 1})
WRONG += (10**400, -(10**400), 2**70, 1e308, "\ud800", "x" * 10**4, ["x" * 10**4], [[[]]] * 10**4)
WRONG += ({"x" * 10**4: [10**400]},)


def _never_another_error(keys):
    """Every key set to every wrong value is read or refused in a sentence."""
    for name in keys:
        for value in WRONG:
            try:
                config = from_hf(copy.deepcopy(keys | {name: value}))
                from_hf(to_hf(config))
            except InputError as error:
                assert "\n" not in str(error) and len(str(error)) < 600, (name, str(error)[:800])


def test_any_wrong_value_gets_a_sentence(official):
    _never_another_error(official)
    _never_another_error(to_hf(dataclasses.replace(get_config("nano"), layers=(FULL,))))
    for nested in ("rope_scaling", "quantization_config"):
        for name in official[nested]:
            for value in WRONG:
                with contextlib.suppress(InputError):
                    from_hf(official | {nested: official[nested] | {name: value}})


def test_any_wrong_value_in_transformers_form_gets_a_sentence(transformers_config):
    keys = _transformers(transformers_config).to_dict()
    _never_another_error(keys)
    rope = keys["rope_parameters"]
    for label in rope:
        for name in rope[label]:
            for value in WRONG:
                changed = rope | {label: rope[label] | {name: value}}
                with contextlib.suppress(InputError):
                    from_hf(keys | {"rope_parameters": changed})


def test_missing_keys_are_all_named(official):
    del official["head_dim"], official["compress_ratios"]
    with pytest.raises(InputError, match="head_dim, compress_ratios are missing"):
        from_hf(official)


@pytest.mark.parametrize(
    "content, message",
    [
        (None, "config.json: no such file"),
        ("{", "config.json: not valid JSON"),
        ("[]", "config.json: holds a JSON list"),
    ],
)
def test_unreadable_files(tmp_path, content, message):
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(InputError, match=message):
        read_config(tmp_path)


@pytest.fixture(scope="module")
def transformers_config():
    transformers = pytest.importorskip("transformers")
    if not hasattr(transformers, "DeepseekV4Config"):
        pytest.skip("this transformers has no DeepseekV4Config")
    return transformers.DeepseekV4Config


TYPES = ["sliding_attention", "compressed_sparse_attention", "heavily_compressed_attention"]


def _transformers(cls, **changes):
    fields = {
        "num_hidden_layers": 3,
        "layer_types": TYPES,
        "mlp_layer_types": ["moe", "hash_moe", "moe"],
        "compress_rates": dict(zip(TYPES[1:], (8, 32), strict=True)),
        "partial_rotary_factor": 0.25,
        "max_position_embeddings": 4096,
        "rope_parameters": {
            "rope_type": "yarn",
            "factor": 16.0,
            "original_max_position_embeddings": 256,
        },
    }
    return cls(**(fields | changes))


def test_transformers_form(transformers_config, tmp_path):
    _transformers(transformers_config, dtype="float32").save_pretrained(tmp_path)
    config = read_config(tmp_path)
    assert config.layers == (
        LayerSpec("window"),
        LayerSpec("csa", 8, overlap=True, routing="hash"),
        LayerSpec("hca", 32),
    )
    assert config.rope_scaling == Yarn(16.0, 256)
    assert config.qk_rope_head_dim == 128
    assert (config.mtp_layers, config.dtype, config.n_shared_experts) == ((), "float32", 1)
    again = from_hf(to_hf(config))
    assert dataclasses.replace(again, extra={}) == dataclasses.replace(config, extra={})
    assert to_hf(config)["transformers_version"]


def test_transformers_form_of_an_official_config(transformers_config, official):
    here = from_hf(official)
    there = from_hf(transformers_config(**official).to_dict())
    assert "rope_theta" in official["rope_scaling"]  # transformers writes into its argument
    assert from_hf(official) == here
    for field in dataclasses.fields(ModelConfig):
        if field.name not in ("mtp_layers", "extra"):
            assert getattr(there, field.name) == getattr(here, field.name), field.name


def test_transformers_without_yarn(transformers_config):
    keys = _transformers(transformers_config, rope_parameters=None).to_dict()
    config = from_hf(keys)
    assert config.rope_scaling is None
    assert config.compress_rope_theta == 160000.0


def _change_rope(label, **changes):
    def change(keys):
        keys["rope_parameters"][label] |= changes

    return change


@pytest.mark.parametrize(
    "change, message",
    [
        (_change_rope("compress", attention_factor=1.2), "attention_factor 1.2"),
        (_change_rope("compress", truncate=False), "truncate false"),
        (_change_rope("compress", rope_type="linear"), "rope_type = .linear., .* not implemented"),
        (_change_rope("compress", partial_rotary_factor=0.5), "compress rotates 256 channels"),
        (_change_rope("main", rope_type="yarn"), "main has rope_type 'yarn'"),
        (lambda keys: keys.update(mlp_bias=True), "mlp_bias is true"),
        (lambda keys: keys.update(compress_ratios=[0, 4, 128]), "has compress_ratios and"),
        (lambda keys: keys.update(num_hidden_layers=4), "layer_types is .* one entry per layer"),
        (lambda keys: keys.update(layer_types=["full_attention"] * 3), "'full_attention'"),
        (lambda keys: keys.update(rope_parameters={"rope_type": "default"}), "nested entries"),
        (lambda keys: keys.pop("compress_rates"), "keys compress_rates are missing"),
    ],
)
def test_transformers_refusals(transformers_config, change, message):
    keys = _transformers(transformers_config).to_dict()
    change(keys)
    with pytest.raises(InputError, match=message):
        from_hf(keys)
