"""A larger vocabulary for a model that is there: rows for ids that its checkpoint does not have."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from v4jax.config import ModelConfig
from v4jax.errors import InputError
from v4jax.quant import is_quantized

_BY_ID = ("embed", "head", "tid2eid")  # parts of a path below which the leading axis is the ids


def with_more_ids(
    config: ModelConfig, variables: Any, vocab_size: int, seed: int = 0
) -> tuple[ModelConfig, Any]:
    """The same model with more ids; logits of the old ids do not change, as long as no new one is
    in the text.

    A new id begins as the mean of the old ones, its embedding with noise of their spread, so that
    ids can be told apart while none of them is likelier than the others. Hash tables send it to the
    experts of an old id.

    Raises:
      InputError: fewer ids than there are.
    """
    new = vocab_size - config.vocab_size
    if new < 0:
        raise InputError(
            f"vocab_size is {vocab_size} and the model has {config.vocab_size} ids; expected no "
            "fewer"
        )
    rng = np.random.default_rng(seed)
    taken = rng.integers(config.vocab_size, size=new)

    def grown(path, leaf):
        names = [str(getattr(key, "key", key)) for key in path]
        if is_quantized(leaf) or not any(name in _BY_ID for name in names):
            return leaf
        return jnp.asarray(_with_rows(np.asarray(leaf), names[0] == "buffers", taken, rng, names))

    leaves = jax.tree_util.tree_map_with_path(grown, variables, is_leaf=is_quantized)
    return dataclasses.replace(config, vocab_size=vocab_size), leaves


def _with_rows(old, of_table, taken, rng, names):
    """An array with a row more on its axis of ids for each of `taken`."""
    if of_table:
        return np.concatenate([old, np.take(old, taken, axis=-2)], axis=-2)
    numbers = old.astype(np.float32)
    rows = np.broadcast_to(numbers.mean(axis=0), (taken.size, old.shape[1]))
    if "embed" in names:
        rows = rows + numbers.std(axis=0) * rng.standard_normal(rows.shape, np.float32)
    return np.concatenate([old, rows.astype(old.dtype)])
