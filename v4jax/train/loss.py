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

from v4jax.errors import InputError
from v4jax.model import sharded
from v4jax.model.indexer_loss import SUMS
from v4jax.model.transformer import Transformer
from v4jax.sharding import collectives
from v4jax.sharding.collectives import total
from v4jax.train.batch import Batch
from v4jax.train.cross_entropy import cross_entropy


@dataclasses.dataclass(frozen=True)
class LossWeights:
    """Weights beside the next token's 1. A 0 switches that branch off altogether.

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

    tokens_J: targets that count, a column each. rows: rows of the batch. parts: parts it is cut in.
    """

    tokens_J: Any
    rows: Any
    parts: Any


def count(batch: Batch, parts: int = 1) -> Counts:
    """The counts of a whole batch that is computed in so many parts."""
    tokens = jnp.sum(jnp.asarray(batch.weights_BTJ), axis=(0, 1))
    rows = jnp.float32(batch.tokens_BT.shape[0])
    return Counts(jnp.maximum(tokens, 1.0), rows, jnp.float32(parts))


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
      The loss, and by name: "loss" (nats a token), "mtp", "balance", "indexer" and its
      companions, and "load": {layer: [E] tokens an expert got}. Each is this part's share of the
      batch's figure, so that parts add up.
    """
    batch = jax.tree.map(jnp.asarray, batch)
    further = jnp.float32(weights.mtp if mtp_weight is None else mtp_weight)
    shards = model.sharding
    if shards.mesh is None:
        return loss_local(model, weights, dense, variables, batch, counts, further)
    sharded.check(model.config, shards)
    shards.check_divides(dict(zip(("batch", "sequence"), batch.tokens_BT.shape, strict=True)))
    row, cell = shards.spec("batch"), shards.spec("batch", "sequence")
    ids = None if batch.segment_ids_BT is None else row
    here = functools.partial(loss_local, model.clone(inside=True), weights, dense)
    specs = sharded.variable_specs(model)
    everywhere = PartitionSpec()
    return jax.shard_map(
        here,
        mesh=shards.mesh,
        in_specs=(specs, Batch(row, cell, cell, ids), everywhere, everywhere),
        out_specs=everywhere,
        check_vma=False,
    )(variables, batch, counts, further)


def loss_local(model, weights, dense, variables, batch, counts, mtp_weight):
    """`loss` on one shard's arrays: tokens of whole rows, targets of this shard's part of them."""
    shards = model.sharding
    out = model.apply(
        variables,
        batch.tokens_BT,
        segment_ids=batch.segment_ids_BT,
        logits="normed",
        mtp=bool(weights.mtp),
        dense=dense,
        aux=("router_load", "indexer_loss") if weights.indexer else ("router_load",),
    )
    head = collectives.gather(variables["params"]["head"]["weight"], shards.gathered("embed"), 1)
    nats = [
        _nats(y_BTD, head, batch, column, shards) / counts.tokens_J[column]
        for column, y_BTD in enumerate((out.normed, *out.mtp_normed))
    ]
    balance, load = _balance(model.config, out.aux["router_load"], counts, shards)
    objective = nats[0] + weights.balance * balance
    noted = {"loss": nats[0], "balance": balance, "load": load}
    if weights.mtp:
        noted["mtp"] = sum(nats[1:]) / max(len(nats) - 1, 1)
        objective += mtp_weight * noted["mtp"]
    if "indexer_loss" in out.aux:
        noted |= _indexer(out.aux["indexer_loss"], counts, shards, dense)
        objective += weights.indexer * noted["indexer"]
    return objective, noted


def _everywhere(shards):
    return shards.axes("batch") + shards.axes("sequence")


def _nats(y_BTD, head, batch, column, shards):
    """The sum over all targets of a column. An MTP block has fewer states than the row tokens."""
    length, width = y_BTD.shape[1:]
    target = batch.targets_BTJ[:, :length, column].reshape(-1)
    weight = batch.weights_BTJ[:, :length, column].reshape(-1)
    nats = cross_entropy(y_BTD.reshape(-1, width), head, target, weight, shards.axes("vocab"))
    return total(nats, _everywhere(shards))


def _balance(config, loads, counts, shards):
    """sum over score-routed layers of the mean over rows of sum_e f_e P_e; each layer's load.

    f_e = E count_e / (K T), P_e = mean over tokens of s_e / sum s, both of one sequence.
    """
    experts, k = config.n_routed_experts, config.num_experts_per_tok
    balance, load = jnp.float32(0), {}
    for layer, sums_B2E in loads.items():
        sums = total(sums_B2E, shards.axes("sequence"))
        picked, share = sums[:, 0], sums[:, 1]
        load[layer] = total(jnp.sum(picked, axis=0), shards.axes("batch"))
        if layer < len(config.layers) and config.layers[layer].routing != "score":
            continue
        tokens = jnp.sum(picked, axis=-1, keepdims=True) / k
        uneven = jnp.sum(picked * (experts / k) / tokens * share / tokens)
        balance += total(uneven, shards.axes("batch")) / counts.rows
    return balance, load


def _indexer(sums, counts, shards, dense):
    """Means over the queries that see an entry, and over CSA layers."""
    means = []
    for layer_sums in sums.values():
        whole = total(layer_sums, _everywhere(shards))
        means.append(whole / jnp.maximum(whole[SUMS.index("queries")], 1.0))
    mean = dict(zip(SUMS, sum(means) / (len(means) * counts.parts), strict=True))
    noted = {"indexer": mean["kl"], "indexer_uniform": mean["uniform"]}
    if dense:  # else the mass is known of chosen entries alone
        noted["indexer_captured"] = mean["captured"]
    return noted
