"""Quantisation-aware training: weights as a checkpoint would hold them, gradients straight through.

With a model of native numerics (which rounds activations, KV and the indexer) the forward pass is
the one that the exported checkpoint will compute: experts FP4 or FP8, other matrices FP8, norms,
tables and compressors bf16, control tensors float32. The masters stay float32.

Scales: a run that starts from a checkpoint with weights in the form of its config has their scales
in its state; they follow the weights by the rule of `train.scales`, and forward pass and export
round with them. Everything else, such as a run from random weights, has no stored scales to keep
and gets fresh ones at every rounding.
"""

from typing import Any

import jax
import jax.numpy as jnp

from v4jax import quant, weights
from v4jax.errors import InputError
from v4jax.model.transformer import Transformer
from v4jax.train.scales import next_scales
from v4jax.train.tree_paths import by_path, tree_path

KINDS = {"expert": "fp4", "matrix": "fp8"}  # of the roles that have scales


def roles(model: Transformer) -> dict[str, str]:
    """How each parameter is stored: "expert" (FP4), "matrix" (FP8), "control", ..., by path.

    FP8 experts, those of base checkpoints, are matrices here.

    Raises:
      InputError: the config stores nothing in FP4 or FP8, or an expert's width is not in 32s.
    """
    if model.config.quantization is None:
        raise InputError(
            "quantisation-aware training needs a config that is stored quantised; set "
            "quantization and expert_dtype as in configs/flash.py or configs/flash_base.py"
        )
    expert = "expert" if model.config.expert_dtype == "fp4" else "matrix"
    declared = weights.parameters(model.config, model.min_repeats)
    return {
        path: expert if weight.role == "expert" else weight.role
        for path, weight in declared.items()
    }


def stored(params: Any, role_of: dict[str, str], scales: Any = None) -> Any:
    """Params as the checkpoint holds them: `quant.QTensor`s, bf16 and float32.

    Args:
      scales: a tree of part of the params' paths, as `TrainState.scales`; fresh ones for the rest.
    """
    scale_of = by_path(scales)

    def store(path, w):
        role = role_of[tree_path(path)]
        if role in KINDS:
            return _quantized(w, role, scale_of.get(tree_path(path)))
        return w if role == "control" else quant.round_to(w, jnp.bfloat16)

    return jax.tree_util.tree_map_with_path(store, params)


def straight_through(params: Any, role_of: dict[str, str], scales: Any = None) -> Any:
    """Float32 params with the values that `stored` stands for; to gradients the identity."""
    scale_of = by_path(scales)

    def one(path, w):
        role, fixed = role_of[tree_path(path)], jax.lax.stop_gradient(w)
        if role in KINDS:
            return _passed(w, _quantized(fixed, role, scale_of.get(tree_path(path))).dequantize())
        if role == "control":
            return w
        return _passed(w, quant.round_to(fixed, jnp.bfloat16).astype(jnp.float32))

    return jax.tree_util.tree_map_with_path(one, params)


def follow(params: Any, role_of: dict[str, str], scales: Any) -> Any:
    """The scales that params are stored with after `scales`; None stays None."""
    param_of = by_path(params)

    def one(path, before):
        name = tree_path(path)
        return next_scales(param_of[name], before, KINDS[role_of[name]])

    return jax.tree_util.tree_map_with_path(one, scales)


@jax.custom_vjp
def _passed(w, rounded):
    return rounded


_passed.defvjp(lambda w, rounded: (rounded, None), lambda _, g: (g, None))


def _quantized(w, role, scales):
    return quant.quantize_fp4(w, scales) if role == "expert" else quant.quantize_fp8(w, scales)
