"""Operations, memory traffic and time of one step on one device, by our own count.

Operations are `accounting`'s, one multiply-add two of them, each part divided by the mesh axes that
share its work. Traffic is what a step cannot do without: weights once a pass, the cache's entries
that are read, residual streams and rows of attention and experts in and out. So the times are
floors: what a step takes at least, not what it will take. XLA's cost analysis counts a loop's body
once and a Pallas kernel not at all, and is not used.
"""

import collections
import dataclasses
import math
from collections.abc import Sequence

from v4jax import accounting
from v4jax.chips import Chip
from v4jax.config import LayerSpec, ModelConfig
from v4jax.plan.hlo import Collective
from v4jax.plan.job import Job
from v4jax.plan.memory import Held
from v4jax.sharding.rules import Layout

# The logical axes along which a part's work is divided.
SHARED_BY = {
    "projections": ("batch", "sequence", "heads"),
    "compressor": ("batch", "sequence"),
    "indexer": ("batch", "sequence"),
    "index_scores": ("batch", "sequence", "entries"),
    "attention": ("batch", "sequence", "heads", "entries"),
    "experts": ("batch", "sequence", "expert", "mlp"),
    "shared_experts": ("batch", "sequence", "mlp"),
    "residual": ("batch", "sequence"),
    "head": ("batch", "sequence", "vocab"),
}
BF16 = 2
# Forward, the forward again for the backward pass (remat), and twice as much for the gradients.
TRAIN_PASSES = 4


def passes(job: Job) -> int:
    """Forward passes that a step's operations are worth."""
    return TRAIN_PASSES if job.mode == "train" else 1


@dataclasses.dataclass(frozen=True)
class Time:
    """Seconds of each term, their floor (all overlapped) and the other end (none)."""

    compute: int | float
    memory: int | float
    interconnect: int | float

    @property
    def floor(self) -> int | float:
        return max(self.compute, self.memory, self.interconnect)

    @property
    def sum(self) -> int | float:
        return self.compute + self.memory + self.interconnect


def operations(job: Job, layout: Layout) -> dict[str, float]:
    """Operations of one step on the average device, by part of the model."""
    low = job.context if job.mode == "decode" else 0
    parts = mean_flops(job.config, low, job.context)
    if job.mode == "train":
        mtp = len(job.config.mtp_layers)
        for spec in job.config.mtp_layers:
            for part, flops in _mean_layer(job.config, spec, low, job.context).items():
                parts[part] += flops
        parts["head"] *= 1 + mtp
    if job.mode == "prefill":
        parts["head"] /= job.context  # only each row's last token
    return {
        part: passes(job) * job.tokens * flops / parallel(layout, SHARED_BY[part])
        for part, flops in parts.items()
        if flops
    }


def parallel(layout: Layout, logical: Sequence[str]) -> int:
    """How many devices share work that is divided along these logical axes."""
    axes = {axis for name in logical for axis in layout.axes(name)}
    return math.prod(layout.mesh.shape[axis] for axis in axes)


def mean_flops(config: ModelConfig, low: int, high: int) -> dict[str, float]:
    """Operations of a token, by part, as the mean over the contexts low to high."""
    parts = collections.Counter()
    for layer, count in collections.Counter(config.layers).items():
        for part, flops in _mean_layer(config, layer, low, high).items():
            parts[part] += count * flops
    parts["head"] = 2.0 * config.hidden_size * config.vocab_size
    return parts


def _mean_layer(config, layer: LayerSpec, low, high):
    """The mean of `layer_flops`, which is a straight line between a few contexts."""
    bends = {config.sliding_window, (config.index_topk or 0) * layer.ratio}
    at = sorted({low, high, *(bend for bend in bends if low < bend < high)})
    values = [accounting.layer_flops(config, layer, n, accounting.ONE_EACH) for n in at]
    if low == high:
        return values[0]
    total = collections.Counter()
    for i, width in enumerate(b - a for a, b in zip(at, at[1:], strict=False)):
        for part in values[i]:
            total[part] += width * (values[i][part] + values[i + 1][part]) / 2
    return {part: area / (high - low) for part, area in total.items()}


def imbalance(job: Job, layout: Layout) -> float:
    """Operations of the device with the last slice of the sequence over those of the average."""
    parts = layout.size("sequence")
    if job.mode == "decode" or parts == 1:
        return 1.0
    last = mean_flops(job.config, job.context - job.context // parts, job.context)
    mean = mean_flops(job.config, 0, job.context)
    return (sum(last.values()) - last["head"]) / (sum(mean.values()) - mean["head"])


def traffic(job: Job, layout: Layout, held: Held) -> dict[str, int | float]:
    """Bytes that one step moves in and out of a device's memory at least."""
    found = {"activations": _activations(job, layout)}
    if job.mode == "train":
        # In bf16 for each part's forward pass, the forward again and the gradients of inputs; the
        # master, its optimizer state and gradient in float32, read and written once.
        found["weights"] = 3 * BF16 * held.gathered * job.parts
        found["optimizer"] = 2 * (held.weights + held.optimizer + held.gradients)
        return found
    found["weights"] = held.weights - held.embedding - held.routed * _untouched(job, layout)
    found["cache"] = held.cache if job.mode == "prefill" else held.cache_read
    return found


def _untouched(job, layout):
    """The part of a device's routed experts that none of a step's tokens takes, all being equal."""
    c = job.config
    others = [axis for axis in layout.axes("batch") if axis not in layout.axes("expert")]
    tokens = job.tokens / math.prod(layout.mesh.shape[axis] for axis in others)
    return (1 - c.num_experts_per_tok / c.n_routed_experts) ** tokens


def _activations(job, layout):
    """Streams into and out of both sub-layers; rows of attention and experts, once each way."""
    c = job.config
    streams = 2 * 2 * c.hc_mult * c.hidden_size
    attention = 4 * c.num_attention_heads * c.head_dim / layout.size("heads")
    experts = (c.num_experts_per_tok + c.n_shared_experts) * (
        2 * c.hidden_size + 3 * c.moe_intermediate_size / layout.size("mlp")
    )
    tokens = job.tokens / parallel(layout, ("batch", "sequence"))
    layers = len(c.layers) + (len(c.mtp_layers) if job.mode == "train" else 0)
    return BF16 * passes(job) * layers * tokens * (streams + attention + experts)


def interconnect_seconds(chip: Chip, collective: Collective) -> float:
    """One run of a collective: its bytes over the links, and its hops.

    A TPU's ring lies along one dimension of the torus; a group across nodes goes through adapters.
    """
    outside = chip.node and collective.span > chip.node
    rate = chip.outside if outside else chip.link
    return collective.bytes / rate + hops(chip, collective.group) * chip.latency


def hops(chip: Chip, group: int) -> float:
    """Steps to the farthest of a group: half of each ring of the torus that it fills."""
    if not chip.torus:
        return 1.0
    side = group ** (1 / chip.torus)
    return max(1.0, chip.torus * side / 2)


def times(
    chip: Chip, flops: float, uneven: float, moved: int | float, found: Sequence[Collective]
) -> Time:
    """The three terms of the roofline.

    Args:
      flops, moved: of the average device. uneven: `imbalance`; the last device is waited for.
    """
    return Time(
        uneven * flops / chip.flops,
        moved / chip.bandwidth,
        sum(c.count * interconnect_seconds(chip, c) for c in found),
    )
