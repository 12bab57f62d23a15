"""The config.json that transformers writes, put into the words of the official one."""

from collections.abc import Mapping

from v4jax.errors import InputError
from v4jax.hf.keys import CONSTANT_KEYS, TRANSFORMERS_KEYS
from v4jax.hf.values import integer, named, number, short


def in_official_words(keys):
    """The official keys that say what a config.json of transformers says."""
    for name in ("compress_ratios", "num_hash_layers", "rope_scaling", "v4jax_layers"):
        if name in keys:
            raise InputError(
                f"has {name} and {min(TRANSFORMERS_KEYS & keys.keys())}; these are the official "
                "and the transformers way to say the same thing, so keep one"
            )
    missing = sorted(TRANSFORMERS_KEYS - {"partial_rotary_factor"} - keys.keys())
    if missing:
        raise InputError(f"the keys {', '.join(missing)} are missing; expected all of them")
    # transformers has no MTP block, and one shared expert whatever n_shared_experts says.
    ours = {"num_nextn_predict_layers": 0, "n_shared_experts": 1}
    ours["v4jax_layers"] = _transformers_layers(keys)
    ours["torch_dtype"] = keys.get("dtype") or keys.get("torch_dtype") or "float32"
    kept = {k: v for k, v in keys.items() if k not in TRANSFORMERS_KEYS and k != "dtype"}
    return CONSTANT_KEYS | kept | ours | _transformers_rope(keys)


def _transformers_layers(keys):
    attention = {
        "sliding_attention": ("window", 0),
        "compressed_sparse_attention": ("csa", None),
        "heavily_compressed_attention": ("hca", None),
    }
    routing = {"hash_moe": "hash", "moe": "score"}
    kinds, rates = keys["layer_types"], keys["compress_rates"]
    count = integer(keys, "num_hidden_layers")
    for name, allowed in (("layer_types", attention), ("mlp_layer_types", routing)):
        if not isinstance(keys[name], (list, tuple)) or len(keys[name]) != count:
            raise InputError(
                f"{name} is {short(keys[name])} and num_hidden_layers is {short(count)}; expected "
                "a list with one entry per layer"
            )
        bad = [kind for kind in keys[name] if not isinstance(kind, str) or kind not in allowed]
        if bad:
            raise InputError(f"{name} holds {named(bad[0])}; expected {', '.join(allowed)}")
    if not isinstance(rates, Mapping):
        raise InputError(f"compress_rates is {short(rates)}; expected an object")
    layers = []
    for kind, mlp in zip(kinds, keys["mlp_layer_types"], strict=True):
        name, ratio = attention[kind]
        layers.append(
            {
                "attention": name,
                "ratio": integer(rates, kind) if ratio is None else ratio,
                "overlap": name == "csa",
                "routing": routing[mlp],
            }
        )
    return layers


def _transformers_rope(keys):
    """The rotary keys; transformers computes with the two nested entries alone."""
    nested = keys["rope_parameters"]
    if not isinstance(nested, Mapping) or not {"main", "compress"} <= nested.keys():
        raise InputError("rope_parameters lacks the nested entries 'main' and 'compress'")
    main, compress = nested["main"], nested["compress"]
    for label, entry in (("main", main), ("compress", compress)):
        if not isinstance(entry, Mapping):
            raise InputError(f"rope_parameters.{label} is {short(entry)}; expected an object")
    rope_dim = _rotated(keys, main)
    for label, entry in (("main", main), ("compress", compress)):
        dim = _rotated(keys, entry)
        if dim != keys.get("qk_rope_head_dim", rope_dim):
            raise InputError(
                f"rope_parameters.{label} rotates {dim} channels (partial_rotary_factor "
                f"{entry['partial_rotary_factor']} of head_dim {keys['head_dim']}); expected "
                f"{short(keys.get('qk_rope_head_dim', rope_dim))}"
            )
    if main.get("rope_type") != "default":
        raise InputError(
            f"rope_parameters.main has rope_type {named(main.get('rope_type'))}; expected "
            "'default', as window layers are not scaled"
        )
    return {
        "qk_rope_head_dim": rope_dim,
        "rope_theta": main.get("rope_theta"),
        "compress_rope_theta": compress.get("rope_theta"),
        "rope_scaling": _transformers_yarn(compress),
    }


def _rotated(keys, entry):
    """How many channels an entry rotates."""
    part = number(entry, "partial_rotary_factor")
    if not 0 <= part <= 1:
        raise InputError(f"partial_rotary_factor is {part}; expected a part from 0 to 1")
    return int(integer(keys, "head_dim") * part)


def _transformers_yarn(compress):
    if compress.get("rope_type") == "default":
        return None
    # mscale only serves to derive attention_factor; without that key transformers would scale.
    if compress.get("attention_factor") != 1.0:
        raise InputError(
            f"rope_parameters.compress has attention_factor "
            f"{short(compress.get('attention_factor'))}; "
            "only 1.0 is implemented (V4 does not scale the rotation)"
        )
    if compress.get("truncate", True) is not True:
        raise InputError("rope_parameters.compress has truncate false; only true is implemented")
    dropped = "attention_factor mscale mscale_all_dim partial_rotary_factor rope_theta truncate"
    return {k: v for k, v in compress.items() if k not in dropped.split() and v is not None}
