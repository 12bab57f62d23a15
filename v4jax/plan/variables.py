"""A model's variables as shapes, in any stored form, without a checkpoint."""

import dataclasses
import math
from typing import Any

import jax
import numpy as np

from v4jax.config import ModelConfig, segments
from v4jax.hf.tensors import expanded_config, stored_form, tensor_table
from v4jax.quant import QTensor
from v4jax.weights import variable_place


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
    cut = segments(config.layers, min_repeats)
    repeats = {segment.name: segment.repeats for segment in cut}
    tree: dict[str, Any] = {"params": {}, "buffers": {}}
    for spec in tensor_table(config, form=stored_form(config)):
        if spec.expert not in (None, 0):
            continue
        path, repeat = variable_place(cut, spec.item, spec.path)
        stack = () if spec.expert is None else (config.n_routed_experts,)
        stack = stack if repeat is None else (repeats[path[1]], *stack)
        leaf = jax.ShapeDtypeStruct((*stack, *spec.shape), _dtype(spec))
        _put(tree, path, spec.part, leaf)
    return _joined(tree)


def _dtype(spec):
    # As a checkpoint is loaded: tables of ids narrow, control tensors always in float32.
    narrow = {"table": np.dtype(np.int32), "control": np.dtype(np.float32)}
    return narrow.get(spec.role, spec.dtype)


def _put(tree, path, part, leaf):
    *groups, name = path if part == "array" else (*path, part)
    for group in groups:
        tree = tree.setdefault(group, {})
    tree[name] = leaf


def _joined(node):
    if not isinstance(node, dict):
        return node
    if node.keys() == {"values", "scales"}:
        return QTensor(node["values"], node["scales"])
    return {name: _joined(child) for name, child in node.items()}


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
