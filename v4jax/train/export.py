"""The trained model as a checkpoint that every command reads: DIR/model, the official layout."""

import shutil
from pathlib import Path

import tokenizers
from jax.experimental import multihost_utils

from v4jax.checkpoints import load as checkpoint
from v4jax.model.transformer import Transformer
from v4jax.sharding import processes
from v4jax.train import lora, quantized
from v4jax.train.config import TrainConfig
from v4jax.train.step import TrainState

FOLDER = "model"


def export(
    workdir: Path,
    config: TrainConfig,
    state: TrainState,
    tokenizer: tokenizers.Tokenizer | None = None,
) -> Path:
    """Writes DIR/model anew: quantised if the run ended so, with the state's scales, else float32.

    Of several processes the first writes, with the whole model in its memory.
    """
    fresh, out = workdir / f".{FOLDER}.new", workdir / FOLDER
    params = lora.merge(state.params, config.lora)
    if config.stages[-1].quantized:
        role_of = quantized.roles(Transformer(config.model, min_repeats=config.min_repeats))
        params = quantized.stored(params, role_of, state.scales)
    variables = {"params": params, "buffers": state.buffers}
    if processes.count() > 1:
        variables = multihost_utils.process_allgather(variables, tiled=True)
    if processes.index() > 0:
        return out
    shutil.rmtree(fresh, ignore_errors=True)
    checkpoint.save_official(fresh, config.model, variables)
    if tokenizer is not None:
        # Not its own `save`, which raises plain Exception where the disk is full.
        (fresh / "tokenizer.json").write_text(tokenizer.to_str(), encoding="utf-8")
    shutil.rmtree(out, ignore_errors=True)
    fresh.rename(out)
    return out
