"""How others name a checkpoint's tensors: where each official one stands in their files.

official      the released files
prefixed      official names behind "model."
transformers  what `save_pretrained` writes: near-official names behind "model."
modules       the same with save_original_format=False: PyTorch's module names, experts stacked
"""

import re
from collections.abc import Iterable
from typing import NamedTuple

from v4jax.errors import InputError

# Buffers that tools save although a config says all that they hold.
LEFT_OUT = re.compile(r"(^|\.)(inv_freq|freqs_cis|rotary_emb\..*|_extra_state|kv_cache|attn_mask)$")

_MODULES = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn.attn_sink": "self_attn.sinks",
    "attn.wq_a": "self_attn.q_a_proj",
    "attn.q_norm": "self_attn.q_a_norm",
    "attn.wq_b": "self_attn.q_b_proj",
    "attn.wkv": "self_attn.kv_proj",
    "attn.kv_norm": "self_attn.kv_norm",
    "attn.wo_a": "self_attn.o_a_proj",
    "attn.wo_b": "self_attn.o_b_proj",
    "attn.compressor.ape": "self_attn.compressor.position_bias",
    "attn.compressor.wkv": "self_attn.compressor.kv_proj",
    "attn.compressor.wgate": "self_attn.compressor.gate_proj",
    "attn.compressor.norm": "self_attn.compressor.kv_norm",
    "attn.indexer.wq_b": "self_attn.compressor.indexer.q_b_proj",
    "attn.indexer.weights_proj": "self_attn.compressor.indexer.scorer.weights_proj",
    "attn.indexer.compressor.ape": "self_attn.compressor.indexer.position_bias",
    "attn.indexer.compressor.wkv": "self_attn.compressor.indexer.kv_proj",
    "attn.indexer.compressor.wgate": "self_attn.compressor.indexer.gate_proj",
    "attn.indexer.compressor.norm": "self_attn.compressor.indexer.kv_norm",
    "ffn.gate": "mlp.gate",
    "ffn.gate.tid2eid": "mlp.gate.tid2eid",
    "ffn.gate.bias": "mlp.gate.e_score_correction_bias",
    "ffn.shared_experts.w1": "mlp.shared_experts.gate_proj",
    "ffn.shared_experts.w2": "mlp.shared_experts.down_proj",
    "ffn.shared_experts.w3": "mlp.shared_experts.up_proj",
}
# An expert's matrix: the stack that holds it, and which half of the stack's rows it is.
_EXPERTS = {"w1": ("gate_up_proj", 0), "w3": ("gate_up_proj", 1), "w2": ("down_proj", None)}


class Stored(NamedTuple):
    """An official tensor in a file: all of `key`, or one expert of it, or half of that's rows."""

    key: str
    expert: int | None = None
    half: int | None = None


def layout_of(keys: Iterable[str], where: str) -> str:
    """Which of the layouts the keys are in.

    Raises:
      InputError: a model without its output head, which makes no logits.
    """
    keys = set(keys)
    behind = any(key.startswith("model.") for key in keys)
    bare = {key.removeprefix("model.") for key in keys}
    modules = any(".self_attn." in key or ".mlp.experts." in key for key in bare)
    if not keys & {"head.weight", "lm_head.weight", "model.head.weight"} and (
        {"embed_tokens.weight", "embed.weight"} & bare
    ):
        raise InputError(
            f"{where}: holds no output head (head.weight), as a base model's save_pretrained "
            "leaves it out; save the whole DeepseekV4ForCausalLM"
        )
    if modules:
        return "modules"
    if not behind:
        return "official"
    return "transformers" if "embed_tokens.weight" in bare else "prefixed"


def stored(layout: str, key: str, keys: Iterable[str] = ()) -> Stored:
    """Where a layout's files hold the tensor that officially is called `key`; keys: the files'."""
    if layout == "official":
        return Stored(key)
    if layout == "prefixed":
        return Stored(key if key in keys else "model." + key)
    if layout == "transformers":
        return Stored(transformers_key(key))
    return _of_module(key)


def transformers_key(key: str) -> str:
    """The name under which transformers saves the tensor that officially is called `key`."""
    if key == "head.weight":
        return key
    if key == "embed.weight":
        return "model.embed_tokens.weight"
    if key.startswith("hc_head_"):
        return "model.hc_head.hc_" + key.removeprefix("hc_head_")
    return "model." + key.replace(".attn.kv_norm.", ".attn.norm.")


def _of_module(key):
    if key == "head.weight":
        return Stored("lm_head.weight")
    if not (match := re.match(r"(layers\.\d+\.)(.*)", key)):
        return Stored(transformers_key(key))
    stem, name = "model." + match[1], match[2]
    if expert := re.match(r"ffn\.experts\.(\d+)\.(w[123])\.weight$", name):
        stack, half = _EXPERTS[expert[2]]
        return Stored(f"{stem}mlp.experts.{stack}", int(expert[1]), half)
    if streams := re.match(r"hc_(attn|ffn)_(\w+)$", name):
        return Stored(f"{stem}{streams[1]}_hc.{streams[2]}")
    plain = name.removesuffix(".weight")
    return Stored(stem + _MODULES[plain] + name[len(plain) :])
