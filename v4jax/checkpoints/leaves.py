"""Where a checkpoint's tensors lie among a model's variables.

A leaf is one array of the variables: a tensor, or those of a segment's repeats and of a layer's
experts in one stack. An FP8 or FP4 matrix is two leaves, its values and its scales, which become
one `quant.QTensor`.
"""

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from flax.traverse_util import unflatten_dict

from v4jax.checkpoints.fit import refuse_mixed
from v4jax.config import Segment
from v4jax.hf.tensors import TensorSpec
from v4jax.quant import QTensor
from v4jax.weights import variable_place

Path = tuple[str, ...]

_ALIGNMENT = 64  # jax takes host arrays over without a copy where they are aligned to this


@dataclasses.dataclass
class Leaf:
    """A leaf and the tensors that fill it; repeats: of its segment, None where it has none."""

    specs: list[TensorSpec]
    repeats: int | None

    def form(self) -> tuple[tuple[int, ...], np.dtype]:
        """Shape and dtype: float32 where one of the tensors is."""
        experts = [spec.expert for spec in self.specs if spec.expert is not None]
        stack = (max(experts) + 1,) if experts else ()
        leading = () if self.repeats is None else (self.repeats,)
        first = self.specs[0]
        wide = any(spec.loaded_dtype == np.float32 for spec in self.specs)
        dtype = np.dtype(np.float32) if wide else first.loaded_dtype
        return (*leading, *stack, *first.shape), dtype


def plan(
    items: Mapping[str, list[TensorSpec]], cut: tuple[Segment, ...]
) -> tuple[dict[Path, Leaf], dict[str, tuple[Path, int | None]]]:
    """All leaves by path; and for each tensor its leaf, and its index among the repeats."""
    leaves: dict[Path, Leaf] = {}
    places = {}
    repeats = {segment.name: segment.repeats for segment in cut}
    for item, specs in items.items():
        for spec in specs:
            path, repeat = variable_place(cut, item, spec.path)
            where = path_of(spec, path)
            places[spec.key] = (where, repeat)
            if where not in leaves:
                leaves[where] = Leaf([], None if repeat is None else repeats[path[1]])
            leaves[where].specs.append(spec)
    return leaves, places


def planned(
    name: str, items: Mapping[str, list[TensorSpec]], cut: tuple[Segment, ...]
) -> tuple[dict[Path, Leaf], dict[str, tuple[Path, int | None]]]:
    """As `plan`; refuses a leaf whose tensors differ in form. name: the checkpoint's."""
    leaves, places = plan(items, cut)
    refuse_mixed(
        {where: leaf.specs for where, leaf in leaves.items()},
        name,
        "load it with weights='bf16' (--weights=bf16), which expands what is quantised",
    )
    return leaves, places


def aligned(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """A new array of zeros that a CPU device takes over without a copy."""
    count = math.prod(shape) * dtype.itemsize
    # Large ones are pages that the system fills when they are first touched: no time, no memory.
    raw = np.zeros(count + _ALIGNMENT, np.uint8)
    offset = -raw.ctypes.data % _ALIGNMENT
    return raw[offset : offset + count].view(dtype).reshape(shape)


def path_of(spec: TensorSpec, path: Path) -> Path:
    """The path of a tensor's leaf where the weight lies at `path`."""
    return path if spec.part == "array" else (*path, spec.part)


def variables_of(leaves: Mapping[Path, Any]) -> dict[str, Any]:
    """The variables' tree out of leaves by path."""
    return _joined({"params": {}, "buffers": {}} | unflatten_dict(leaves))


def leaves_of(variables: Any, path: Path = ()) -> Iterator[tuple[Path, Any]]:
    """Each leaf of the variables with its path."""
    if isinstance(variables, Mapping):
        for name, child in variables.items():
            yield from leaves_of(child, (*path, name))
    elif isinstance(variables, QTensor):
        yield (*path, "values"), variables.values
        yield (*path, "scales"), variables.scales
    else:
        yield path, variables


def _joined(node):
    if not isinstance(node, dict):
        return node
    if node.keys() == {"values", "scales"}:
        return QTensor(node["values"], node["scales"])
    return {name: _joined(child) for name, child in node.items()}
