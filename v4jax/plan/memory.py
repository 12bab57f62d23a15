"""The bytes that one device holds, counted from the config: no array, no compiler."""

import dataclasses
import functools
import math
from collections.abc import Mapping

from v4jax import accounting, weights
from v4jax.config import LayerSpec, ModelConfig
from v4jax.model.transformer import Transformer
from v4jax.plan.job import Job
from v4jax.plan.variables import Leaf
from v4jax.sharding.rules import Layout
from v4jax.train.optimizer import OptimizerConfig, group_of
from v4jax.weights import Weight

MASTER = 4  # bytes of a float32 number: gradients and optimizer moments


@dataclasses.dataclass(frozen=True)
class Held:
    """Bytes of one device.

    Attributes:
      weights: all of them, of which `routed` are routed experts' and `embedding` the table of
        embeddings, whose rows a step reads in part.
      optimizer, gradients: in training.
      cache: the decode state; cache_read: what a decode step reads of it.
      gathered: numbers (not bytes) that it computes with once parts of weights are put together.
    """

    weights: int | float
    routed: int | float
    embedding: int | float
    optimizer: int | float
    gradients: int | float
    cache: int | float
    cache_read: int | float
    gathered: int | float

    @property
    def arguments(self) -> int | float:
        """What lies there before and after a step."""
        return self.weights + self.optimizer + self.cache


def held(job: Job, layout: Layout, leaves: list[Leaf]) -> Held:
    """What a device of a mesh holds.

    Args:
      leaves: the model's variables as stored; see `variables.leaves`.
    """
    trained = [leaf for leaf in leaves if leaf.path[0] == "params"] if job.mode == "train" else []
    declared = _declared(job.config)
    cache = cache_read = 0.0
    if job.mode != "train":
        cache, cache_read = _cache(job, layout)
    return Held(
        weights=sum(leaf.nbytes / parts(layout, leaf) for leaf in leaves),
        routed=_of(layout, leaves, "experts"),
        embedding=_of(layout, leaves, "embed"),
        optimizer=sum(
            MASTER * moments(leaf, declared) * _numbers(layout, leaf) for leaf in trained
        ),
        gradients=sum(MASTER * _numbers(layout, leaf) for leaf in trained),
        cache=cache,
        cache_read=cache_read,
        gathered=sum(math.prod(leaf.shape) / _kept(layout, leaf) for leaf in trained),
    )


def parts(layout: Layout, leaf: Leaf) -> int:
    """Into how many parts a leaf is cut."""
    return math.prod(layout.size(axis) for axis in leaf.axes)


@functools.lru_cache(maxsize=8)
def _declared(config):
    return weights.parameters(config, Transformer(config).min_repeats)


def moments(leaf: Leaf, declared: Mapping[str, Weight]) -> int:
    """Numbers that the optimizer keeps for each weight: Muon one, AdamW two."""
    group = group_of("/".join(leaf.path[1:]), declared, OptimizerConfig())
    return 1 if group == "muon" else 2


def _numbers(layout, leaf):
    return math.prod(leaf.shape) / parts(layout, leaf)


def _kept(layout, leaf):
    return math.prod(layout.mesh.shape[a] for axis in leaf.axes for a in layout.kept(axis))


def _of(layout, leaves, name):
    return sum(leaf.nbytes / parts(layout, leaf) for leaf in leaves if name in leaf.path)


def _cache(job, layout):
    """Bytes of a device's rows, and those that a decoded token reads."""
    rows = job.batch / layout.size("batch")
    found = [_layer_cache(job, layer, layout) for layer in job.config.layers]
    return rows * sum(all_ for all_, _ in found), rows * sum(read for _, read in found)


def _layer_cache(job: Job, layer: LayerSpec, layout):
    """A layer's bytes a row, and those read: the compressor's raw rows are float32."""
    c, spread = job.config, layout.size("entries")
    entry, key = _entry_bytes(job)
    if layer.attention == "full":
        entries = entry * job.context / spread
        return entries, entries
    window = entry * (c.sliding_window - 1)
    if not layer.compresses:
        return window, window
    count = job.context / layer.ratio / spread
    main, raw = entry * count, _raw(layer, c.head_dim)
    if layer.attention != "csa":
        return window + main + raw, window + main + raw
    keys, index_raw = key * count, _raw(layer, c.index_head_dim)
    chosen = min(count, (c.index_topk or math.inf) / spread) * entry
    everything = window + main + raw + keys + index_raw
    return everything, window + chosen + raw + keys + index_raw


def _entry_bytes(job):
    """Of a kv row or entry and of an index key: as stored where the numerics is native, or bf16."""
    config: ModelConfig = job.config
    if job.numerics == "native":
        return accounting.main_entry_bytes(config), accounting.index_entry_bytes(config)
    return 2 * config.head_dim, 2 * config.index_head_dim


def _raw(layer, width):
    channels = (2 if layer.overlap else 1) * 2 * width
    rows = (2 if layer.overlap else 1) * layer.ratio - 1
    return 4 * channels * rows
