"""Reads and writes config.json: the official form, and the one that transformers writes.

Every key is one of four things: a field of `ModelConfig`; a constant that must hold, because
nothing else is implemented; harmless, kept in `ModelConfig.extra` and written back; or unknown and
an error, since it may change the numbers. transformers' form is first put into official words, so
that one reader judges both.

What the official keys cannot say (full attention, a ratio other than 4 and 128, another overlap,
hash routing that is not the first few layers) goes through one key of ours, `v4jax_layers`: a list
with the fields of `LayerSpec` for each layer.
"""

import copy
import dataclasses
import os
from collections.abc import Mapping
from typing import Any

from v4jax.config import CSA, HCA, WINDOW, LayerSpec, ModelConfig, Yarn, with_hash_routing
from v4jax.errors import InputError
from v4jax.files.json_reader import parse_json
from v4jax.files.regular import read_regular
from v4jax.hf.draft import DRAFT_KEYS, DRAFT_PREFIX, read_draft, write_draft
from v4jax.hf.keys import (
    CONSTANT_KEYS,
    HARMLESS,
    IMPLEMENTED,
    IMPLEMENTED_QUANTIZATION,
    TRANSFORMERS_KEYS,
)
from v4jax.hf.limits import check_blocks, check_counts
from v4jax.hf.transformers import in_official_words
from v4jax.hf.values import integer, is_one_of, named, number, short, string

MAX_CONFIG = 4 << 20  # bytes; that of the largest released model has 4 KB
FIELDS = dataclasses.fields(ModelConfig)
INTEGERS = tuple(f.name for f in FIELDS if f.type is int and f.name != "draft_layers")
NUMBERS = tuple(f.name for f in FIELDS if f.type is float)
LAYER_KEYS = (
    "num_hidden_layers",
    "compress_ratios",
    "num_hash_layers",
    "num_nextn_predict_layers",
    "v4jax_layers",
)
# Written only when they are not None; an explicit null, and the "fp8" that some tools write for
# expert_dtype, which also says that nothing is FP4, are kept as they were found.
OPTIONAL = ("bos_token_id", "eos_token_id", "expert_dtype", "quantization_config", "rope_scaling")
FIELD_KEYS = frozenset(
    INTEGERS + NUMBERS + LAYER_KEYS + OPTIONAL + ("scoring_func", "index_topk", "torch_dtype")
)


def read_config(path: str | os.PathLike) -> ModelConfig:
    """Reads a config.json, official or as transformers writes it.

    Args:
      path: the file, or the directory that holds it.

    Raises:
      InputError: no such file, or as `from_hf`.
    """
    where = os.fspath(path)
    if os.path.isdir(where):
        where = os.path.join(where, "config.json")
    cure = "expected a config.json or a folder with one"
    return parse_config(read_regular(where, MAX_CONFIG, cure), where)


def parse_config(text: bytes, where: str) -> ModelConfig:
    """The config that the text of a config.json says; `where` names the file in errors."""
    keys = parse_json(text, where)
    if not isinstance(keys, dict):
        raise InputError(f"{where}: holds a JSON {type(keys).__name__}; expected an object")
    return from_hf(keys, where)


def from_hf(keys: Mapping[str, Any], where: str = "the config") -> ModelConfig:
    """The config that the content of a config.json says.

    Raises:
      InputError: a key is missing, unknown, of the wrong type, or says something that is not
        implemented; two keys contradict each other.
    """
    keys = dict(keys)
    try:
        check_counts(keys)
        if TRANSFORMERS_KEYS & keys.keys():
            keys = in_official_words(keys)
        return _from_official(keys)
    except InputError as error:
        raise InputError(f"{where}: {error}") from None


def to_hf(config: ModelConfig) -> dict[str, Any]:
    """The official config.json as a dict that `json.dump` takes."""
    keys = {name: getattr(config, name) for name in INTEGERS + NUMBERS}
    keys |= {"scoring_func": config.scoring_func, "index_topk": config.index_topk}
    keys |= _layer_keys(config) | write_draft(config.dspark)
    keys |= {name: value for name, value in _optional_keys(config).items() if value is not None}
    keys["dtype" if "dtype" in config.extra else "torch_dtype"] = config.dtype
    others = {
        name: value
        for name, value in (config.extra or CONSTANT_KEYS).items()
        if name not in keys and not (name.startswith(DRAFT_PREFIX) and not config.draft_layers)
    }
    return copy.deepcopy(others | keys)


def _from_official(keys):
    _check_keys(keys)
    _check_constants(keys)
    layers = _layers(keys)
    mtp_blocks, draft_layers = _blocks_after(keys, len(layers))
    dspark = read_draft(keys, draft_layers)
    fields = {name: integer(keys, name) for name in INTEGERS}
    fields |= {name: number(keys, name) for name in NUMBERS if name in keys}
    return ModelConfig(
        layers=layers,
        mtp_layers=(WINDOW,) * mtp_blocks,
        draft_layers=draft_layers,
        dspark=dspark,
        scoring_func=string(keys, "scoring_func"),
        index_topk=None if keys["index_topk"] is None else integer(keys, "index_topk"),
        rope_scaling=_yarn(keys),
        bos_token_id=_token_ids(keys, "bos_token_id"),
        eos_token_id=_token_ids(keys, "eos_token_id"),
        dtype=_dtype(keys),
        quantization=_quantization(keys.get("quantization_config")),
        expert_dtype=_expert_dtype(keys),
        extra=_extra(keys, draft_layers, DRAFT_KEYS if dspark else ()),
        **fields,
    )


def _check_keys(keys):
    for name, value in keys.items():
        known = name in FIELD_KEYS or name in IMPLEMENTED or name in HARMLESS
        if not known and not name.startswith(DRAFT_PREFIX):
            raise InputError(
                f"the key {named(name)} (= {short(value)}) is unknown and may change the model's "
                "numbers; remove it if it does not, otherwise this model is not supported"
            )
    required = [*INTEGERS, *NUMBERS, "num_hidden_layers", "scoring_func", "index_topk"]
    required.remove("initializer_range")  # nothing but a fresh model needs it
    if "v4jax_layers" not in keys:
        required += ["compress_ratios", "num_hash_layers"]
    missing = [name for name in required if name not in keys]
    if missing:
        raise InputError(f"the keys {', '.join(missing)} are missing; expected all of them")


def _check_constants(keys):
    for name, allowed in IMPLEMENTED.items():
        if name == "norm_topk_prob" and keys["scoring_func"] == "softmax":
            continue  # softmax weights are never renormalised, whatever it says
        if name in keys and not is_one_of(keys[name], allowed):
            raise InputError(
                f"{name} is {short(keys[name])}; only {allowed[0]!r} is implemented, so this "
                "model cannot be run exactly"
            )


def _layers(keys):
    count = integer(keys, "num_hidden_layers")
    ratios = keys.get("compress_ratios", ())
    if not isinstance(ratios, (list, tuple)):
        raise InputError(f"compress_ratios is {short(ratios)}; expected a list")
    if "v4jax_layers" in keys:
        layers = _own_layers(keys["v4jax_layers"])
        if ratios and list(ratios[: len(layers)]) != [_ratio(spec) for spec in layers]:
            raise InputError("compress_ratios and v4jax_layers contradict each other; drop one")
        if len(layers) != count:
            raise InputError(
                f"v4jax_layers has {len(layers)} entries and num_hidden_layers is {count}; "
                "expected one entry per layer"
            )
        return layers
    if len(ratios) < count:
        raise InputError(
            f"compress_ratios has {len(ratios)} entries and num_hidden_layers is {count}; expected "
            "one ratio per layer and then one for each MTP or draft block"
        )
    num_hash_layers = integer(keys, "num_hash_layers")
    if not 0 <= num_hash_layers <= count:
        raise InputError(
            f"num_hash_layers is {num_hash_layers}; expected 0 to {count} (all layers)"
        )
    layers = tuple(_official_layer(i, ratio) for i, ratio in enumerate(ratios[:count]))
    return with_hash_routing(layers, num_hash_layers)


def _official_layer(index, ratio):
    for layer in (WINDOW, CSA, HCA):
        if is_one_of(ratio, (layer.ratio,)):
            return layer
    raise InputError(
        f"compress_ratios[{index}] is {short(ratio)}; expected 0 (window), 4 (CSA) or 128 (HCA). "
        "For another ratio say what the layers are in 'v4jax_layers', for example "
        '[{"attention": "hca", "ratio": 64, "overlap": false, "routing": "score"}, ...]'
    )


def _own_layers(entries):
    types = {field.name: field.type for field in dataclasses.fields(LayerSpec)}
    if not isinstance(entries, (list, tuple)):
        raise InputError(f"v4jax_layers is {short(entries)}; expected a list, one entry per layer")
    for i, entry in enumerate(entries):
        if not isinstance(entry, Mapping) or not {"attention"} <= entry.keys() <= types.keys():
            raise InputError(
                f"v4jax_layers[{i}] is {short(entry)}; expected an object with 'attention' and "
                "optionally 'ratio', 'overlap' and 'routing'"
            )
        for name, value in entry.items():
            too_long = isinstance(value, str) and len(value) > 60
            if type(value) is not types[name] or too_long:
                raise InputError(
                    f"v4jax_layers[{i}] has {name} = {short(value)}; expected a value of type "
                    f"{types[name].__name__}"
                )
    return tuple(LayerSpec(**entry) for entry in entries)


def _blocks_after(keys, num_layers):
    """How many MTP blocks and how many DSpark draft blocks follow the layers.

    Checkpoints with draft blocks still say num_nextn_predict_layers = 1, so the entries of
    compress_ratios count.
    """
    claimed = keys.get("num_nextn_predict_layers")
    if claimed is not None:
        claimed = integer(keys, "num_nextn_predict_layers")
    if "compress_ratios" not in keys:
        return claimed or 0, 0
    tail = list(keys["compress_ratios"])[num_layers:]
    if any(ratio != 0 for ratio in tail):
        raise InputError(
            f"compress_ratios ends in {short(tail)} after the {num_layers} layers; MTP and draft "
            "blocks have a window only, so expected zeros"
        )
    check_blocks(len(tail), num_layers)
    drafts = any(name.startswith(DRAFT_PREFIX) and keys[name] for name in keys)
    if tail and (drafts or (len(tail) == 3 and claimed != 3)):
        return 0, len(tail)
    if claimed is None or claimed == len(tail):
        return len(tail), 0
    raise InputError(
        f"compress_ratios has {num_layers + len(tail)} entries, but num_hidden_layers is "
        f"{num_layers} and num_nextn_predict_layers is {claimed}; expected {num_layers + claimed}"
    )


def _layer_keys(config):
    layers = config.layers
    num_hash_layers = next(
        (i for i, layer in enumerate(layers) if layer.routing != "hash"), len(layers)
    )
    blocks = len(config.mtp_layers)
    if config.draft_layers:
        blocks = config.extra.get("num_nextn_predict_layers", 1)
    keys = {
        "num_hidden_layers": len(layers),
        "num_hash_layers": num_hash_layers,
        "num_nextn_predict_layers": blocks,
        "compress_ratios": [_ratio(layer) for layer in layers]
        + [0] * (len(config.mtp_layers) + config.draft_layers),
    }
    plain = _as_others_read(layers, num_hash_layers)
    if layers != plain:
        keys["v4jax_layers"] = [dataclasses.asdict(layer) for layer in layers]
    return keys


def _as_others_read(layers, num_hash_layers):
    """What another reader would take from compress_ratios and num_hash_layers."""
    kinds = {layer.ratio: layer for layer in (WINDOW, CSA, HCA)}
    plain = [kinds.get(_ratio(layer), WINDOW) for layer in layers]
    return with_hash_routing(plain, num_hash_layers)


def _ratio(layer):
    # No official ratio means full attention: other readers stop at -1 instead of misreading it.
    return -1 if layer.attention == "full" else layer.ratio


def _optional_keys(config):
    eos = config.eos_token_id
    yarn = config.rope_scaling
    return {
        "bos_token_id": config.bos_token_id,
        "eos_token_id": list(eos) if isinstance(eos, tuple) else eos,
        "expert_dtype": config.expert_dtype,
        "quantization_config": dict(config.quantization) if config.quantization else None,
        "rope_scaling": None if yarn is None else {"type": "yarn", **dataclasses.asdict(yarn)},
    }


def _extra(keys, draft_layers, draft_keys):
    fields = FIELD_KEYS.union(draft_keys)
    extra = {
        name: copy.deepcopy(value)
        for name, value in keys.items()
        if name not in fields or (name in OPTIONAL and value in (None, "fp8"))
    }
    if draft_layers and "num_nextn_predict_layers" in keys:
        extra["num_nextn_predict_layers"] = keys["num_nextn_predict_layers"]
    return extra


def _yarn(keys):
    scaling = keys.get("rope_scaling")
    if scaling is None:
        return None
    if not isinstance(scaling, Mapping):
        raise InputError(f"rope_scaling is {short(scaling)}; expected an object or null")
    names = [field.name for field in dataclasses.fields(Yarn)]
    # transformers adds to the dict that it is given, and says nothing new by it.
    allowed = {
        "type": ("yarn",),
        "rope_type": ("yarn",),
        "rope_theta": (keys["rope_theta"], keys["compress_rope_theta"]),
        "attention_factor": (1, 1.0),
    }
    for name, value in scaling.items():
        if name not in names and not is_one_of(value, allowed.get(name, ())):
            raise InputError(
                f"rope_scaling has {name[:60]} = {short(value)}, which is not implemented; "
                f"expected type yarn and {', '.join(names)}"
            )
    if "type" not in scaling and "rope_type" not in scaling:
        raise InputError("rope_scaling has no 'type'; expected 'yarn'")
    return _yarn_numbers(scaling, names)


def _yarn_numbers(scaling, names):
    for name in ("factor", "original_max_position_embeddings"):
        if name not in scaling:
            raise InputError(f"rope_scaling has no {name!r}; YaRN needs it")
    values = {name: number(scaling, name) for name in names if name in scaling}
    values["original_max_position_embeddings"] = integer(
        scaling, "original_max_position_embeddings"
    )
    bad = [name for name, value in values.items() if value <= 0]
    if bad:
        raise InputError(f"rope_scaling's {bad[0]} is {values[bad[0]]}; expected a positive number")
    return Yarn(**values)


def _quantization(quantization):
    if quantization is None:
        return None
    if not isinstance(quantization, Mapping):
        raise InputError(f"quantization_config is {short(quantization)}; expected an object")
    for name, allowed in IMPLEMENTED_QUANTIZATION.items():
        value = quantization.get(name)
        value = list(value) if isinstance(value, tuple) else value
        if not is_one_of(value, allowed):
            expected = " or ".join(repr(item) for item in allowed if item is not None)
            raise InputError(
                f"quantization_config's {name} is {short(value)}; expected {expected}. Only the "
                "official FP8 format is implemented: convert the checkpoint to it first"
            )
    unknown = (
        quantization.keys()
        - IMPLEMENTED_QUANTIZATION.keys()
        - {"expert_dtype", "modules_to_not_convert"}
    )
    if unknown:
        raise InputError(
            f"quantization_config has the unknown key {named(min(unknown))}; remove it if the "
            "tensors are stored as in the official checkpoints"
        )
    return {k: copy.deepcopy(v) for k, v in quantization.items() if k != "expert_dtype"}


def _dtype(keys):
    names = [name for name in ("torch_dtype", "dtype") if keys.get(name) is not None]
    values = {string(keys, name) for name in names}
    if len(values) > 1:
        raise InputError(f"torch_dtype and dtype are {short(sorted(values))}; keep the right one")
    return values.pop() if values else "bfloat16"


def _expert_dtype(keys):
    """transformers moves the key into quantization_config; both places count."""
    inner = (keys.get("quantization_config") or {}).get("expert_dtype")
    outer = keys.get("expert_dtype", inner)
    if inner is not None and inner != outer:
        raise InputError(
            f"expert_dtype is {named(outer)} and quantization_config's is {named(inner)}; they "
            "contradict each other, so drop the wrong one"
        )
    if not is_one_of(outer, ("fp4", "fp8", None)):
        raise InputError(f"expert_dtype is {short(outer)}; expected 'fp4', 'fp8' or null")
    if outer == "fp4" and keys.get("quantization_config") is None:
        raise InputError("expert_dtype is 'fp4' but there is no quantization_config; add it")
    return "fp4" if outer == "fp4" else None


def _token_ids(keys, name):
    value = keys.get(name)
    if isinstance(value, (list, tuple)) and name == "eos_token_id":
        return tuple(integer({name: item}, name) for item in value)
    return None if value is None else integer(keys, name)
