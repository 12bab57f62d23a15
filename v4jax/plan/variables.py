"""A model's variables as shapes, in any stored form, without a checkpoint."""

import dataclasses
import math
from typing import Any

import jax
import numpy as np

from v4jax.checkpoints.fit import by_item
from v4jax.checkpoints.leaves import plan, variables_of
from v4jax.config import ModelConfig, segments
from v4jax.hf.tensors import expanded_config, stored_form, tensor_table


@dataclasses.dataclass(frozen=True)
class Leaf:
    """One array of the variables: where it is, its shape, type and logical axes."""

    path: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: np.dtype
    axes: tuple[str | None, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def stored_variables(config: ModelConfig, weights: str, min_repeats: int) -> dict[str, Any]:
    """The variables that `checkpoint.load(weights=weights)` makes, as `ShapeDtypeStruct`s.

    Args:
      weights: "stored" (FP8 and FP4 matrices as `QTensor`), "bf16" or "float32".
    """
    config = expanded_config(config, weights)
    items = by_item(tensor_table(config, form=stored_form(config)))
    planned, _ = plan(items, segments(config.layers, min_repeats))
    shapes = {path: jax.ShapeDtypeStruct(*leaf.form()) for path, leaf in planned.items()}
    return variables_of(shapes)


def leaves(variables: Any, axes: Any) -> list[Leaf]:
    """All arrays of the variables with their logical axes; a `QTensor` is two of them.

    Args:
      variables: arrays or shapes. axes: the same tree of PartitionSpecs of logical axis names.
    """
    if isinstance(variables, dict):
        return [
            dataclasses.replace(leaf, path=(name, *leaf.path))
            for name, child in variables.items()
            for leaf in leaves(child, axes[name])
        ]
    return [
        Leaf((), tuple(leaf.shape), np.dtype(leaf.dtype), padded(axes, leaf.ndim))
        for leaf in jax.tree.leaves(variables)
    ]


def padded(axes, ndim: int) -> tuple[str | None, ...]:
    """Logical axes with None for the dimensions that the spec leaves out."""
    return (*axes, *(None,) * (ndim - len(axes)))
