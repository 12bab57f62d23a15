"""What other tools call the tensors of a checkpoint, and where in their files each official one is.

transformers' modules have names of their own (`self_attn.q_a_proj`), and hold all experts of a
layer as one tensor; `save_pretrained` writes official names behind `model.`, those of the modules
with `save_original_format=False`, and neither prefix nor head for a base model. Wrappers put
`module.` or `_orig_mod.` before all of them. Every such name has one official meaning.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

from v4jax.errors import InputError
from v4jax.files.json_reader import word
from v4jax.files.regions import Region, shape_of
from v4jax.hf.tensors import transformers_key

# A module's name inside a block -> the official one, both without their last word.
_COMPRESSOR = {"kv_proj": "wkv", "gate_proj": "wgate", "kv_norm": "norm", "position_bias": "ape"}
_SHARED = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}
_STEMS = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.sinks": "attn.attn_sink",
    "self_attn.q_a_proj": "attn.wq_a",
    "self_attn.q_a_norm": "attn.q_norm",
    "self_attn.q_b_proj": "attn.wq_b",
    "self_attn.kv_proj": "attn.wkv",
    "self_attn.kv_norm": "attn.kv_norm",
    "self_attn.o_a_proj": "attn.wo_a",
    "self_attn.o_b_proj": "attn.wo_b",
    "self_attn.compressor.indexer.q_b_proj": "attn.indexer.wq_b",
    "self_attn.compressor.indexer.scorer.weights_proj": "attn.indexer.weights_proj",
    "mlp.gate": "ffn.gate",
    "mlp.gate.e_score_correction_bias": "ffn.gate.bias",
    "mlp.gate.tid2eid": "ffn.gate.tid2eid",
    "attn.norm": "attn.kv_norm",
}
_STEMS |= {f"self_attn.compressor.{k}": f"attn.compressor.{v}" for k, v in _COMPRESSOR.items()}
_STEMS |= {
    f"self_attn.compressor.indexer.{k}": f"attn.indexer.compressor.{v}"
    for k, v in _COMPRESSOR.items()
}
_STEMS |= {f"mlp.shared_experts.{k}": f"ffn.shared_experts.{v}" for k, v in _SHARED.items()}
_STEMS |= {
    f"{k}_hc.{part}": f"hc_{k}_{part}" for k in ("attn", "ffn") for part in ("fn", "base", "scale")
}
_OUTSIDE = {"embed_tokens.weight": "embed.weight", "lm_head.weight": "head.weight"}
_OUTSIDE |= {f"hc_head.hc_{part}": f"hc_head_{part}" for part in ("fn", "base", "scale")}
_MODULES = {official: module for module, official in _STEMS.items() if module != "attn.norm"}
_MODULES_OUTSIDE = {official: module for module, official in _OUTSIDE.items()}

_PREFIX = re.compile(r"(module\.|_orig_mod\.|model\.)*")
_BLOCK = re.compile(r"((?:layers|mtp)\.\d{1,9}\.)(.+)", re.ASCII | re.DOTALL)
_EXPERT = re.compile(r"(?:ffn|mlp)\.experts\.(\d{1,9})\.(w[123]|(?:gate|down|up)_proj)", re.ASCII)
_STACKED = re.compile(r"(?:ffn|mlp)\.experts\.(gate_up|down)_proj(_scale_inv)?")
# The scales of FP8 matrices, which transformers names after what they are multiplied with.
_ENDINGS = {".weight_scale_inv": ".scale", ".weight": ".weight", ".scale": ".scale"}


class Place(NamedTuple):
    """Where a tensor with an official name is.

    Attributes:
      key, dtype: of the tensor in the files that holds it.
      whole: that tensor's shape.
      region: the part of it; the first axis is dropped where it is one expert of many. None: all.
    """

    key: str
    dtype: str
    whole: tuple[int, ...]
    region: Region | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        return self.whole if self.region is None else shape_of(self.region)[1:]

    def part(self, region: Region | None) -> Region | None:
        """A region of the official tensor (None: all of it) as one of the tensor in the files."""
        if self.region is None:
            return region
        if region is None:
            return self.region
        expert, *rest = self.region
        moved = zip(rest, region, strict=True)
        return (expert, *((first + at, first + end) for (first, _), (at, end) in moved))


def official_places(
    found: Mapping[str, tuple[str, tuple[int, ...]]], where: str
) -> dict[str, Place]:
    """Official name -> place of every tensor; what has no official name keeps its own.

    Args:
      found: dtype and shape of each tensor of the files. where: their name, for errors.

    Raises:
      InputError: two tensors of one official name.
    """
    places = {}
    for key, (dtype, shape) in found.items():
        for name, region in _meanings(key, shape):
            if name in places:
                raise InputError(
                    f"{where}: {word(places[name].key)} and {word(key)} are the same tensor, "
                    f"{word(name)}; expected one of them: drop the other"
                )
            places[name] = Place(key, dtype, shape, region)
    return places


def official_name(key: str) -> str:
    """The official name of a tensor that is one in the files as well."""
    plain = key[_PREFIX.match(key).end() :]
    block = _BLOCK.fullmatch(plain)
    if block is None:
        return _OUTSIDE.get(plain, plain)
    stem, ending = _split(block[2])
    if expert := _EXPERT.fullmatch(stem):
        matrix = _SHARED.get(expert[2], expert[2])
        return f"{block[1]}ffn.experts.{expert[1]}.{matrix}{ending}"
    return block[1] + _STEMS.get(stem, stem) + ending


def names_for_errors(places: Mapping[str, Place]) -> Callable[[str], str]:
    """What the files call a tensor, or would call it if it were there."""
    modules = any(".self_attn." in place.key for place in places.values())
    prefixed = any(place.key.startswith("model.") for place in places.values())

    def name(key):
        if key in places:
            return places[key].key
        if modules:
            return "model." * (prefixed and key != "head.weight") + _module_name(key)
        return transformers_key(key) if prefixed else key

    return name


def _meanings(key, shape) -> Iterator[tuple[str, Region | None]]:
    """The official tensors in one tensor of the files, and where in it they are."""
    block = _BLOCK.fullmatch(key[_PREFIX.match(key).end() :])
    stacked = block and _STACKED.fullmatch(block[2])
    gate_up = stacked and stacked[1] == "gate_up"
    # A shape without bytes could claim any number of experts.
    if not stacked or len(shape) != 3 or 0 in shape or (gate_up and shape[1] % 2):
        yield official_name(key), None
        return
    ending = ".scale" if stacked[2] else ".weight"
    experts, rows, columns = shape
    half = rows // 2
    matrices = {"w1": (0, half), "w3": (half, rows)} if gate_up else {"w2": (0, rows)}
    for expert in range(experts):
        for matrix, part in matrices.items():
            name = f"{block[1]}ffn.experts.{expert}.{matrix}{ending}"
            yield name, ((expert, expert + 1), part, (0, columns))


def _split(name):
    for ending, official in _ENDINGS.items():
        if name.endswith(ending) and not name.endswith(("_hc.scale", "_hc.weight")):
            return name.removesuffix(ending), official
    return name, ""


def _module_name(key):
    block = _BLOCK.fullmatch(key)
    if block is None:
        return _MODULES_OUTSIDE.get(key, key)
    stem, ending = _split(block[2])
    if expert := _EXPERT.fullmatch(stem):
        stacked = "down_proj" if expert[2] == "w2" else "gate_up_proj"
        return f"{block[1]}mlp.experts.{stacked} (expert {expert[1]})"
    return block[1] + _MODULES.get(stem, stem) + ending
