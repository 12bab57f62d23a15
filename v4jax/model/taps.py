"""What a DSpark draft reads of the layers: the mean over the streams after each target layer.

The means are collected in the carry of the layers' scan, so that a scanned segment stacks none of
the layers that nobody reads. Arrays of taps are [L+1,B,T,D] for L target layers; the last is where
the other repeats of a target layer's place in a segment write.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array

from v4jax.config import ModelConfig, Segment
from v4jax.model.layers import Execution


def empty(config: ModelConfig, h_BTMD: Array) -> Array:
    """Taps of the streams' rows, nothing in them yet."""
    batch, length, _, d = h_BTMD.shape
    return jnp.zeros((len(config.dspark.target_layer_ids) + 1, batch, length, d), h_BTMD.dtype)


def slots(config: ModelConfig, segment: Segment) -> tuple[Array | None, ...]:
    """For each block of a segment's unit where its repeats write; None for one that never does."""
    targets = config.dspark.target_layer_ids
    found = []
    for place in range(segment.period):
        numbers = segment.layers(place)
        if not set(targets) & set(numbers):
            found.append(None)
            continue
        where = [targets.index(n) if n in targets else len(targets) for n in numbers]
        found.append(jnp.asarray(where if segment.repeats > 1 else where[0], jnp.int32))
    return tuple(found)


def write(taps_LBTD: Array, slot: Array, h_BTMD: Array, execution: Execution) -> Array:
    """The taps with the mean of a layer's streams, summed in float32 and rounded once."""
    mean_BTD = execution.round(h_BTMD.astype(jnp.float32).mean(axis=2))
    return jax.lax.dynamic_update_index_in_dim(taps_LBTD, mean_BTD, slot, axis=0)


def features(taps_LBTD: Array) -> Array:
    """The target layers' means next to each other, ascending: [B,T,L*D]."""
    return jnp.concatenate(list(taps_LBTD[:-1]), axis=-1)
