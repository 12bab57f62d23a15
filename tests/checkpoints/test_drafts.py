"""Checkpoints with a DSpark draft: their tensors, and the way there and back."""

import dataclasses
import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.support.checkpoints import (
    change_config,
    files,
    is_quantized,
    rewrite,
    shapes,
    small_config,
    synthetic,
    tensors,
)
from tests.support.dspark_numpy import Reference
from v4jax import quant
from v4jax.checkpoints.convert import convert
from v4jax.checkpoints.load import load, load_variables, save_official
from v4jax.config import CSA, HCA, WINDOW, DSpark, ModelConfig, with_hash_routing
from v4jax.errors import InputError
from v4jax.hf.config import from_hf, to_hf
from v4jax.hf.tensors import tensor_table
from v4jax.model import draft
from v4jax.model.transformer import Transformer
from v4jax.named_configs import get_config

SIZES = DSpark(block_size=5, markov_rank=32, noise_token_id=500, target_layer_ids=(0, 1))


def draft_config(**changes):
    given = {"layers": (WINDOW, CSA), "mtp_layers": (), "draft_layers": 2, "dspark": SIZES}
    return small_config(**(given | changes))


def greedy(i, logits):
    return jnp.argmax(logits, axis=-1)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return synthetic(tmp_path_factory.mktemp("draft") / "model", draft_config())


@pytest.mark.parametrize(
    "name, sizes, draft_tensors",
    [
        ("flash", DSpark(), 4705),
        ("pro", DSpark(markov_rank=512, target_layer_ids=(58, 59, 60)), 7009),
    ],
)
def test_released_checkpoints_have_these_tensors(name, sizes, draft_tensors):
    config = dataclasses.replace(get_config(name), mtp_layers=(), draft_layers=3, dspark=sizes)
    table = {spec.key: spec for spec in tensor_table(config) if spec.key.startswith("mtp.")}
    assert len(table) == draft_tensors
    own = [key for key in table if ".experts." not in key]
    assert not [key for key in own if ".compressor." in key or ".tid2eid" in key]
    if name == "pro":
        return
    expected = {
        "mtp.0.main_proj.weight": ("F8_E4M3", (4096, 12288)),
        "mtp.0.main_proj.scale": ("F8_E8M0", (32, 96)),
        "mtp.0.main_norm.weight": ("BF16", (4096,)),
        "mtp.2.norm.weight": ("BF16", (4096,)),
        "mtp.2.hc_head_fn": ("F32", (4, 16384)),
        "mtp.2.hc_head_base": ("F32", (4,)),
        "mtp.2.hc_head_scale": ("F32", (1,)),
        "mtp.2.markov_head.markov_w1.weight": ("BF16", (129280, 256)),
        "mtp.2.markov_head.markov_w2.weight": ("BF16", (129280, 256)),
        "mtp.2.confidence_head.proj.weight": ("BF16", (1, 4352)),
        "mtp.1.attn.attn_sink": ("F32", (64,)),
        "mtp.1.hc_attn_fn": ("F32", (24, 16384)),
        "mtp.1.attn.wo_b.weight": ("F8_E4M3", (4096, 8192)),
        "mtp.1.ffn.gate.bias": ("F32", (256,)),
        "mtp.1.ffn.experts.255.w1.weight": ("I8", (2048, 2048)),
        "mtp.1.ffn.shared_experts.w1.weight": ("F8_E4M3", (2048, 4096)),
    }
    assert {key: (table[key].dtypes[0], table[key].shape) for key in expected} == expected


def test_the_keys_of_a_released_config():
    config = dataclasses.replace(ModelConfig(), mtp_layers=(), draft_layers=3, dspark=DSpark())
    keys = to_hf(config)
    assert keys["dspark_target_layer_ids"] == [40, 41, 42] and len(keys["compress_ratios"]) == 46
    assert (keys["dspark_block_size"], keys["dspark_markov_rank"]) == (5, 256)
    assert (keys["dspark_noise_token_id"], keys["num_nextn_predict_layers"]) == (128799, 1)
    assert from_hf(keys).dspark == DSpark() and to_hf(from_hf(keys)) == keys
    lacking = from_hf({k: v for k, v in keys.items() if k != "dspark_markov_rank"})
    assert (lacking.dspark, lacking.draft_layers) == (None, 3)
    assert lacking.extra["dspark_block_size"] == 5
    with pytest.raises(InputError, match='dspark_block_size is "5"; expected an integer'):
        from_hf(keys | {"dspark_block_size": "5"})
    with pytest.raises(InputError, match="dspark_target_layer_ids is 3; expected a list"):
        from_hf(keys | {"dspark_target_layer_ids": 3})


def test_the_way_there_and_back_is_byte_for_byte(checkpoint, tmp_path):
    convert(checkpoint, tmp_path / "orbax", "orbax", progress=False)
    assert (tmp_path / "orbax" / "items" / "draft_1").is_dir()
    assert not (tmp_path / "orbax" / "items" / "carried_0").exists()
    convert(tmp_path / "orbax", tmp_path / "back", "official", progress=False)
    convert(checkpoint, tmp_path / "copy", "official", progress=False)
    assert tensors(tmp_path / "back") == tensors(tmp_path / "copy") == tensors(checkpoint)
    assert files(tmp_path / "back") == files(tmp_path / "copy")
    config = (Path(checkpoint) / "config.json").read_bytes()
    assert (tmp_path / "back" / "config.json").read_bytes() == config


def test_what_is_loaded_runs_and_is_saved_as_it_was(checkpoint, tmp_path):
    model, variables = load(checkpoint)
    assert model.config.dspark == SIZES and "carried" not in variables
    assert shapes(variables) == shapes(model.abstract_variables())
    assert is_quantized(variables["params"]["draft_0"]["main_proj"]["weight"])
    save_official(tmp_path / "saved", model.config, variables)
    assert tensors(tmp_path / "saved") == tensors(checkpoint)
    assert load_variables(tmp_path / "saved")[0] == model.config


def test_a_loaded_draft_uses_every_tensor_and_scale(checkpoint):
    """FP8 and FP4 as stored, against numpy on the expanded weights."""
    model, variables = load(checkpoint, dtype="float32")
    _, expanded = load_variables(checkpoint, "float32")
    rng = np.random.default_rng(0)
    features = rng.standard_normal((1, 40, 2 * model.config.hidden_size), np.float32)
    anchor, seen = jnp.array([7], jnp.int32), []

    def pick(i, logits):
        seen.append(logits)
        return jnp.argmax(logits, axis=-1)

    @jax.jit
    def drafts(variables, features):
        state = draft.init_state(model, 1, "dspark")
        lengths = jnp.full((1,), 40, jnp.int32)
        state = draft.seed(model, variables, state, features, features[:, :, 0], lengths)
        return *draft.propose(model, variables, state, anchor, 5, pick), jnp.stack(seen, axis=1)

    found = drafts(variables, features)
    reference = Reference(model.config, jax.tree.map(np.asarray, expanded))
    wanted = reference.propose(features[0], 7, lambda logits: int(np.argmax(logits)))
    for ours, theirs in zip(found, (wanted[0], wanted[2], wanted[1]), strict=True):
        np.testing.assert_allclose(ours[0], theirs, rtol=1e-4, atol=1e-4)


def test_rings_round_as_native_kv_rows_do(checkpoint):
    model, variables = load(checkpoint, numerics="native")
    rng = np.random.default_rng(0)
    features = rng.standard_normal((1, 12, 2 * model.config.hidden_size)).astype(jnp.bfloat16)
    lengths, tokens = np.full(1, 12, np.int32), np.zeros((1, 12), np.int32)
    state = draft.init_state(model, 1, "dspark")
    seed = jax.jit(functools.partial(draft.seed, model))
    state = seed(variables, state, jnp.asarray(features), tokens, lengths)
    kept = model.config.head_dim - model.config.qk_rope_head_dim
    rows = state.rings[0, :, -12:, :kept]
    assert rows.dtype == jnp.bfloat16 and bool((rows != 0).any())
    assert bool((quant.fake_quant_e4m3(rows, 64) == rows).all())


@pytest.mark.slow
def test_a_loaded_draft_proposes_in_native_numerics(checkpoint):
    model, variables = load(checkpoint, numerics="native")
    tokens = np.arange(12, dtype=np.int32)[None]

    @jax.jit
    def drafts(variables, tokens):
        cache = model.init_cache(1, 32)
        out = model.apply(variables, tokens, cache=cache, aux=draft.aux("dspark"), logits="last")
        state = draft.init_state(model, 1, "dspark")
        lengths = jnp.full((1,), 12, jnp.int32)
        state = draft.seed(model, variables, state, draft.taps(out, "dspark"), tokens, lengths)
        anchor = jnp.argmax(out.logits[:, 0], axis=-1)
        return draft.propose(model, variables, state, anchor, 5, greedy)

    found, confidences = drafts(variables, tokens)
    assert found.shape == (1, 5) and bool(jnp.isfinite(confidences).all())


def test_expanded_weights_hold_the_draft_too(checkpoint):
    config, variables = load_variables(checkpoint, "float32")
    found = shapes(variables)
    assert found == shapes(Transformer(config).abstract_variables())
    assert not any(map(is_quantized, jax.tree.leaves(variables, is_leaf=is_quantized)))


def test_a_draft_with_a_tensor_missing_is_refused(tmp_path):
    source = synthetic(tmp_path / "model", draft_config())
    gone = "mtp.1.confidence_head.proj.weight"
    rewrite(source, lambda key, dtype, array: None if key == gone else (dtype, array))
    with pytest.raises(InputError, match=f"{gone} is missing"):
        load_variables(source)


def test_without_its_keys_a_draft_is_carried_along(tmp_path):
    source = synthetic(tmp_path / "model", draft_config())
    change_config(source, dspark_markov_rank=None)
    model, variables = load(source)
    assert (model.config.draft_layers, model.config.dspark) == (2, None)
    assert "mtp.1.confidence_head.proj.weight" in variables["carried"]
    with pytest.raises(InputError, match="draft is 'dspark' and the model has no DSpark draft"):
        draft.init_state(model, 1, "dspark")
    save_official(tmp_path / "saved", model.config, variables)
    assert tensors(tmp_path / "saved") == tensors(source)


def test_layers_of_every_kind_come_before_a_draft():
    layers = with_hash_routing((WINDOW,) + (CSA, HCA) * 2, 1)
    config = draft_config(layers=layers, dspark=dataclasses.replace(SIZES, target_layer_ids=(4,)))
    assert from_hf(to_hf(config)).dspark.target_layer_ids == (4,)
