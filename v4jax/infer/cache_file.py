"""A decode cache on disk: one safetensors file, written whole or not at all."""

import os
from pathlib import Path

import jax
import jax.numpy as jnp
from safetensors import safe_open
from safetensors.flax import save

from v4jax.errors import InputError
from v4jax.files.atomic import write_atomically
from v4jax.files.json_reader import quote
from v4jax.files.regular import check_regular
from v4jax.model.cache import Cache

FORMAT = "v4jax-cache-1"


def save_cache(path: str | os.PathLike, cache: Cache) -> None:
    """Writes the cache; a file of that name is replaced in one step.

    Raises:
      InputError: the file cannot be written.
    """
    path = Path(path)
    about = {
        "format": FORMAT,
        "max_length": str(cache.max_length),
        "max_rollback": str(cache.max_rollback),
    }
    data = save(_leaves(cache), metadata=about)
    try:
        write_atomically(path, data)
    except OSError as error:
        raise InputError(f"cannot write the cache to {path}: {error.strerror}") from error


def load_cache(path: str | os.PathLike, like: Cache) -> Cache:
    """Reads a cache that `save_cache` wrote.

    Args:
      path: the file.
      like: a cache of the same model, batch and lengths (from `init_cache`); its arrays are not
        read, so `jax.eval_shape` of one will do.

    Raises:
      InputError: no such file, a damaged one, or one of another model or size.
    """
    try:
        check_regular(path, "save_cache writes one")
        with safe_open(path, "flax") as file:
            about = file.metadata() or {}
            stored = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except Exception as error:  # the library and JAX raise whatever the damage leads to
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"cannot read a cache from {path}: {reason}") from error
    if about.get("format") != FORMAT:
        found = quote(about.get("format"))
        raise InputError(f"{path} is not a cache file: its format is {found}; expected {FORMAT!r}")
    for name in ("max_length", "max_rollback"):
        if about.get(name) != str(getattr(like, name)):
            raise InputError(
                f"{path} was made with {name} {str(about.get(name))[:60]} and this cache has "
                f"{getattr(like, name)}; make the cache with the same sizes"
            )
    _compare(path, stored, _leaves(like))
    names = list(_leaves(like))
    return jax.tree.unflatten(jax.tree.structure(like), [stored[name] for name in names])


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
