"""A decode cache on disk: one safetensors file, written whole or not at all.

It is bound to the model that filled it: its metadata has every config field that a cached number
depends on, the activations' type and rounding, and a fingerprint of the weights. A cache of another
model has the same shapes and would only give worse text.
"""

import dataclasses
import hashlib
import json
import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from safetensors import safe_open
from safetensors.flax import save

from v4jax.errors import InputError
from v4jax.files.atomic import write_atomically
from v4jax.files.json_reader import parse_json, quote
from v4jax.files.regular import check_regular
from v4jax.model.cache import Cache
from v4jax.model.transformer import Transformer

FORMAT = "v4jax-cache-2"
_UNBOUND = "v4jax-cache-1"  # said nothing of its model
# Fields that change no number of a cache: how files are, what is not run, where texts end.
_FREE = {
    "mtp_layers",
    "draft_layers",
    "dspark",
    "max_position_embeddings",
    "initializer_range",
    "bos_token_id",
    "eos_token_id",
    "dtype",
    "expert_dtype",
    "quantization",
    "extra",
}
# Numbers of each array that the fingerprint reads. All of them would be minutes for a large model.
_SAMPLES = 1024


def save_cache(
    path: str | os.PathLike, cache: Cache, model: Transformer, params: dict[str, Any]
) -> None:
    """Writes the cache; a file of that name is replaced in one step.

    Args:
      path: the file.
      cache: the decode state.
      model, params: those that filled it, as `v4jax.load` returns them; the file is bound to them.

    Raises:
      InputError: the file cannot be written.
    """
    path = Path(path)
    about = {
        "format": FORMAT,
        "max_length": str(cache.max_length),
        "max_rollback": str(cache.max_rollback),
        "store": cache.store,
        "model": json.dumps(identity(model)),
        "weights": fingerprint(params),
    }
    data = save(_leaves(cache), metadata=about)
    try:
        write_atomically(path, data)
    except OSError as error:
        raise InputError(f"cannot write the cache to {path}: {error.strerror}") from error


def load_cache(
    path: str | os.PathLike, like: Cache, model: Transformer, params: dict[str, Any]
) -> Cache:
    """Reads a cache that `save_cache` wrote.

    Args:
      path: the file.
      like: a cache of the same model, batch and lengths (from `init_cache`); its arrays are not
        read, so `jax.eval_shape` of one will do.
      model, params: those that are to continue from it, which must be those that filled it.

    Raises:
      InputError: no such file, a damaged one, one of another model, of other weights (or the same
        in another form, as `v4jax.load(weights=...)` makes them) or of another size, or one from
        before files named their model.
    """
    try:
        check_regular(path, "save_cache writes one")
        with safe_open(path, "flax") as file:
            about = file.metadata() or {}
            stored = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except Exception as error:  # the library and JAX raise whatever the damage leads to
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"cannot read a cache from {path}: {reason}") from error
    _check_format(path, about)
    _check_identity(path, about, identity(model))
    for name in ("max_length", "max_rollback"):
        made = str(about.get(name, "unknown"))[:60]
        if made != str(getattr(like, name)):
            raise InputError(
                f"{path} was made with {name} {made} and this cache has "
                f"{getattr(like, name)}; make the cache with the same sizes"
            )
    _check_store(path, about.get("store", "activations"), like.store)
    _compare(path, stored, _leaves(like))
    if about.get("weights") != fingerprint(params):
        raise InputError(
            f"{path} was filled by other weights than these, or by the same in another form; read "
            "the prompt again with this checkpoint"
        )
    names = list(_leaves(like))
    cache = jax.tree.unflatten(jax.tree.structure(like), [stored[name] for name in names])
    _check_counts(path, cache)
    return cache


def fingerprint(params: dict[str, Any]) -> str:
    """A digest of a model's variables: of every array its name, type, shape and 1,024 numbers.

    Small arrays are read whole. Weights that are only carried along do not count. Where arrays lie
    in many processes, all of these have to ask.
    """
    digest = hashlib.sha256()
    used = {name: tree for name, tree in params.items() if name != "carried"}
    for path, leaf in jax.tree_util.tree_flatten_with_path(used)[0]:
        about = f"{jax.tree_util.keystr(path)} {np.dtype(leaf.dtype).name} {tuple(leaf.shape)}\n"
        digest.update(about.encode())
        digest.update(_samples(leaf).tobytes())
    return digest.hexdigest()


def _samples(leaf):
    """Numbers spread evenly over an array, the first and the last among them."""

    def read(leaf):
        if leaf.size <= _SAMPLES:
            return leaf
        place = np.linspace(0, leaf.size - 1, _SAMPLES).astype(np.int64)
        # Not of a flat view, which is a copy of the whole on some devices.
        return leaf[np.unravel_index(place, leaf.shape)]

    if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
        whole = NamedSharding(leaf.sharding.mesh, PartitionSpec())
        return np.asarray(jax.jit(read, out_shardings=whole)(leaf))
    return np.asarray(read(leaf))


def identity(model):
    """What a cached number depends on beside weights and tokens, as JSON has it."""
    config = dataclasses.asdict(model.config)
    execution = model.execution()
    bound = {name: value for name, value in config.items() if name not in _FREE}
    bound |= {"dtype": execution.dtype, "numerics": "native" if execution.native else None}
    return json.loads(json.dumps(bound))


def _check_format(path, about):
    if about.get("format") == _UNBOUND:
        raise InputError(
            f"{path} is a cache file of an older version, which does not say what model filled it; "
            "read the prompt again and save a new one"
        )
    if about.get("format") != FORMAT:
        found = repr(about.get("format"))[:200]
        raise InputError(f"{path} is not a cache file: its format is {found}")


def _check_identity(path, about, expected):
    try:
        found = parse_json(about.get("model", ""), str(path), watched=frozenset(), nan=True)
    except InputError:
        found = None
    if not isinstance(found, dict):
        raise InputError(f"{path} does not say what model filled it; read the prompt again")
    for name in sorted(expected.keys() | found.keys()):
        if found.get(name) != expected.get(name):
            raise InputError(
                f"{path} was filled by a model with {name} {str(found.get(name))[:90]} and this "
                f"model has {str(expected.get(name))[:90]}; load it with the model that filled it"
            )


def _check_store(path, found, expected):
    """Files from before caches had a store say nothing of it: they hold activations."""
    if found != expected:
        raise InputError(
            f"{path} keeps its rows in the store {str(found)[:60]!r} and this cache in "
            f"{expected!r}; make the cache with init_cache(..., store={str(found)[:60]!r})"
        )


def _check_counts(path, cache):
    """A row may have as many tokens as the cache has room for, and take back what it has."""
    lengths, spare = np.asarray(cache.lengths), np.asarray(cache.spare)
    most = np.minimum(lengths, cache.max_rollback)
    for name, value, limit in (("lengths", lengths, cache.max_length), ("spare", spare, most)):
        if np.any((value < 0) | (value > limit)):
            raise InputError(
                f"{path} is damaged: {name} is {str(value.tolist())[:90]}; expected 0 to "
                f"{str(np.asarray(limit).tolist())[:90]}"
            )


def _leaves(cache):
    paths, _ = jax.tree_util.tree_flatten_with_path(cache)
    return {jax.tree_util.keystr(path): leaf for path, leaf in paths}


def _compare(path, stored, expected):
    if set(stored) != set(expected):
        odd = sorted(set(stored) ^ set(expected))[0]
        raise InputError(f"{path} is a cache of another model: they differ in {quote(odd)}")
    for name, leaf in expected.items():
        found = stored[name]
        if found.shape != leaf.shape or jnp.dtype(found.dtype) != jnp.dtype(leaf.dtype):
            raise InputError(
                f"{path}: {name} is {found.dtype}{list(found.shape)}; expected "
                f"{leaf.dtype}{list(leaf.shape)} of this model, batch and length"
            )
