"""transformers' DeepseekV4ForCausalLM, saved by save_pretrained and read by our converter."""

import jax
import numpy as np
import pytest
import torch
from transformers import DeepseekV4Config, DeepseekV4ForCausalLM

import v4jax
from tests.support.selection import first

WINDOW, CSA, HCA = (
    "sliding_attention",
    "compressed_sparse_attention",
    "heavily_compressed_attention",
)

BASE = {
    "vocab_size": 211,
    "hidden_size": 40,
    "num_attention_heads": 4,
    "head_dim": 24,
    "partial_rotary_factor": 8 / 24,
    "q_lora_rank": 20,
    "o_groups": 2,
    "o_lora_rank": 12,
    "n_routed_experts": 6,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 28,
    # Few heads would make entries tie at a score of 0 (all ReLUs closed), and torch.topk breaks
    # ties as it likes; with 16 heads a tie is a rarity.
    "index_n_heads": 16,
    "index_head_dim": 16,
    "index_topk": 9,
    "sliding_window": 16,
    "max_position_embeddings": 2048,
    "initializer_range": 0.08,
    "layers": [WINDOW, CSA, HCA],
    "hash": 1,
    "length": 131,
}

# Each varies other sizes; together all of them, with lengths that are multiples of nothing.
CASES = {
    "all_kinds": {},
    "windows": {"layers": [WINDOW, WINDOW], "sliding_window": 5, "length": 37, "hash": 0},
    "csa_only": {"layers": [CSA, CSA], "index_topk": 3, "length": 203, "hash": 2},
    "hca_only": {"layers": [HCA, HCA], "num_attention_heads": 6, "o_groups": 3, "length": 389},
    "wide_heads": {
        "head_dim": 64,
        "partial_rotary_factor": 0.5,
        "index_head_dim": 64,
        "q_lora_rank": 33,
        "length": 97,
    },
    "many_experts": {
        "n_routed_experts": 17,
        "num_experts_per_tok": 5,
        "moe_intermediate_size": 12,
        "routed_scaling_factor": 2.5,
        "swiglu_limit": 0.4,
    },
    "two_streams": {"hc_mult": 2, "hc_sinkhorn_iters": 3, "hidden_size": 52, "vocab_size": 97},
    "other_rates": {
        "compress_rates": {CSA: 4, HCA: 32},
        "index_head_dim": 32,
        "index_n_heads": 20,
        "o_lora_rank": 7,
        "length": 166,
    },
    "yarn": {
        "rope_parameters": {
            "rope_type": "yarn",
            "factor": 16.0,
            "original_max_position_embeddings": 64,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
        },
        "compress_rope_theta": 50000.0,
        "rope_theta": 5000.0,
        "length": 222,
    },
}


@pytest.fixture(scope="module")
def pair(request, tmp_path_factory):
    """The torch model and ours, from the same files, and a prompt."""
    sizes = BASE | CASES[request.param]
    layers, hashed, length = (sizes.pop(name) for name in ("layers", "hash", "length"))
    kinds = ["hash_moe"] * hashed + ["moe"] * (len(layers) - hashed)
    config = DeepseekV4Config(
        **sizes, num_hidden_layers=len(layers), layer_types=layers, mlp_layer_types=kinds
    )
    torch.manual_seed(len(request.param))
    theirs = DeepseekV4ForCausalLM(config).float().eval()
    randomize(theirs)
    folder = tmp_path_factory.mktemp(request.param)
    theirs.save_pretrained(folder)
    model, variables = v4jax.load(folder)
    tokens = np.random.default_rng(1).integers(0, config.vocab_size, (2, length))
    return theirs, model, variables, tokens


def randomize(model):
    """Moves what starts at 0 or 1, and fills the hash tables with distinct experts."""
    experts = model.config.n_routed_experts
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
        for name, buffer in model.named_buffers():
            if name.endswith("tid2eid"):
                rows = torch.rand(buffer.shape[0], experts).argsort(-1)[:, : buffer.shape[1]]
                buffer.copy_(rows)
            elif name.endswith("e_score_correction_bias"):
                buffer.copy_(torch.randn_like(buffer) * 0.1)


@pytest.mark.parametrize("pair", CASES, indirect=True)
def test_logits(pair):
    theirs, model, variables, tokens = pair
    with torch.no_grad():
        wanted = theirs(torch.tensor(tokens)).logits.numpy()
    ours = jax.jit(model.apply)(variables, tokens.astype(np.int32)).logits
    error = np.abs(np.asarray(ours) - wanted).max() / np.abs(wanted).max()
    assert error < 1e-4


# A window that 59 tokens fill often, HCA entries that they complete, frequencies of YaRN.
CACHED = ("windows", "other_rates", "yarn")


@pytest.mark.parametrize("pair", first(CACHED, CASES), indirect=True)
def test_greedy_generation_with_cache(pair):
    theirs, model, variables, tokens = pair
    prompt = tokens[:1, :35]
    with torch.no_grad():
        wanted = theirs.generate(
            torch.tensor(prompt), max_new_tokens=24, do_sample=False, use_cache=True,
            eos_token_id=None, pad_token_id=0,
        )  # fmt: skip
    ours = v4jax.generate(model, variables, prompt.tolist(), max_new_tokens=24)
    assert ours.tokens[0] == wanted[0, 35:].tolist()
