"""Quantisation-aware training: weights as a checkpoint would hold them, gradients straight through.

With a model of native numerics (which rounds activations, KV and the indexer) the forward pass is
the one that the exported checkpoint will compute: experts FP4, other matrices FP8, norms, tables
and compressors bf16, control tensors float32. The masters stay float32.
"""

from typing import Any

import jax
import jax.numpy as jnp

from v4jax import config, quant, weights
from v4jax.errors import InputError
from v4jax.model.transformer import Transformer


def roles(model: Transformer) -> dict[str, str]:
    """What each parameter is in the table of tensors: "expert", "matrix", "control", ..., by path.

    Raises:
      InputError: the config stores nothing in FP4 or FP8, or an expert's width is not in 32s.
    """
    if model.config.quantization is None or model.config.expert_dtype != "fp4":
        raise InputError(
            "quantisation-aware training needs a config that is stored quantised; set "
            "quantization and expert_dtype='fp4' as in configs/flash.py"
        )
    cut = config.segments(model.config.layers, model.min_repeats)
    found = {}
    for spec in weights.tensor_table(model.config):
        path, _ = weights.variable_place(cut, spec.item, spec.path)
        if path[0] == "params" and spec.role != "scale":
            found["/".join(path[1:])] = spec.role
    return found


def stored(params: Any, role_of: dict[str, str]) -> Any:
    """Params as the checkpoint holds them: `quant.QTensor`s, bf16 and float32."""

    def store(path, w):
        role = role_of["/".join(step.key for step in path)]
        if role == "expert":
            return quant.quantize_fp4(w)
        if role == "matrix":
            return quant.quantize_fp8(w)
        return w if role == "control" else quant.round_to(w, jnp.bfloat16)

    return jax.tree_util.tree_map_with_path(store, params)


def straight_through(params: Any, role_of: dict[str, str]) -> Any:
    """Float32 params with the values that the stored ones stand for; to gradients the identity."""

    def one(path, w):
        role = role_of["/".join(step.key for step in path)]
        return w if role == "control" else _rounded(w, role)

    return jax.tree_util.tree_map_with_path(one, params)


@jax.custom_vjp
def _passed(w, rounded):
    return rounded


_passed.defvjp(lambda w, rounded: (rounded, None), lambda _, g: (g, None))


def _rounded(w, role):
    fixed = jax.lax.stop_gradient(w)
    if role == "expert":
        return _passed(w, quant.quantize_fp4(fixed).dequantize())
    if role == "matrix":
        return _passed(w, quant.quantize_fp8(fixed).dequantize())
    return _passed(w, quant.round_to(fixed, jnp.bfloat16).astype(jnp.float32))
