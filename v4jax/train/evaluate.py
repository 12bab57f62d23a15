"""Loss and accuracy on held-out documents or tasks."""

import math

import jax
import jax.numpy as jnp
import numpy as np

from v4jax.datasets.rows import TextRows, take
from v4jax.datasets.source import Source
from v4jax.errors import InputError
from v4jax.model.transformer import Transformer
from v4jax.sharding import processes
from v4jax.train import draft_loss, lora, placement, quantized, report
from v4jax.train.anchors import with_anchors
from v4jax.train.batch import Batch, make_batch
from v4jax.train.config import Stage, TrainConfig
from v4jax.train.cross_entropy import correct, cross_entropy
from v4jax.train.step import TrainState


def evaluator(config: TrainConfig, stage: Stage, model: Transformer, source: Source):
    """A function from a state to "held_out" (nats per target) and "held_out_accuracy" (0 to 1).

    Of a draft to "held_out" and, each behind "held_out_", the other figures of `draft_loss.means`.
    Of held-out text whose tokens all count alike also to "held_out_bits_per_byte".

    Always the same rows: of held-out documents where there are any; of synthetic data rows that no
    step takes; else rows of the training text.
    """
    rows, per_byte = _rows(config, stage, source), _targets_per_byte(source)
    role_of = quantized.roles(model) if stage.quantized else None

    def sums_of(state, batch):
        params = lora.merge(state.params, config.lora)
        if role_of is not None:  # of weights as they are stored, as training and the export have it
            params = quantized.straight_through(params, role_of, state.scales)
        variables = {"params": params, "buffers": state.buffers}
        if config.draft is not None:
            return _draft_sums(config.draft, stage, model, variables, batch)
        return sums(model, variables, batch, dense=stage.attention == "dense")

    program = None

    def evaluate(state: TrainState) -> dict[str, float]:
        nonlocal program
        batches = [placement.replicate(model.sharding, batch) for batch in rows]
        if program is None:
            report.say("compiles the evaluation")
            program = jax.jit(sums_of).lower(state, batches[0]).compile()
            processes.compiled()
        found = [jax.device_get(program(state, batch)) for batch in batches]
        total = jax.tree.map(lambda *parts: sum(parts), *found)
        if config.draft is not None:
            return _draft_line(config.draft, *total)
        nats, right, count = total
        line = {"held_out": float(nats / count), "held_out_accuracy": float(right / count)}
        if per_byte is not None:
            line["held_out_bits_per_byte"] = line["held_out"] * per_byte / math.log(2)
        return line

    return evaluate


def _draft_sums(draft, stage, model, variables, batch):
    dense = stage.attention == "dense"
    counts = draft_loss.count(batch, model.config.dspark.block_size, draft)
    return draft_loss.sums(model, variables, batch, draft, dense=dense), counts


def _draft_line(draft, sums, counts):
    with jax.transfer_guard("allow"):
        noted = jax.device_get(draft_loss.means(sums, counts, draft)[1])
    line = {f"held_out_{name}": float(value) for name, value in noted.items()}
    return {"held_out": line.pop("held_out_loss"), **line}


def check(config: TrainConfig, stage: Stage, source: Source) -> None:
    """Refuses an evaluation of a stage that has no target to take a mean over."""
    _rows(config, stage, source)


def sums(model: Transformer, variables: dict, batch: Batch, dense: bool = False) -> jax.Array:
    """Of a batch's next tokens [3]: nats, how many are the likeliest, how many count."""
    out = model.apply(
        variables,
        batch.tokens_BT,
        segment_ids=batch.segment_ids_BT,
        logits="normed",
        dense=dense,
    )
    target, weight = batch.targets_BTJ[..., 0].reshape(-1), batch.weights_BTJ[..., 0].reshape(-1)
    head = variables["params"]["head"]["weight"]
    args = out.normed.reshape(target.size, -1), head, target, weight
    return jnp.stack([cross_entropy(*args), correct(*args), jnp.sum(weight)])


def _targets_per_byte(source):
    """Targets per byte of held-out text, for bits per byte; None if unknown.

    Every token is a target, but for the beginning-of-sequence token of a document.
    """
    kept = source.held_out
    if kept is None or not source.held_out_bytes:  # of ids no bytes are known
        return None
    if np.count_nonzero(kept.counts != 1) > kept.starts.size:
        return None
    return (kept.ids.size - kept.starts.size) / source.held_out_bytes


def _rows(config, stage, source):
    """Batches of the evaluation, each of the stage's size: as the mesh divides it."""
    if not config.evaluate_every:
        return []
    of, length = source.rows, stage.length
    if source.held_out is not None:
        of = TextRows(source.held_out, config.data.seed)
        length = min(length, max(1, (source.held_out.ids.size - 1) // 2))
    if isinstance(of, TextRows) and of.tokens.ids.size < 2:
        raise _no_target(config)
    batches = []
    for first in range(0, config.evaluate_rows, stage.batch):
        rows = take(of, range(first, first + stage.batch), 1_000_000, length, 1)
        batch = make_batch(*rows, 1, config.data.packed)
        batch.weights_BTJ[config.evaluate_rows - first :] = 0  # rows beyond the last fill it up
        if config.draft is not None:
            numbers, most = range(first, first + stage.batch), config.draft.anchors
            batch = with_anchors(batch, numbers, 1_000_000, config.seed, most)
        batches.append(batch)
    if not any(batch.weights_BTJ.any() for batch in batches):
        raise _no_target(config)
    return batches


def _no_target(config):
    return InputError(
        f"none of the {config.evaluate_rows} held-out rows has a target; give more rows "
        "(evaluate_rows), hold out other documents (data.held_out), or leave evaluate_every out"
    )
