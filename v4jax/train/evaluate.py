"""Loss on held-out documents."""

import functools
import math

import jax
import numpy as np

from v4jax.datasets.rows import TextRows
from v4jax.datasets.source import Source
from v4jax.model.transformer import Transformer
from v4jax.train.batch import make_batch
from v4jax.train.config import Stage, TrainConfig
from v4jax.train.loss import LossWeights, count, loss
from v4jax.train.step import TrainState

ONLY_TEXT = LossWeights(mtp=0.0, balance=0.0, indexer=0.0)


def evaluator(config: TrainConfig, stage: Stage, model: Transformer, source: Source):
    """A function from a state to {"held_out": nats a token, "held_out_bits_per_byte": ...}.

    Always the same rows: of held-out documents where there are any; of synthetic data rows that no
    step takes; else rows of the training text.
    """
    rows, per_byte = _rows(config, stage, source), None
    if source.held_out is not None:
        per_byte = source.held_out.ids.size / source.held_out_bytes / math.log(2)

    @functools.partial(jax.jit, static_argnums=0)
    def nats(dense, state, batch):
        variables = {"params": state.params, "buffers": state.buffers}
        return loss(model, variables, batch, ONLY_TEXT, count(batch), dense=dense)[1]["loss"]

    def evaluate(state: TrainState) -> dict[str, float]:
        dense = stage.attention == "dense"
        found = [float(jax.device_get(nats(dense, state, jax.device_put(b)))) for b in rows]
        mean = float(np.mean(found))
        line = {"held_out": mean}
        return line | ({} if per_byte is None else {"held_out_bits_per_byte": mean * per_byte})

    return evaluate


def _rows(config, stage, source):
    """Batches of the evaluation, each of the stage's size."""
    if not config.evaluate_every:
        return []
    of, length = source.rows, stage.length
    if source.held_out is not None:
        of = TextRows(source.held_out, config.data.seed)
        length = min(length, max(1, (source.held_out.ids.size - 1) // 2))
    batches = []
    for first in range(0, config.evaluate_rows, stage.batch):
        numbers = range(first, min(first + stage.batch, config.evaluate_rows))
        taken = [of.row(n, 1_000_000, length, 1) for n in numbers]
        parts = (np.stack(part) for part in zip(*taken, strict=True))
        batches.append(make_batch(*parts, 1, config.data.packed))
    return batches
