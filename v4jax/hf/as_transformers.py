"""A config in the words of transformers' DeepseekV4Config, or the reason why it has none.

The other way is `hf/transformers`. MTP and draft blocks have no place there, and nothing is
quantised: they are left out of the words, as `checkpoints.copy_plan` leaves them out of the files.
"""

import copy
import dataclasses
import math
from collections.abc import Iterator
from typing import Any

from v4jax.config import CSA, HCA, ModelConfig
from v4jax.errors import InputError
from v4jax.hf.draft import DRAFT_PREFIX
from v4jax.hf.keys import CONSTANT_KEYS

_KINDS = {
    "window": "sliding_attention",
    "csa": "compressed_sparse_attention",
    "hca": "heavily_compressed_attention",
}
_ROUTINGS = {"hash": "hash_moe", "score": "moe"}
_SCORING = ("sqrtsoftplus", "sigmoid")
# Fields of ModelConfig that go by another name there, or by none.
_NO_KEYS = {
    "layers",
    "mtp_layers",
    "draft_layers",
    "dspark",
    "rope_scaling",
    "expert_dtype",
    "quantization",
    "extra",
}
# Keys found in a config.json that transformers would act upon, and in another model than this one.
_NOT_CARRIED = {
    "_attn_implementation",
    "attn_implementation",
    "expert_dtype",
    "num_nextn_predict_layers",
    "quantization_config",
    "rope_scaling",
    "torch_dtype",
}
# transformers takes no whole number for these.
_FRACTIONS = ("attention_dropout", "router_aux_loss_coef", "router_jitter_noise")


def to_transformers(config: ModelConfig, where: str = "the config") -> dict[str, Any]:
    """The config.json that transformers reads, as a dict that `json.dump` takes.

    Args:
      where: the checkpoint's name, for errors.

    Raises:
      InputError: a layer or a choice that DeepseekV4ForCausalLM does not have.
    """
    for problem in _unlike(config):
        raise InputError(
            f"{where}: transformers' DeepseekV4ForCausalLM cannot run this model: {problem}. Keep "
            "it in the official or Orbax form (--to=official)"
        )
    fields = {
        field.name: getattr(config, field.name)
        for field in dataclasses.fields(config)
        if field.name not in _NO_KEYS
    }
    fields["eos_token_id"] = _as_list(config.eos_token_id)
    fields["num_nextn_predict_layers"] = 0
    fields["architectures"] = CONSTANT_KEYS["architectures"]
    keys = _carried(config) | fields | _layers(config) | _rope(config)
    return copy.deepcopy(dict(sorted(keys.items())))


def _unlike(config) -> Iterator[str]:
    """What transformers' model has no way to be, a sentence each."""
    for number, layer in enumerate(config.layers):
        if layer.attention not in _KINDS:
            yield f"layer {number} has {layer.attention} attention; expected window, csa or hca"
        elif layer.compresses and layer.overlap != (layer.attention == "csa"):
            have = "with" if layer.overlap else "without"
            yield (
                f"layer {number} is {layer.attention} {have} overlap; expected csa with it and hca "
                "without"
            )
    for kind in ("csa", "hca"):
        ratios = _ratios(config, kind)
        if len(ratios) > 1:
            found = " and ".join(map(str, ratios[:4]))
            yield f"{kind} layers have the ratios {found}; expected one ratio for all of them"
    if config.scoring_func not in _SCORING:
        yield f"scoring_func is {config.scoring_func!r}; expected {' or '.join(_SCORING)}"
    if config.n_shared_experts != 1:
        yield f"n_shared_experts is {config.n_shared_experts}; expected 1"
    if config.hc_mult == 1:
        yield "hc_mult is 1, a plain residual; expected 2 streams or more"
    if config.index_topk is None:
        yield "index_topk is null, so that all entries are chosen; expected a number"
    if math.isinf(config.swiglu_limit):
        yield "swiglu_limit is infinite; expected a number"


def _carried(config):
    """The keys that change no number; a null says the same as no key."""
    return {
        name: float(value) if name in _FRACTIONS and type(value) is int else value
        for name, value in (config.extra or CONSTANT_KEYS).items()
        if name not in _NOT_CARRIED and not name.startswith(DRAFT_PREFIX) and value is not None
    }


def _ratios(config, kind):
    return sorted({layer.ratio for layer in config.layers if layer.attention == kind})


def _layers(config):
    rates = {"csa": CSA.ratio, "hca": HCA.ratio}
    return {
        "num_hidden_layers": len(config.layers),
        "layer_types": [_KINDS[layer.attention] for layer in config.layers],
        "mlp_layer_types": [_ROUTINGS[layer.routing] for layer in config.layers],
        "compress_rates": {
            _KINDS[kind]: (_ratios(config, kind) or [usual])[0] for kind, usual in rates.items()
        },
    }


def _rope(config):
    """Both entries of rope_parameters; window layers take `main`, compressing ones `compress`."""
    part = _rotated_part(config.qk_rope_head_dim, config.head_dim)
    main = {"rope_type": "default", "rope_theta": config.rope_theta, "partial_rotary_factor": part}
    compress = main | {"rope_theta": config.compress_rope_theta}
    if config.rope_scaling is not None:
        # Without an attention_factor of its own transformers would scale the rotation.
        yarn = {"rope_type": "yarn", "attention_factor": 1.0}
        compress |= yarn | dataclasses.asdict(config.rope_scaling)
    return {
        "partial_rotary_factor": part,
        "rope_parameters": {"main": main, "compress": compress},
    }


def _rotated_part(rotated, channels):
    """The number that, times the channels and rounded down, gives those that are rotated."""
    part = rotated / channels
    while int(channels * part) < rotated:
        part = math.nextafter(part, 1)
    return part


def _as_list(ids):
    return list(ids) if isinstance(ids, tuple) else ids
