"""The collectives that a step should need, by hand: what meshes are ranked by before a compile."""

import math
from collections.abc import Iterable, Iterator

from v4jax.plan.hlo import Collective
from v4jax.plan.job import Job
from v4jax.plan.memory import MASTER, parts
from v4jax.plan.roofline import parallel
from v4jax.plan.variables import Leaf
from v4jax.sharding.rules import Layout

BF16 = 2
# Forward and forward again; the gradient's own exchange has as many bytes as one of them.
_FORWARDS, _PASSES = 2, 3


def expected(job: Job, layout: Layout, leaves: list[Leaf]) -> list[Collective]:
    """Collectives of one step, those of a kind in every layer as one entry with a count."""
    found = [*_experts(job, layout), *_tensor(job, layout), *_entries(job, layout)]
    if job.mode == "train":
        trained = [leaf for leaf in leaves if leaf.path[0] == "params"]
        found += _weights(layout, trained, job.parts)
    return found


def _collective(layout, kind, axes: Iterable[str], count, sent) -> Iterator[Collective]:
    """`sent` bytes leave a device in each of `count` runs; nothing where the axes are of length 1.

    Mesh axes are laid out in order, the last one's devices side by side.
    """
    axes = tuple(axis for axis in layout.mesh.shape if axis in set(axes))
    group = math.prod(layout.mesh.shape[axis] for axis in axes)
    if group == 1:
        return
    names = list(layout.mesh.shape)
    span = math.prod(layout.mesh.shape[axis] for axis in names[names.index(axes[0]) :])
    yield Collective(kind, group, span, axes, count, sent)


def _tokens(job, layout):
    """Tokens of one device in one part of the batch."""
    return job.tokens / job.parts / parallel(layout, ("batch", "sequence"))


def _passes(job):
    """How often a step exchanges what one forward pass does."""
    return _PASSES * job.parts if job.mode == "train" else 1


def _layers(job):
    return len(job.config.layers) + (len(job.config.mtp_layers) if job.mode == "train" else 0)


def _experts(job, layout):
    """Tokens to their experts and back, in every layer."""
    c, axes = job.config, layout.axes("expert")
    n = layout.size("expert")
    rows = _tokens(job, layout) * BF16 * c.hidden_size
    count = _layers(job) * _passes(job)
    if layout.strategy.exchange == "all_to_all":
        sent = rows * c.num_experts_per_tok * (n - 1) / n
        yield from _collective(layout, "all-to-all", axes, 2 * count, sent)
        return
    spread = [axis for axis in axes if axis in layout.axes("batch")]
    n = math.prod(layout.mesh.shape[axis] for axis in spread)
    yield from _collective(layout, "all-gather", spread, count, (n - 1) * rows)
    yield from _collective(layout, "reduce-scatter", spread, count, 2 * (n - 1) * rows)
    whole = [axis for axis in axes if axis not in spread]
    n = math.prod(layout.mesh.shape[axis] for axis in whole)
    yield from _collective(layout, "all-reduce", whole, count, 4 * (n - 1) / n * rows)


def _tensor(job, layout):
    """Sums over parts of heads and of expert widths, float32."""
    n = layout.size("heads")
    sent = 2 * (n - 1) / n * 4 * job.config.hidden_size * _tokens(job, layout)
    count = 2 * _layers(job) * _passes(job)
    yield from _collective(layout, "all-reduce", layout.axes("heads"), count, sent)


def _entries(job, layout):
    """Compressed entries to all shards of a sequence, or partial softmaxes of a decode step."""
    c, axes = job.config, layout.axes("entries")
    n, rows = layout.size("entries"), job.rows / layout.size("batch")
    kinds = [layer for layer in c.layers if layer.compresses]
    if layout.axes("sequence"):
        for layer in set(kinds):
            width = c.head_dim + (c.index_head_dim if layer.attention == "csa" else 0)
            sent = BF16 * width * rows * job.context / layer.ratio * (n - 1) / n
            count = _passes(job) * kinds.count(layer)
            yield from _collective(layout, "all-gather", axes, count, sent)
        return
    heads = c.num_attention_heads / layout.size("heads")
    sent = 2 * (n - 1) / n * 4 * rows * heads * (c.head_dim + 2)
    yield from _collective(layout, "all-reduce", axes, len(kinds), sent)


def _weights(layout, leaves, microbatches):
    """Parts put together for each pass, gradients summed and taken apart again."""
    for leaf in leaves:
        layers = leaf.shape[0] if leaf.axes[0] == "layers" else 1
        stored = math.prod(leaf.shape) / parts(layout, leaf)
        gathered = {axis for name in leaf.axes for axis in layout.gathered(name)}
        n = math.prod(layout.mesh.shape[axis] for axis in gathered)
        together, runs = (n - 1) * stored / layers, microbatches * layers
        yield from _collective(layout, "all-gather", gathered, _FORWARDS * runs, BF16 * together)
        yield from _collective(layout, "reduce-scatter", gathered, runs, MASTER * together)
        rest = set(layout.axes("batch")) | set(layout.axes("sequence"))
        rest -= {axis for name in leaf.axes for axis in layout.axes(name)}
        n = math.prod(layout.mesh.shape[axis] for axis in rest)
        sent = 2 * (n - 1) / n * MASTER * stored
        yield from _collective(layout, "all-reduce", rest, microbatches, sent)
