"""One training step: loss, gradients, update, balance. A pure function of state and batch."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jaxtyping import Array

from v4jax.errors import InputError
from v4jax.model.transformer import Transformer
from v4jax.train import draft_loss, lora, quantized
from v4jax.train.batch import Batch
from v4jax.train.draft_loss import DraftLoss
from v4jax.train.lora import LoraConfig
from v4jax.train.loss import LossWeights, count, loss
from v4jax.train.optimizer import matches, moved, parameter_of
from v4jax.train.tree_paths import tree_path


@struct.dataclass
class TrainState:
    """All that a step changes. step counts those that are done.

    scales: those with which the params (merged, with LoRA) are stored, at some of their paths; None
    where they follow no checkpoint's (see `train.quantized`).
    """

    params: Any
    buffers: Any
    moments: Any
    step: Any
    scales: Any = None


@struct.dataclass
class Rates:
    """What changes from step to step without a new program."""

    learning_rate: Any
    mtp_weight: Any


@dataclasses.dataclass(frozen=True)
class StepConfig:
    """What is fixed for a stage.

    Attributes:
      losses: weights of the parts of the loss.
      trained: parameters that this stage changes, a regular expression searched in their paths;
        None for all. The others get no gradient, no decay and keep their moments.
      dense: CSA layers attend to every visible entry.
      parts: parts of the batch whose gradients are added up, one after the other.
      clip: largest global norm of the gradient.
      bias_step: how far a router's bias moves after a step.
      quantized: forward pass with weights as stored (the model should have native numerics).
      lora: how adapters that are among the params are merged.
      draft: the loss of a DSpark draft, instead of the model's own losses.
    """

    losses: LossWeights = LossWeights()
    trained: str | None = None
    dense: bool = False
    parts: int = 1
    clip: float | None = 1.0
    bias_step: float = 1e-3
    quantized: bool = False
    lora: LoraConfig = LoraConfig()
    draft: DraftLoss | None = None


def new_state(
    params, buffers, optimizer: optax.GradientTransformation, scales: Any = None
) -> TrainState:
    """The state before the first step."""
    return TrainState(params, buffers, optimizer.init(params), jnp.int32(0), scales)


def train_step(
    model: Transformer,
    optimizer: optax.GradientTransformation,
    config: StepConfig,
    state: TrainState,
    batch: Batch,
    rates: Rates,
) -> tuple[TrainState, dict[str, Array]]:
    """The state after a step on a batch, and scalars to note down."""
    gradients, noted = accumulate(model, config, state, batch, rates)
    norm = optax.tree.norm(gradients)
    if config.clip is not None:
        factor = jnp.minimum(1.0, config.clip / jnp.maximum(norm, 1e-30))
        gradients = jax.tree.map(lambda g: factor * g, gradients)
    directions, moments = optimizer.update(gradients, state.moments, state.params)
    new = jax.tree.map(lambda w, d: moved(w, -rates.learning_rate * d), state.params, directions)
    params = keep_untrained(config.trained, new, state.params)
    load = noted.pop("load", {})  # a draft's loss runs the model as it is
    noted |= {"grad_norm": norm, "learning_rate": rates.learning_rate}
    if load:
        noted["load_cv"] = _spread(load)
    state = TrainState(
        params=params,
        buffers=balanced(model, state.buffers, load, config.bias_step),
        moments=keep_untrained(config.trained, moments, state.moments),
        step=state.step + 1,
        scales=_scales_after(model, config, params, state.scales),
    )
    return state, noted


def _counted(counts, noted):
    """What the means of a step are over; the indexer's over queries of every ratio."""
    if isinstance(counts, draft_loss.Counts):
        return {"targets": jnp.sum(counts.slots_K), "blocks": counts.blocks}
    found = {"targets": counts.tokens_J[0]}
    if "mtp" in noted:
        found["mtp_targets"] = jnp.sum(counts.tokens_J[1:])
    if "indexer" in noted:
        found["indexer_queries"] = sum(counts.queries.values())
    return found


def _scales_after(model, config, params, before):
    """In stages that are not quantised too: the one after them may be."""
    if before is None:
        return None
    return quantized.follow(lora.merge(params, config.lora), quantized.roles(model), before)


def accumulate(model, config: StepConfig, state: TrainState, batch: Batch, rates: Rates):
    """Gradients like params (0 where nothing is trained) and figures, of a whole batch.

    The figures are the loss's parts and, by name, what their means are over.
    """
    if config.draft is not None:
        counts = draft_loss.count(batch, model.config.dspark.block_size, config.draft)
    else:
        counts = count(batch, model.config)
    one = _gradient_of(model, config, state, counts, rates.mtp_weight)
    if config.parts == 1:
        gradients, noted = one(batch)
    else:
        plus = _plus_in_parts if _gathers(model.sharding) else jnp.add
        gradients, noted = _sum_of_parts(one, batch, config.parts, plus)
    return gradients, noted | _counted(counts, noted)


def _sum_of_parts(one, batch, number, plus):
    """The function of every part of the batch, one after the other, added up."""
    parts = jax.tree.map(lambda x: _split(x, number), batch)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(one, _first(parts)))

    def add(total, part):
        return jax.tree.map(plus, total, one(part)), None

    return jax.lax.scan(add, zeros, parts)[0]


def _gathers(layout):
    """Whether shards keep parts of weights, and so of their gradients."""
    mesh = layout.mesh
    return mesh is not None and any(mesh.shape[axis] > 1 for axis in layout.strategy.gathered)


def _plus_in_parts(total, x):
    # XLA would take the sums over shards out of the loop, through this addition but not through a
    # barrier. Then each shard adds up whole gradients, of which it is to keep a part: 12 GB more
    # for Flash on 128 devices, and as much in the compiler, which begins with zeros.
    return total + jax.lax.optimization_barrier(x)


def _gradient_of(model, config, state, counts, mtp_weight):
    """A part's gradients and figures, as a function of the part."""
    role_of = quantized.roles(model) if config.quantized else None

    def objective(params, part):
        params = keep_untrained(config.trained, params, jax.lax.stop_gradient(params))
        params = lora.merge(params, config.lora)
        if role_of is not None:
            params = quantized.straight_through(params, role_of, state.scales)
        variables = {"params": params, "buffers": state.buffers}
        options = {"dense": config.dense}
        if config.draft is not None:
            return draft_loss.loss(model, variables, part, config.draft, counts, **options)
        options |= {"mtp_weight": mtp_weight}
        return loss(model, variables, part, config.losses, counts, **options)

    def one(part):
        gradients, noted = jax.grad(objective, has_aux=True)(state.params, part)
        return gradients, noted

    return one


def keep_untrained(trained: str | None, new: Any, old: Any) -> Any:
    """`new` where a leaf, of params or of the optimiser's state, is of a trained parameter."""
    if trained is None:
        return new

    def pick(path, after, before):
        name = parameter_of(path)
        return after if "/" not in name or matches(trained, name) else before

    return jax.tree_util.tree_map_with_path(pick, new, old)


def balanced(model: Transformer, buffers: Any, load: dict[int, Array], step: float) -> Any:
    """The buffers with each router's bias moved towards the experts that got too few tokens."""
    if not step:
        return buffers

    def move(path, leaf):
        names = tree_path(path)
        if not names.endswith("gate/bias"):
            return leaf
        rows = [load[layer] for layer in _layers_of(model, names)]
        load_E = jnp.stack(rows) if leaf.ndim == 2 else rows[0]
        return leaf + step * jnp.sign(jnp.mean(load_E, axis=-1, keepdims=True) - load_E)

    return jax.tree_util.tree_map_with_path(move, buffers)


def _layers_of(model, path):
    """The layers whose weights a leaf stacks; MTP blocks are numbered on from the last layer."""
    for segment in model.segments():
        for place in range(segment.period):
            if path.startswith("/".join(segment.path(place)) + "/"):
                return segment.layers(place)
    blocks = range(len(model.config.mtp_layers))
    return [len(model.config.layers) + k for k in blocks if path.startswith(f"mtp_{k}/")]


def _spread(load):
    """The coefficient of variation of the experts' load, averaged over layers."""
    found = [jnp.std(l_E) / jnp.maximum(jnp.mean(l_E), 1e-30) for l_E in load.values()]
    return sum(found) / len(found)


def _split(x, parts):
    if x.shape[0] % parts:
        raise InputError(
            f"a batch of {x.shape[0]} rows cannot be accumulated in {parts} equal parts; choose a "
            "number of parts that divides it"
        )
    return x.reshape(parts, -1, *x.shape[1:])


def _first(parts):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), parts)
