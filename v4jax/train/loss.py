"""What training minimises: next token, MTP, even experts, and the indexer's own loss.

A pure function of this shard's rows whose parts are sums over all shards, divided by counts over
all shards: the same value and gradients on any mesh and in any number of parts of the batch.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax.sharding import PartitionSpec
from jaxtyping import Array

from v4jax.config import ModelConfig
from v4jax.errors import InputError
from v4jax.model import sharded
from v4jax.model.context import document_starts
from v4jax.model.indexer_loss import SUMS
from v4jax.model.transformer import Transformer
from v4jax.sharding import collectives
from v4jax.sharding.collectives import total
from v4jax.train.batch import Batch
from v4jax.train.cross_entropy import cross_entropy


@dataclasses.dataclass(frozen=True)
class LossWeights:
    """Weights next to the next token's 1. A 0 switches that branch off altogether.

    Attributes:
      mtp: of the mean over MTP blocks; the report has 0.3, and 0.1 from the start of the decay.
      balance: of the sequence-wise balance loss of every score-routed layer.
      indexer: of the mean over CSA layers of the indexer's KL.
    """

    mtp: float = 0.3
    balance: float = 1e-4
    indexer: float = 1.0

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if not 0 <= value < float("inf"):
                raise InputError(f"loss weight {field.name} is {value}; expected 0 or more")


@struct.dataclass
class Counts:
    """What the sums are divided by: counts of a whole batch, all shards and parts together.

    tokens_J: weights of the targets, a column each. rows: rows of the batch. queries: for each
    ratio of a CSA layer the queries that see a compressed entry.
    """

    tokens_J: Any
    rows: Any
    queries: Any


def count(batch: Batch, config: ModelConfig) -> Counts:
    """The counts of a whole batch, in however many parts it is computed."""
    tokens_J = jnp.sum(jnp.asarray(batch.weights_BTJ), axis=(0, 1))
    rows, length = batch.tokens_BT.shape
    position = jnp.arange(length, dtype=jnp.int32)[None]
    if batch.segment_ids_BT is not None:
        position = position - document_starts(jnp.asarray(batch.segment_ids_BT))
    position = jnp.broadcast_to(position, (rows, length))
    ratios = {layer.ratio for layer in config.layers if layer.attention == "csa"}
    # A query sees an entry once the first block of its document has closed.
    queries = {m: jnp.sum(position >= m - 1, dtype=jnp.float32) for m in sorted(ratios)}
    return Counts(tokens_J, jnp.float32(rows), queries)


def _mean(total, number):
    """total / number; 0 where there is nothing to take the mean of."""
    return jnp.where(number > 0, total / jnp.where(number > 0, number, 1.0), 0.0)


def loss(
    model: Transformer,
    variables: dict[str, Any],
    batch: Batch,
    weights: LossWeights,
    counts: Counts,
    *,
    mtp_weight: Array | float | None = None,
    dense: bool = False,
) -> tuple[Array, dict[str, Any]]:
    """The loss to minimise and what it is made of; on the model's mesh, of global arrays.

    Args:
      batch: rows, or a part of them. counts: those of the whole batch.
      mtp_weight: instead of weights.mtp where it changes during a run; that must not be 0 then.
      dense: CSA layers attend to every visible entry (the stages before the sparse one).

    Returns:
      The loss, and by name: "loss" (nats per token), "mtp", "balance", "indexer" and its
      companions, and "load": {layer: [E] tokens an expert got}. Each is this part's share of the
      batch's figure, so that parts add up. A mean over no target, or no query, is 0.
    """
    batch = jax.tree.map(jnp.asarray, batch)
    further = jnp.float32(weights.mtp if mtp_weight is None else mtp_weight)
    layout = model.sharding
    if layout.mesh is None:
        return loss_local(
            model.apply, model.config, layout, weights, dense, variables, batch, counts, further
        )
    sharded.check(model.config, layout)
    layout.check_divides(dict(zip(("batch", "sequence"), batch.tokens_BT.shape, strict=True)))
    row, cell = layout.spec("batch"), layout.spec("batch", "sequence")
    ids = None if batch.segment_ids_BT is None else row
    apply = model.network().apply
    here = functools.partial(loss_local, apply, model.config, layout, weights, dense)
    specs = sharded.variable_specs(model)
    whole = PartitionSpec()
    return jax.shard_map(
        here,
        mesh=layout.mesh,
        in_specs=(specs, Batch(row, cell, cell, ids), whole, whole),
        out_specs=whole,
        check_vma=False,
    )(variables, batch, counts, further)


def loss_local(apply, config, layout, weights, dense, variables, batch, counts, mtp_weight):
    """`loss` on one shard's arrays: tokens of whole rows, targets of this shard's part of them.

    apply: the model's, or inside `shard_map` the network's.
    """
    out = apply(
        variables,
        batch.tokens_BT,
        segment_ids=batch.segment_ids_BT,
        logits="normed",
        mtp=bool(weights.mtp),
        dense=dense,
        aux=("router_load", "indexer_loss") if weights.indexer else ("router_load",),
    )
    head = collectives.gather(variables["params"]["head"]["weight"], layout.gathered("embed"), 1)
    nats = [
        _mean(_nats(y_BTD, head, batch, column, layout), counts.tokens_J[column])
        for column, y_BTD in enumerate((out.normed, *out.mtp_normed))
    ]
    balance, load = _balance(config, out.aux["router_load"], counts, layout)
    objective = nats[0] + weights.balance * balance
    noted = {"loss": nats[0], "balance": balance, "load": load}
    if nats[1:]:
        noted["mtp"] = sum(nats[1:]) / len(nats[1:])
        objective += mtp_weight * noted["mtp"]
    if "indexer_loss" in out.aux:
        noted |= _indexer(config, out.aux["indexer_loss"], counts, layout, dense)
        objective += weights.indexer * noted["indexer"]
    return objective, noted


def _batch_axes(layout):
    return layout.axes("batch") + layout.axes("sequence")


def _nats(y_BTD, head, batch, column, layout):
    """The sum over all targets of a column. An MTP block has fewer states than the row tokens."""
    length, width = y_BTD.shape[1:]
    target = batch.targets_BTJ[:, :length, column].reshape(-1)
    weight = batch.weights_BTJ[:, :length, column].reshape(-1)
    nats = cross_entropy(y_BTD.reshape(-1, width), head, target, weight, layout.axes("vocab"))
    return total(nats, _batch_axes(layout))


def _balance(config, loads, counts, layout):
    """sum over score-routed layers of the mean over rows of sum_e f_e P_e; each layer's load.

    f_e = E count_e / (K T), P_e = mean over tokens of s_e / sum s, both of one sequence.
    """
    experts, k = config.n_routed_experts, config.num_experts_per_tok
    balance, load = jnp.float32(0), {}
    for layer, sums_B2E in loads.items():
        sums = total(sums_B2E, layout.axes("sequence"))
        picked, share = sums[:, 0], sums[:, 1]
        load[layer] = total(jnp.sum(picked, axis=0), layout.axes("batch"))
        if layer < len(config.layers) and config.layers[layer].routing != "score":
            continue
        # An MTP block has no token of a row of one.
        tokens = jnp.maximum(jnp.sum(picked, axis=-1, keepdims=True) / k, 1.0)
        uneven = jnp.sum(picked * (experts / k) / tokens * share / tokens)
        balance += total(uneven, layout.axes("batch")) / counts.rows
    return balance, load


def _indexer(config, sums, counts, layout, dense):
    """Means over the whole batch's queries that see an entry, and over CSA layers."""
    means = []
    for layer, layer_sums in sums.items():
        whole = total(layer_sums, _batch_axes(layout))
        means.append(_mean(whole, counts.queries[config.layers[layer].ratio]))
    mean = dict(zip(SUMS, sum(means) / len(means), strict=True))
    noted = {"indexer": mean["kl"], "indexer_uniform": mean["uniform"]}
    if dense:  # else the mass is known of chosen entries alone
        noted["indexer_captured"] = mean["captured"]
    return noted
