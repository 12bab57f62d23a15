"""The auxiliary outputs of a forward pass: which there are, and how they are sharded.

A call asks for them by the names in `ASKABLE`; `Output.aux[key][layer]` then has the keys below.
Two are of no single layer: `Output.aux["features"]` [B,T,L*D] holds what a DSpark draft reads of
its L target layers, and "last_streams" brings `Output.streams`.
"""

from typing import NamedTuple

from v4jax.config import ModelConfig
from v4jax.sharding.rules import Layout

ROWS = ("batch", "sequence")


class Auxiliary(NamedTuple):
    """One key of `Output.aux`.

    Attributes:
      asked: the name in `aux=` that brings it.
      axes: logical axes of its first dimensions.
      spread: the same with a cache whose entries the shards share; None for `axes`.
      summed: logical axes over which the shards' parts are added up.
      kinds: the kinds of attention whose layers have it; empty for every layer.
    """

    asked: str
    axes: tuple[str | None, ...] = ROWS
    spread: tuple[str | None, ...] | None = None
    summed: tuple[str, ...] = ()
    kinds: tuple[str, ...] = ()


TABLE = {
    "streams": Auxiliary("streams"),
    "features": Auxiliary("features"),
    "router_experts": Auxiliary("router_experts"),
    "router_weights": Auxiliary("router_weights"),
    "router_scores": Auxiliary("router_scores"),
    "chosen": Auxiliary("chosen", kinds=("csa",)),
    "index_scores": Auxiliary("index_scores", spread=("batch", None, "entries"), kinds=("csa",)),
    "index_keys": Auxiliary("index_scores", ("batch",), ("batch", "entries"), kinds=("csa",)),
    "mhc_attn": Auxiliary("mhc"),
    "mhc_ffn": Auxiliary("mhc"),
    "q": Auxiliary("attention", (*ROWS, "heads")),
    "kv": Auxiliary("attention"),
    "entries": Auxiliary(
        "attention", ("batch",), ("batch", "entries"), kinds=("csa", "hca", "full")
    ),
    "o": Auxiliary("attention", (*ROWS, "heads")),
    "router_load": Auxiliary("router_load", ("batch",), summed=("sequence",)),
    "indexer_loss": Auxiliary("indexer_loss", (), summed=("sequence", "batch"), kinds=("csa",)),
}
ASKABLE = (*dict.fromkeys(entry.asked for entry in TABLE.values()), "last_streams")
# What a replayed choice leaves unknown.
_OF_THE_CHOICE = ("chosen", "index_scores", "index_keys")


def keys(config: ModelConfig, asked: tuple[str, ...], chosen_replayed: bool) -> set[str]:
    """The keys of `Output.aux` that a call brings.

    Args:
      asked: names out of `ASKABLE`.
      chosen_replayed: whether the indexer's choice is given.
    """
    there = {layer.attention for layer in config.layers}
    found = {
        key
        for key, entry in TABLE.items()
        if entry.asked in asked and (not entry.kinds or there & set(entry.kinds))
    }
    if config.hc_mult == 1:
        found -= {"mhc_attn", "mhc_ffn"}
    return found - set(_OF_THE_CHOICE) if chosen_replayed else found


def spec(layout: Layout, key: str, with_cache: bool):
    """The PartitionSpec of a key's arrays."""
    entry = TABLE[key]
    spread = with_cache and entry.spread is not None and not layout.axes("sequence")
    return layout.spec(*(entry.spread if spread else entry.axes))


def has_rows(key: str) -> bool:
    """Whether a key's arrays have a row for each token of the call."""
    return "sequence" in TABLE[key].axes
