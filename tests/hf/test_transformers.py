"""What transformers saves, read into variables and held against the torch modules' tensors."""

import jax.numpy as jnp
import numpy as np
import pytest

from tests.support.checkpoints import shapes, transformers_model
from v4jax.checkpoints.load import load, load_variables
from v4jax.errors import InputError

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
    torch = pytest.importorskip("torch")
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
    transformers_model().save_pretrained(tmp_path)
    from safetensors.torch import load_file, save_file  # behind the skip without torch

    stored = load_file(tmp_path / "model.safetensors")
    del stored["model.layers.2.attn.norm.weight"]
    stored["model.layers.9.attn.norm.weight"] = stored["model.norm.weight"].clone()
    save_file(stored, tmp_path / "model.safetensors")
    with pytest.raises(InputError) as caught:
        load_variables(tmp_path)
    assert "2 tensors do not fit" in str(caught.value)
    assert "model.layers.2.attn.norm.weight is missing (expected F32 [16])" in str(caught.value)
    assert "model.layers.9.attn.norm.weight, F32 [32], is not a tensor" in str(caught.value)
