"""A model's variables as a source of tensors, so that saving is a conversion like any other."""

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np

from v4jax.checkpoints.fit import adapted, by_item, matched
from v4jax.checkpoints.leaves import leaves_of
from v4jax.checkpoints.source import Read
from v4jax.config import ModelConfig, segments
from v4jax.errors import InputError
from v4jax.files.safetensors import STORED_NAMES
from v4jax.hf.tensors import (
    TensorSpec,
    fp8_quantization,
    stored_form,
    tensor_table,
)
from v4jax.weights import variable_place

_FLOATS = ("float32", "bfloat16")


class VariablesSource:
    """Variables as `load` makes them, cut with any `min_repeats`; see `source`.

    Raises:
      InputError: variables that are not those of the config.
    """

    path = "the variables"
    fingerprint = ""
    config_text = None

    def __init__(self, config: ModelConfig, variables: Mapping[str, Any]):
        leaves = dict(leaves_of({k: v for k, v in variables.items() if k != "carried"}))
        self._carried = variables.get("carried", {})
        cut = _cut(config, variables["params"])
        self.config, form = _stored_config(config, leaves, cut)
        table = tensor_table(self.config, form=form)
        found, self._places = {}, {}
        repeats = {segment.name: segment.repeats for segment in cut}
        for spec in table:
            path, repeat = variable_place(cut, spec.item, spec.path)
            # MTP and draft blocks may be left in bf16 where the model is quantised.
            behind = spec.item.startswith(("mtp_", "draft_"))
            plain = spec.part == "array" or (behind and path in leaves)
            where = path if plain and spec.part != "scales" else (*path, spec.part)
            self._places[spec.key] = (where, repeat)
            if where in leaves:
                stack = () if spec.expert is None else (config.n_routed_experts,)
                stack = stack if repeat is None else (repeats[path[1]], *stack)
                found[spec.key] = _found(spec, leaves[where], stack)
        strange = leaves.keys() - {where for where, _ in self._places.values()}
        found |= {"/".join(path): _dtype_and_shape(leaves[path]) for path in sorted(strange)}
        specs, _, _ = adapted(table, found)
        specs = matched(specs, found, self.path)
        self.items = by_item([*specs, *_carried_specs(self._carried)])
        self._leaves = leaves

    @contextlib.contextmanager
    def open_item(self, name: str) -> Iterator[Read]:
        """Brings one block to the host."""
        host = {}
        specs = {spec.key: spec for spec in self.items[name]}
        for key in specs:
            where, repeat = self._places.get(key, (key, None))
            if where not in host:
                leaf = self._leaves[where] if key in self._places else self._carried[key]
                host[where] = _to_host(leaf, repeat)

        def read(key, out):
            where, _ = self._places.get(key, (key, None))
            expert = specs[key].expert
            out[...] = host[where] if expert is None else host[where][expert]

        yield read

    def close(self) -> None:
        """Nothing is kept open."""


def _cut(config, params):
    """The cut into segments whose names the variables have."""
    names = {name for name in params if name.startswith("layers_")}
    for min_repeats in range(2, len(config.layers) + 2):
        cut = segments(config.layers, min_repeats)
        if {segment.name for segment in cut} == names:
            return cut
    raise InputError(
        f"the variables have the segments {', '.join(sorted(names)) or 'none'}, which are no cut "
        f"of the config's {len(config.layers)} layers; pass the config that they were made with"
    )


def _stored_config(config, leaves, cut):
    """The config that tells how these variables are stored, and the form itself."""
    plain = np.dtype(_leaf(leaves, ("params", "embed", "weight")).dtype).name
    if plain not in _FLOATS:
        raise InputError(f"params/embed/weight is {plain}; expected float32 or bfloat16")
    block = ("params", *cut[0].path(0))
    matrix, expert = (*block, "attn", "wq_a", "weight"), (*block, "ffn", "experts", "w1")
    quantized = [(*path, "values") in leaves for path in (matrix, expert)]
    announced = config.quantization
    config = dataclasses.replace(config, dtype=plain, quantization=None, expert_dtype=None)
    if not any(quantized):
        return config, stored_form(config)
    if not all(quantized):
        raise InputError(
            "some matrices are quantised and others are not; expected FP8 or FP4 for attention and "
            "experts alike, or for neither"
        )
    packed = leaves[(*expert, "values")].dtype == np.uint8
    e8m0 = leaves[(*matrix, "scales")].dtype == np.uint8
    scale = "F8_E8M0" if e8m0 else "F32"
    default = fp8_quantization("ue8m0" if e8m0 else None)
    for quantization in (announced, default):
        if quantization is None:
            continue
        stored = dataclasses.replace(
            config, quantization=quantization, expert_dtype="fp4" if packed else None
        )
        if stored_form(stored, scale).scale == scale:
            break
    return stored, stored_form(stored, scale)


def _leaf(leaves, path):
    if path not in leaves:
        raise InputError(f"the variables have no {'/'.join(path)}; expected those of `load`")
    return leaves[path]


def _found(spec: TensorSpec, leaf, stack):
    """What a leaf would be on disk: dtype and shape of one tensor, if it is stacked as expected."""
    dtype, shape = _dtype_and_shape(leaf)
    if shape[: len(stack)] == stack:
        shape = shape[len(stack) :]
    names = {"values": {"U8": "I8"}, "scales": {"U8": "F8_E8M0"}}.get(spec.part, {})
    if spec.role == "table":
        names = {"I32": "I64"}
    elif spec.role == "control":
        names = {"BF16": "F32"}
    return names.get(dtype, dtype), shape


def _dtype_and_shape(leaf):
    return STORED_NAMES.get(np.dtype(leaf.dtype), str(leaf.dtype)), tuple(leaf.shape)


def _carried_specs(carried):
    for key, leaf in carried.items():
        dtype, shape = _dtype_and_shape(leaf)
        yield TensorSpec(
            key, shape, (dtype,), f"carried_{key.split('.')[1]}", ("carried", key), role="carried"
        )


def _to_host(leaf, repeat):
    """A leaf, or one repeat of it, as a numpy array; on a CPU without a copy."""
    on_cpu = not isinstance(leaf, jax.Array) or all(d.platform == "cpu" for d in leaf.devices())
    if repeat is None:
        return np.asarray(leaf)
    return np.asarray(leaf)[repeat] if on_cpu else np.asarray(leaf[repeat])
