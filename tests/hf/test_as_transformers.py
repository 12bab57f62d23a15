"""The config.json that we write for transformers: transformers reads it, and it says the same."""

import copy
import dataclasses
import json

import hypothesis
import hypothesis.strategies as st
import pytest

from tests.support.tiny import tiny_config
from v4jax.config import CSA, FULL, HCA, WINDOW, DSpark, LayerSpec, ModelConfig, Yarn
from v4jax.errors import InputError
from v4jax.hf.as_transformers import to_transformers
from v4jax.hf.config import from_hf, to_hf
from v4jax.named_configs import config_names, get_config

QUICK = hypothesis.settings(max_examples=80, deadline=None, database=None, derandomize=True)


@pytest.fixture(scope="module")
def theirs():
    """transformers' class; the tests that use it are skipped where there is none."""
    transformers = pytest.importorskip("transformers")
    if not hasattr(transformers, "DeepseekV4Config"):
        pytest.skip("this transformers has no DeepseekV4Config")
    return transformers.DeepseekV4Config


def without_blocks(config: ModelConfig) -> ModelConfig:
    """What of a config transformers' form can say."""
    left_out = {"mtp_layers": (), "draft_layers": 0, "dspark": None, "quantization": None}
    return dataclasses.replace(config, **left_out, expert_dtype=None, extra={})


def read(keys) -> ModelConfig:
    return dataclasses.replace(from_hf(json.loads(json.dumps(keys))), extra={})


@st.composite
def sizes(draw) -> dict:
    """Any model that transformers has too: kinds, ratios, hash layers, sizes, YaRN or none."""
    ratios = {"csa": draw(st.integers(2, 9)), "hca": draw(st.integers(2, 200))}
    kinds = st.tuples(st.sampled_from(["window", "csa", "hca"]), st.sampled_from(["hash", "score"]))
    layers = tuple(
        LayerSpec(kind, ratios.get(kind, 0), kind == "csa", routing)
        for kind, routing in draw(st.lists(kinds, min_size=1, max_size=6))
    )
    rotated = 2 * draw(st.integers(1, 8))
    positive = st.floats(1e-3, 1e6)
    yarn = st.builds(Yarn, positive, st.integers(1, 10**6), st.just(40.0), st.floats(0.5, 40))
    return dict(
        layers=layers,
        mtp_layers=draw(st.sampled_from([(), (WINDOW,), (WINDOW,) * 2])),
        head_dim=rotated + draw(st.integers(0, 600)),
        qk_rope_head_dim=rotated,
        rope_theta=draw(st.floats(1.5, 1e6)),
        compress_rope_theta=draw(st.floats(1.5, 1e6)),
        rope_scaling=draw(st.none() | yarn),
        index_topk=draw(st.integers(1, 600)),
        scoring_func=draw(st.sampled_from(["sqrtsoftplus", "sigmoid"])),
        swiglu_limit=draw(positive),
        hc_mult=draw(st.integers(2, 8)),
        bos_token_id=draw(st.none() | st.integers(0, 330)),
        eos_token_id=draw(st.none() | st.integers(0, 330) | st.tuples(st.integers(0, 330))),
        dtype=draw(st.sampled_from(["float32", "bfloat16"])),
    )


@QUICK
@hypothesis.given(sizes())
def test_the_same_config_comes_back(sizes):
    config = tiny_config(**sizes)
    assert read(to_transformers(config)) == without_blocks(config)


def test_transformers_reads_the_same(theirs):
    """Read and written again by transformers, which fills in what is missing, it says the same."""

    @QUICK
    @hypothesis.given(sizes())
    def check(sizes):
        config = tiny_config(**sizes)
        keys = json.loads(json.dumps(to_transformers(config)))
        assert read(theirs(**keys).to_dict()) == without_blocks(config)

    check()


@pytest.mark.parametrize("name", config_names())
def test_named_configs(theirs, name):
    config = get_config(name)
    keys = to_transformers(config)
    assert read(keys) == without_blocks(config)
    assert read(theirs(**json.loads(json.dumps(keys))).to_dict()) == without_blocks(config)


def test_keys_of_a_release(theirs):
    """What a config.json has beyond the fields is kept, unless transformers would act upon it."""
    official = to_hf(get_config("flash")) | {
        "transformers_version": "4.57.1",
        "pad_token_id": 2,
        "attn_implementation": "flash_attention_2",
        "_attn_implementation": "flash_attention_2",
        "temperature": 0.6,
        "attention_dropout": 0,
        "router_aux_loss_coef": 1,
        "output_router_logits": None,
    }
    config = from_hf(official)
    before = copy.deepcopy(config.extra)
    keys = to_transformers(config)
    assert config.extra == before
    assert keys["transformers_version"] == "4.57.1" and keys["pad_token_id"] == 2
    dropped = {"quantization_config", "expert_dtype", "rope_scaling", "torch_dtype"}
    dropped |= {"compress_ratios", "num_hash_layers", "attn_implementation", "_attn_implementation"}
    assert not (dropped | {"output_router_logits"}) & keys.keys()
    assert (keys["dtype"], keys["num_nextn_predict_layers"]) == ("bfloat16", 0)
    assert read(theirs(**keys).to_dict()) == without_blocks(config)
    # The official keys that are left are those of before.
    again = to_hf(from_hf(keys))
    changed = {name for name in official.keys() & again.keys() if official[name] != again[name]}
    assert changed == {"compress_ratios", "num_nextn_predict_layers"}


def test_a_draft_leaves_no_keys():
    draft = DSpark(block_size=2, markov_rank=4, noise_token_id=3, target_layer_ids=(0, 1))
    config = tiny_config(mtp_layers=(), draft_layers=3, dspark=draft)
    config = from_hf(to_hf(config) | {"dspark_note": "x"})
    keys = to_transformers(config)
    assert not any(name.startswith("dspark") for name in keys)
    assert read(keys) == without_blocks(config)


REFUSED = {
    "layer 1 has full attention; expected window, csa or hca": {"layers": (WINDOW, FULL)},
    "layer 0 is csa without overlap": {"layers": (LayerSpec("csa", 4),)},
    "layer 2 is hca with overlap": {"layers": (WINDOW, CSA, LayerSpec("hca", 8, overlap=True))},
    "csa layers have the ratios 4 and 8": {"layers": (CSA, LayerSpec("csa", 8, overlap=True))},
    "hca layers have the ratios 16 and 128": {"layers": (HCA, LayerSpec("hca", 16), HCA)},
    "scoring_func is 'softmax'; expected sqrtsoftplus or sigmoid": {"scoring_func": "softmax"},
    "n_shared_experts is 0; expected 1": {"n_shared_experts": 0},
    "n_shared_experts is 2; expected 1": {"n_shared_experts": 2},
    "hc_mult is 1, a plain residual": {"hc_mult": 1},
    "index_topk is null": {"index_topk": None},
    "swiglu_limit is infinite": {"swiglu_limit": float("inf")},
}


@pytest.mark.parametrize("sentence", REFUSED)
def test_what_transformers_cannot_run(sentence):
    with pytest.raises(InputError, match="DeepseekV4ForCausalLM cannot run this model") as caught:
        to_transformers(tiny_config(**REFUSED[sentence]), "here")
    text = str(caught.value)
    assert text.startswith("here: ") and sentence in text and "--to=official" in text
    assert "\n" not in text and len(text) < 300


@QUICK
@hypothesis.given(sizes(), st.sampled_from(list(REFUSED.values())), st.data())
def test_one_choice_too_many_is_refused_wherever_it_is(sizes, change, data):
    config = tiny_config(**sizes)
    if "layers" in change:
        place = data.draw(st.integers(0, len(config.layers)))
        layers = (*config.layers[:place], *change["layers"], *config.layers[place:])
        change = {"layers": layers}
    with pytest.raises(InputError, match="cannot run this model"):
        to_transformers(dataclasses.replace(config, **change))
