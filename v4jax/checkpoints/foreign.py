"""Tensors that are not a model's: buffers that lose nothing when left out, and other formats.

A checkpoint whose tensors are all wrong for one reason is refused with that reason.
"""

import re
from collections.abc import Callable, Mapping

from v4jax.config import ModelConfig
from v4jax.errors import InputError
from v4jax.files.json_reader import quote, word

Found = Mapping[str, tuple[str, tuple[int, ...]]]  # key -> dtype, shape

# Recomputed from the config by everybody who needs them, or bookkeeping of a trainer.
_BUFFERS = re.compile(
    r".*(^|[._])(\w*inv_freq|freqs_cis|cos_cached|sin_cached|position_ids|_extra_state)"
)
_ADAPTERS = ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector")
_OTHER_FORMATS = (
    "qweight", "qzeros", "absmax", "quant_map", "weight_packed", "weight_scale",
    "weight_zero_point",
    "weight_global_scale", "input_scale", "SCB",
)  # fmt: skip
_OFFICIAL = ("layers.", "mtp.", "embed.", "head.", "hc_head_")
_IN_LAYER = re.compile(r"layers\.(\d{1,9})\.(?:ffn\.experts\.(\d{1,9})\.)?", re.ASCII)


def without_buffers(found: Found, notes: list[str], file_key: Callable[[str], str]) -> Found:
    """The tensors without those that only other tools need; a note says which are left out."""
    buffers = [key for key in found if _BUFFERS.fullmatch(key)]
    if buffers:
        notes.append(
            f"{_count(buffers)} are left out: {word(file_key(buffers[0]))} is a buffer that "
            "other tools keep and that follows from the config"
        )
    return {key: found[key] for key in found if key not in set(buffers)} if buffers else found


def refuse_foreign(found: Found, where: str, file_key: Callable[[str], str]) -> None:
    """Raises where the tensors as a whole are something else than a model's.

    Raises:
      InputError: adapters, another quantised format, another model, or a model without its head.
    """
    for key in found:
        words = set(key.split("."))
        if words.intersection(_ADAPTERS):
            raise InputError(
                f"{where}: {word(file_key(key))}, {found[key][0]} {quote(found[key][1])}, is not a "
                "tensor of this model but of a LoRA adapter: merge the adapter into its base first "
                "(peft: merge_and_unload)"
            )
        if words.intersection(_OTHER_FORMATS):
            raise InputError(
                f"{where}: {word(file_key(key))} is of another quantised format; only the "
                "official FP8 and FP4 are read, so get the original or expand it to bf16 first"
            )
    if not any(key.startswith(_OFFICIAL) for key in found):
        first = next(iter(found), None)
        shown = "there is none" if first is None else f"the first is {word(file_key(first))}"
        raise InputError(
            f"{where}: no tensor is called layers.0... or model.layers.0...; {shown}. Expected "
            "the weights of a DeepSeek-V4 model"
        )
    if "head.weight" not in found and "embed.weight" in found:
        raise InputError(
            f"{where}: holds no output head (head.weight or lm_head.weight), so these are the "
            "weights of a base model, which predicts no token: save the whole model, in "
            "transformers DeepseekV4ForCausalLM and not its .model"
        )


def refuse_counts(config: ModelConfig, found: Found, where: str) -> None:
    """Raises where the config counts more than the files hold; before any of it is listed.

    Raises:
      InputError: more layers or experts than there are, or fewer experts; narrow hash tables.
    """
    layers, experts = 0, 0
    for key in found:
        if match := _IN_LAYER.match(key):
            layers = max(layers, int(match[1]) + 1)
            experts = max(experts, int(match[2] or -1) + 1)
    check = "check that config.json and weights are of the same checkpoint, and that all is there"
    if config.num_hidden_layers > layers:
        raise InputError(
            f"{where}: the tensors do not fit config.json: num_hidden_layers is "
            f"{config.num_hidden_layers} and the files hold {layers}; {check}"
        )
    if config.n_routed_experts != experts:
        raise InputError(
            f"{where}: the tensors do not fit config.json: n_routed_experts is "
            f"{config.n_routed_experts} and the files hold {experts} a layer; {check}"
        )
    for key, (dtype, shape) in found.items():
        width = shape[1] if key.endswith("gate.tid2eid") and len(shape) == 2 else None
        if width is not None and width < config.num_experts_per_tok:
            raise InputError(
                f"{where}: num_experts_per_tok is {config.num_experts_per_tok} and {word(key)} is "
                f"{dtype} {quote(shape)}, which names {width} experts per token; expected "
                f"num_experts_per_tok of at most {width}: fewer can be active, and no more"
            )


def _count(keys):
    return "1 tensor" if len(keys) == 1 else f"{len(keys)} tensors"
