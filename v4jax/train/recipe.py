"""What a config and its stages mean: the model, the optimiser, the options of a step, its rates."""

import dataclasses

import numpy as np
import optax

from v4jax import weights
from v4jax.model.transformer import Transformer
from v4jax.train import draft_loss, lora, placement
from v4jax.train.config import Stage, TrainConfig
from v4jax.train.optimizer import make_optimizer
from v4jax.train.step import Rates, StepConfig

NOT_INDEXER = "^(?!.*/indexer/)"


def model(config: TrainConfig, stage: Stage) -> Transformer:
    """The model as a stage runs it, on the run's mesh."""
    of = config.model
    if stage.rope_scaling is not None:
        of = dataclasses.replace(of, rope_scaling=stage.rope_scaling)
    return Transformer(
        of,
        dtype="bfloat16" if stage.quantized else config.dtype,
        numerics="native" if stage.quantized else None,
        min_repeats=config.min_repeats,
        remat=config.remat,
        sharding=placement.layout_of(config.mesh),
    )


def optimizer(config: TrainConfig) -> optax.GradientTransformation:
    """The optimiser of all stages; with LoRA or a draft only those have a state."""
    options = config.optimizer
    declared = weights.parameters(config.model, config.min_repeats)
    if config.lora.rank is not None:
        options = dataclasses.replace(options, frozen=lora.ALL_ELSE)
        declared |= lora.declared(declared, config.lora)
    if config.draft is not None:
        options = dataclasses.replace(options, frozen=draft_loss.ALL_ELSE)
    return make_optimizer(options, declared)


def step_config(config: TrainConfig, stage: Stage) -> StepConfig:
    """What `train_step` is told of a stage."""
    weight = config.losses.indexer if stage.indexer is None else stage.indexer
    trained = stage.trained
    if trained is None and config.lora.rank is not None:
        trained = f"^{lora.SUBTREE}/"
    if trained is None and config.draft is not None:
        trained = draft_loss.TRAINED
    if trained is None and not weight:
        trained = NOT_INDEXER  # with weight 0 decay must not move the indexer either
    return StepConfig(
        losses=dataclasses.replace(config.losses, indexer=weight),
        trained=trained,
        dense=stage.attention == "dense",
        parts=stage.parts,
        clip=config.optimizer.clip,
        bias_step=config.bias_step if trained in (None, NOT_INDEXER) else 0.0,
        quantized=stage.quantized,
        lora=config.lora,
        draft=config.draft,
    )


def rates(config: TrainConfig, stage: Stage, step: int) -> Rates:
    """The rates of a step, counted from 0 over the whole run; host scalars."""
    rate = stage.learning_rate
    if rate is None:
        rate = config.schedule.rate(step, config.steps)
    decaying = config.schedule.decayed(step, config.steps) > 0
    mtp = config.mtp_decayed if decaying else config.losses.mtp
    return Rates(np.float32(rate), np.float32(mtp))


def ahead(config: TrainConfig) -> int:
    """How many tokens beyond its own a row's last target lies: 1, and 1 more per MTP block."""
    return 1 + (len(config.model.mtp_layers) if config.losses.mtp else 0)
