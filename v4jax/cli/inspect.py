"""Show a model's layers, parameters, bytes, KV cache and FLOPs; check a checkpoint.

The argument is a checkpoint's directory or the name of a config (`v4jax inspect flash`). For a
directory the headers of its files are read as well, and with --check every tensor: the exit status
is 1 where a tensor is missing, superfluous, of the wrong shape or type, or holds a NaN.
"""

import collections
import dataclasses
import json
import os

from absl import flags

from v4jax import accounting
from v4jax.cli.inspect_text import as_text
from v4jax.config import ModelConfig
from v4jax.errors import InputError
from v4jax.named_configs import config_names, get_config
from v4jax.weights import tensor_table

FLAGS = flags.FLAGS

CONTEXTS = (4096, 32768, 131072, 1048576)
FOUND_SOMETHING = 1


def define_flags():
    """Declares the flags of this subcommand."""
    flags.DEFINE_integer("context", None, "Count FLOPs and cache at N tokens too", lower_bound=1)
    flags.DEFINE_bool("check", False, "Read every tensor of DIR and report what is wrong")
    flags.DEFINE_enum("format", "text", ["text", "json"], "json: one object on stdout")


def run(source: str) -> int:
    """Prints the report; the exit status."""
    if not os.path.isdir(source) and source not in config_names():
        raise InputError(
            f"{source!r} is neither a directory nor a config; expected a checkpoint's directory or "
            f"one of {', '.join(config_names())}"
        )
    config = get_config(source)
    report = describe(source, config, contexts(config, FLAGS.context))
    print(json.dumps(report, indent=2) if FLAGS.format == "json" else as_text(config, report))
    return FOUND_SOMETHING if report.get("findings") else 0


def contexts(config: ModelConfig, asked: int | None) -> list[int]:
    """The usual ones that the model can hold, its longest, and the one asked for."""
    longest = config.max_position_embeddings
    usual = [context for context in CONTEXTS if context <= longest] or [longest]
    return sorted({*usual, asked} - {None})


def describe(name: str, config: ModelConfig, contexts: list[int]) -> dict:
    """Everything that follows from a config, ready for `json.dump`."""
    table = tensor_table(config)
    parameters = accounting.count_parameters(config, table)
    v32 = accounting.V32()
    return {
        "name": name,
        "parameters": {
            "total": parameters.total,
            "active": parameters.active,
            "mtp": list(parameters.mtp_blocks),
        },
        "layers": _describe_layers(config, parameters),
        "tensors": len(table),
        "expected_tensors": len(table),
        "stored": stored_bytes((spec.dtypes[0], spec.nbytes) for spec in table),
        "kv_bytes_per_token": accounting.kv_bytes_per_token(config),
        "v32_kv_bytes_per_token": v32.kv_bytes_per_token(),
        "window_bytes": accounting.window_bytes(config),
        "flops": [_describe_context(config, v32, context) for context in contexts],
        "config": config.to_hf(),
    }


def stored_bytes(tensors) -> dict[str, dict[str, int]]:
    """Numbers of tensors and bytes for each stored type, from (type, bytes) pairs."""
    stored = collections.defaultdict(lambda: {"tensors": 0, "bytes": 0})
    for dtype, nbytes in tensors:
        stored[dtype]["tensors"] += 1
        stored[dtype]["bytes"] += nbytes
    return dict(stored)


def _describe_layers(config, parameters):
    return [
        dataclasses.asdict(layer)
        | {
            "parameters": parameters.layers[i],
            "active_parameters": parameters.active_layers[i],
            "kv_bytes_per_token": accounting.layer_kv_bytes_per_token(config, layer),
        }
        for i, layer in enumerate(config.layers)
    ]


def _describe_context(config, v32, context):
    parts = accounting.flops_per_token(config, context)
    total, v32_total = sum(parts.values()), sum(v32.flops_per_token(context).values())
    return {
        "context": context,
        "total": total,
        "parts": parts,
        "v32_total": v32_total,
        "ratio": total / v32_total,
        "kv_bytes": context * accounting.kv_bytes_per_token(config)
        + accounting.window_bytes(config),
        "v32_kv_bytes": context * v32.kv_bytes_per_token(),
    }
