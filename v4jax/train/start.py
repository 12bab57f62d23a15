"""Where a run begins: fresh variables with hash tables made for its text, or a checkpoint's."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from v4jax import quant
from v4jax.checkpoints import load as checkpoint
from v4jax.datasets.hash_table import hash_table
from v4jax.errors import InputError
from v4jax.model.transformer import Transformer
from v4jax.train import lora, quantized
from v4jax.train.config import TrainConfig, by_dotted_name
from v4jax.train.tree_paths import tree_path

# Fields that say how a checkpoint's files are stored, not what the model is.
_STORAGE = ("quantization", "expert_dtype", "extra", "dtype", "initializer_range")
_HASH_TABLE = "ffn/gate/tid2eid"


def variables(config: TrainConfig, model: Transformer, count_V: np.ndarray | None):
    """Float32 params and buffers.

    Args:
      count_V: how often each id occurs in the text, for the hash tables of a fresh model.
    """
    if config.start is not None:
        return _of_checkpoint(config, model)
    fresh = jax.jit(model.init)(jax.random.key(config.seed))
    if count_V is None:
        return fresh
    buffers = with_hash_tables(model, fresh["buffers"], count_V, config.seed)
    return fresh | {"buffers": buffers}


def scales(config: TrainConfig, model: Transformer) -> Any:
    """Scales of the checkpoint that the run starts from, for `TrainState.scales`.

    Those of the matrices that it holds in the form in which the run will store them, in a tree of
    their paths; None where there are none, or no stage is quantised.
    """
    if config.start is None or not any(stage.quantized for stage in config.stages):
        return None
    role_of = quantized.roles(model)
    types = ("uint8",) if config.model.expert_dtype == "fp4" else ("uint8", "float32")
    params = model.abstract_variables()["params"]
    shapes = jax.eval_shape(functools.partial(quantized.stored, role_of=role_of), params)
    shape_of = {
        tree_path(path): leaf.scales.shape
        for path, leaf in jax.tree_util.tree_leaves_with_path(shapes, is_leaf=quant.is_quantized)
        if quant.is_quantized(leaf)
    }

    def kept(path, found):
        same = found.shape == shape_of.get(tree_path(path)) and found.dtype.name in types
        return found if same else None

    found = checkpoint.load_scales(config.start, model.min_repeats)
    tree = jax.tree_util.tree_map_with_path(kept, found)
    return tree if jax.tree.leaves(tree) else None


def adapted(config: TrainConfig, params):
    """The params, with adapters if the run trains those."""
    if config.lora.rank is None:
        return params
    return lora.add(params, config.lora, jax.random.key(config.seed + 1))


def with_hash_tables(model: Transformer, buffers: Any, count_V: np.ndarray, seed: int) -> Any:
    """The buffers with every hash table even over a text's tokens, each layer's by its own seed."""
    experts, k = model.config.n_routed_experts, model.config.num_experts_per_tok
    tables_of = {}  # by the leaf's path, one per repeat of its unit
    for segment in model.segments():
        for place in range(segment.period):
            if model.config.layers[segment.start + place].routing == "hash":
                first = seed + segment.start + 1000 * place
                seeds = range(first, first + segment.repeats)
                path = "/".join((*segment.path(place), _HASH_TABLE))
                tables_of[path] = [hash_table(count_V, experts, k, own) for own in seeds]

    def table(path, leaf):
        tables = tables_of.get(tree_path(path))
        if tables is None:
            return leaf
        return jnp.asarray(np.stack(tables) if leaf.ndim == 3 else tables[0])

    return jax.tree_util.tree_map_with_path(table, buffers)


def _of_checkpoint(config, model):
    found, loaded = checkpoint.load_variables(config.start, "float32", model.min_repeats)
    begins = config.draft is not None and found.dspark is None
    if begins:  # with a draft that the checkpoint lacks, in place of what else is behind its layers
        draft = {name: getattr(config.model, name) for name in ("draft_layers", "dspark")}
        found = dataclasses.replace(found, mtp_layers=(), **draft)
    ours, theirs = by_dotted_name(config.model), by_dotted_name(found)
    changed = [
        f"{name} is {ours.get(name)!r} and in the checkpoint {theirs.get(name)!r}"
        for name in sorted(ours.keys() | theirs.keys())
        if name.split(".")[0] not in _STORAGE and ours.get(name) != theirs.get(name)
    ]
    if changed:
        raise InputError(
            f"{config.start}: is a checkpoint of another config: {'; '.join(changed)}; "
            "give model the same sizes"
        )
    variables = jax.tree.map(jnp.asarray, {k: loaded[k] for k in ("params", "buffers")})
    return with_fresh_draft(model, variables, config.seed) if begins else variables


def with_fresh_draft(model: Transformer, variables: Any, seed: int) -> Any:
    """A checkpoint's variables with a fresh draft, and without its MTP blocks."""

    def fresh(key):
        return {
            kind: {name: child for name, child in tree.items() if name.startswith("draft_")}
            for kind, tree in model.init(key).items()
        }

    made = jax.jit(fresh)(jax.random.key(seed))
    return {
        kind: {name: child for name, child in tree.items() if not name.startswith("mtp_")}
        | made[kind]
        for kind, tree in variables.items()
    }
