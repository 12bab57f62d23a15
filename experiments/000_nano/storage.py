"""The forms in which a checkpoint stores weights, for training towards them and for writing them.

The table of tensors says what each weight is on disk: the experts packed FP4, the other matrices
FP8, tables, norms and compressors bf16, the rest float32.
"""

import os
import shutil
import signal
from pathlib import Path

import jax
import jax.numpy as jnp

from v4jax import checkpoint, config, quant, weights


def roles(model) -> dict[tuple[str, ...], str]:
    """What each leaf of params is in the table of tensors, by its path."""
    cut = config.segments(model.config.layers, model.min_repeats)
    found = {}
    for spec in weights.tensor_table(model.config):
        path, _ = weights.variable_place(cut, spec.item, spec.path)
        if path[0] == "params" and spec.role != "scale":
            found[path[1:]] = spec.role
    return found


def stored(params, role_of):
    """Params as the checkpoint holds them."""

    def store(path, w):
        role = role_of[tuple(step.key for step in path)]
        if role == "expert":
            return quant.quantize_fp4(w)
        if role == "matrix":
            return quant.quantize_fp8(w)
        return w if role == "control" else quant.round_to(w, jnp.bfloat16)

    return jax.tree_util.tree_map_with_path(store, params)


def rounded(params, role_of):
    """Float32 params as they come back from a checkpoint."""

    def expand(w):
        return w.dequantize() if isinstance(w, quant.QTensor) else w.astype(jnp.float32)

    is_leaf = lambda w: isinstance(w, quant.QTensor)  # noqa: E731
    return jax.tree.map(expand, stored(params, role_of), is_leaf=is_leaf)


def export(out: Path, model_config, variables, tokenizer) -> None:
    """Puts a whole checkpoint in the place of whatever is at `out`, or leaves that as it was."""
    fresh, old = out.with_name(out.name + ".new"), out.with_name(out.name + ".old")
    out.parent.mkdir(parents=True, exist_ok=True)
    for left_over in (fresh, old):
        shutil.rmtree(left_over, ignore_errors=True)
    try:
        checkpoint.save_official(fresh, model_config, variables)
        tokenizer.save(str(fresh / "tokenizer.json"), pretty=False)
        _replace(fresh, out, old)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def _replace(fresh, out, old):
    # Two renames, which an interrupt waits for: a folder cannot be renamed over a full one.
    waiting = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        if out.exists():
            os.rename(out, old)
        os.rename(fresh, out)
    finally:
        signal.signal(signal.SIGINT, waiting)
    shutil.rmtree(old, ignore_errors=True)
