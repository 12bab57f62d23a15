"""Show a model's layers, parameters, bytes, KV cache and FLOPs; check a checkpoint.

The argument is a checkpoint's directory or the name of a config (`v4jax inspect flash`). For a
directory the headers of its files are read as well, and with --check every tensor: the exit status
is 1 where a tensor is missing, superfluous, of the wrong shape or type, holds a NaN, or is not what
the checksums of our Orbax format say.
"""

import collections
import dataclasses
import json
import os
from typing import Any

from absl import flags
from tqdm import tqdm

from v4jax import accounting
from v4jax.checkpoints.check import find_bad_values
from v4jax.checkpoints.source import CONFIG_NAME, JOURNAL_NAME, MANIFEST_NAME
from v4jax.cli.inspect_text import as_text
from v4jax.config import ModelConfig
from v4jax.errors import InputError
from v4jax.files.safetensors import INDEX_NAME, SINGLE_NAME, read_index
from v4jax.hf.config import read_config, to_hf
from v4jax.hf.tensors import TensorSpec, tensor_table
from v4jax.named_configs import config_names, get_config

FLAGS = flags.FLAGS

CONTEXTS = (4096, 32768, 131072, 1048576)
FOUND_SOMETHING = 1
PACKAGED = "nano"  # a config, and the checkpoint that comes with the package
WEIGHTS_NAMES = frozenset({INDEX_NAME, SINGLE_NAME, MANIFEST_NAME, JOURNAL_NAME})


def define_flags():
    """Declares the flags of this subcommand."""
    flags.DEFINE_integer("context", None, "Count FLOPs and cache at N tokens too", lower_bound=1)
    flags.DEFINE_bool("check", False, "Read every tensor of DIR and report what is wrong")
    flags.DEFINE_enum("format", "text", ["text", "json"], "json: one object on stdout")


def run(source: str) -> int:
    """Prints the report; the exit status."""
    if os.path.isdir(source) or (source == PACKAGED and FLAGS.check):
        config, report = _describe_directory(source)
    elif source in config_names():
        config, report = _describe_config(source, get_config(source))
    else:
        raise InputError(
            f"{source[:200]!r} is neither a directory nor a config; expected a checkpoint's "
            f"directory or one of {', '.join(config_names())}"
        )
    print(json.dumps(report, indent=2) if FLAGS.format == "json" else as_text(config, report))
    return FOUND_SOMETHING if report.get("findings") else 0


def _describe_config(name, config):
    if FLAGS.check:
        raise InputError(f"--check reads a checkpoint's tensors, and {name!r} has none")
    return config, describe(name, config, contexts(config, FLAGS.context), tensor_table(config))


def _describe_directory(path):
    from v4jax.checkpoints.load import locate, open_checkpoint  # imports JAX: a name does without

    directory = locate(path)
    if not os.path.isdir(directory):
        raise InputError(f"{directory}: no such directory; install v4jax with its data")
    files = os.listdir(directory)
    if CONFIG_NAME in files and not WEIGHTS_NAMES.intersection(files):
        # Only the config: there are no tensors to read, and what they would be is known.
        return _describe_config(path, read_config(directory))
    with open_checkpoint(directory) as source:
        table = [spec for specs in source.items.values() for spec in specs]
        report = describe(path, source.config, contexts(source.config, FLAGS.context), table)
        report["files"] = _count_files(directory)
        report["notes"] = list(source.notes)
        if FLAGS.check:
            report["findings"] = _check(source)
        return source.config, report


def _count_files(path):
    """How many files hold tensors; 0 where they are not safetensors files."""
    index = os.path.join(path, INDEX_NAME)
    if os.path.isfile(index):
        return len(set(read_index(index).values()))
    return int(os.path.isfile(os.path.join(path, SINGLE_NAME)))


def _check(source):
    total = sum(spec.nbytes for specs in source.items.values() for spec in specs)
    with tqdm(total=total, unit="B", unit_scale=True, desc="checking", disable=None) as bar:
        return find_bad_values(source, bar.update)


def contexts(config: ModelConfig, asked: int | None) -> list[int]:
    """The usual ones that the model can hold, its longest, and the one asked for."""
    longest = config.max_position_embeddings
    usual = [context for context in CONTEXTS if context <= longest] or [longest]
    return sorted({*usual, asked} - {None})


def describe(
    name: str, config: ModelConfig, contexts: list[int], table: list[TensorSpec]
) -> dict[str, Any]:
    """Everything that follows from a config and its tensors, ready for `json.dump`."""
    parameters = accounting.count_parameters(config, table)
    v32 = accounting.V32()
    return {
        "name": name,
        "parameters": {
            "total": parameters.total,
            "active": parameters.active,
            "mtp": list(parameters.mtp_blocks),
            "draft": list(parameters.draft_stages),
        },
        "layers": _describe_layers(config, parameters),
        "tensors": len(table),
        "bytes": sum(spec.nbytes for spec in table),
        "stored": _stored(table),
        "kv_bytes_per_token": accounting.kv_bytes_per_token(config),
        "v32_kv_bytes_per_token": v32.kv_bytes_per_token(),
        "window_bytes": accounting.window_bytes(config),
        "contexts": [_describe_context(config, v32, context) for context in contexts],
        "config": to_hf(config),
    }


def _stored(table):
    stored = collections.defaultdict(lambda: {"tensors": 0, "bytes": 0})
    for spec in table:
        stored[spec.dtypes[0]]["tensors"] += 1
        stored[spec.dtypes[0]]["bytes"] += spec.nbytes
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
    flops, v32_flops = sum(parts.values()), sum(v32.flops_per_token(context).values())
    growing = context * accounting.kv_bytes_per_token(config)
    return {
        "context": context,
        "flops": flops,
        "flops_parts": parts,
        "v32_flops": v32_flops,
        "flops_ratio": flops / v32_flops,
        "kv_bytes": growing + accounting.window_bytes(config),
        "v32_kv_bytes": context * v32.kv_bytes_per_token(),
    }
