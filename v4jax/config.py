"""The model's sizes and its per-layer pattern, in one frozen dataclass.

`ModelConfig()` is DeepSeek-V4-Flash. Everything that an ablation changes is data here: the kind of
each layer, its compression ratio, overlap and routing, the residual streams, the router.
`v4jax/hf/config.py` reads and writes config.json.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from v4jax.draft_sizes import DSpark, check_draft
from v4jax.errors import InputError
from v4jax.quantities import check_whole, is_number

ATTENTION_KINDS = ("window", "csa", "hca", "full")
ROUTING_KINDS = ("hash", "score")
SCORING_FUNCTIONS = ("sqrtsoftplus", "sigmoid", "softmax")


@dataclasses.dataclass(frozen=True)
class LayerSpec:
    """What one layer is.

    Attributes:
      attention: "window" (sliding window only), "csa" (window + indexed compressed entries), "hca"
        (window + every compressed entry) or "full" (causal attention over every token, the dense
        baseline; no window).
      ratio: tokens a compressed entry stands for; 0 for "window" and "full".
      overlap: whether an entry also pools the block before its own (CSA's compressor).
      routing: "hash" (experts looked up by token id) or "score".
    """

    attention: str
    ratio: int = 0
    overlap: bool = False
    routing: str = "score"

    def __post_init__(self):
        if self.attention not in ATTENTION_KINDS:
            raise InputError(f"attention is {self.attention!r}; expected one of {ATTENTION_KINDS}")
        if self.routing not in ROUTING_KINDS:
            raise InputError(f"routing is {self.routing!r}; expected one of {ROUTING_KINDS}")
        check_whole("a layer's ratio", self.ratio, 0)
        if self.compresses and self.ratio < 2:
            raise InputError(f"a {self.attention} layer has ratio {self.ratio}; expected 2 or more")
        if not self.compresses and (self.ratio or self.overlap):
            raise InputError(
                f"a {self.attention} layer has ratio {self.ratio} and overlap {self.overlap}; it "
                "compresses nothing, so leave them 0 and False"
            )

    @property
    def compresses(self) -> bool:
        """Whether the layer has compressed entries, and so YaRN's frequencies."""
        return self.attention in ("csa", "hca")


WINDOW = LayerSpec("window")
CSA = LayerSpec("csa", ratio=4, overlap=True)
HCA = LayerSpec("hca", ratio=128)
FULL = LayerSpec("full")


@dataclasses.dataclass(frozen=True)
class Yarn:
    """YaRN scaling of the rotary frequencies of compressing layers (architecture: section 4)."""

    factor: float = 16.0
    original_max_position_embeddings: int = 65536
    beta_fast: float = 32.0
    beta_slow: float = 1.0

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if not (is_number(value) and value > 0 and math.isfinite(value)):
                raise InputError(
                    f"rope_scaling {field.name} is {value}; expected a positive number"
                )
        if self.beta_fast < self.beta_slow:
            raise InputError(
                f"rope_scaling beta_fast is {self.beta_fast}, below beta_slow {self.beta_slow}; "
                "expected the rotations of the fast channels to be the larger"
            )


def with_hash_routing(layers, num_hash_layers):
    """The same layers, the first `num_hash_layers` of them routed by token id."""
    return tuple(
        dataclasses.replace(layer, routing="hash" if i < num_hash_layers else "score")
        for i, layer in enumerate(layers)
    )


_FLASH_LAYERS = with_hash_routing((WINDOW, WINDOW) + (CSA, HCA) * 20 + (CSA,), 3)


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Sizes and pattern of one DeepSeek-V4 model; the defaults are V4-Flash.

    Field names are those of the official config.json where it has one. `layers` holds one
    `LayerSpec` a layer, `mtp_layers` one a multi-token-prediction block. `index_topk=None` lets a
    CSA layer attend to all visible entries. `hc_mult=1` is a plain residual.
    `quantization` is the official `quantization_config` (None: nothing is stored in FP8) and
    `expert_dtype` "fp4" or None, as on disk; they describe files, not the mathematics.
    `draft_layers` counts the stages of a DSpark draft; `dspark` says how they run, and where it is
    None they are carried along.
    `extra` keeps keys of config.json that change no number, to be written back.
    """

    vocab_size: int = 129280
    hidden_size: int = 4096
    layers: tuple[LayerSpec, ...] = _FLASH_LAYERS
    mtp_layers: tuple[LayerSpec, ...] = (WINDOW,)
    draft_layers: int = 0
    dspark: DSpark | None = None

    num_attention_heads: int = 64
    head_dim: int = 512
    qk_rope_head_dim: int = 64
    q_lora_rank: int = 1024
    o_groups: int = 8
    o_lora_rank: int = 1024
    sliding_window: int = 128

    rope_theta: float = 10000.0
    compress_rope_theta: float = 160000.0
    rope_scaling: Yarn | None = Yarn()
    max_position_embeddings: int = 1048576

    index_n_heads: int = 64
    index_head_dim: int = 128
    index_topk: int | None = 512

    n_routed_experts: int = 256
    n_shared_experts: int = 1
    num_experts_per_tok: int = 6
    moe_intermediate_size: int = 2048
    scoring_func: str = "sqrtsoftplus"
    routed_scaling_factor: float = 1.5
    swiglu_limit: float = 10.0

    hc_mult: int = 4
    hc_sinkhorn_iters: int = 20
    hc_eps: float = 1e-6
    rms_norm_eps: float = 1e-6

    initializer_range: float = 0.006
    bos_token_id: int | None = 0
    eos_token_id: int | tuple[int, ...] | None = 1
    dtype: str = "bfloat16"
    expert_dtype: str | None = None
    quantization: Mapping[str, Any] | None = dataclasses.field(default=None, hash=False)
    extra: Mapping[str, Any] = dataclasses.field(default_factory=dict, hash=False)

    def __post_init__(self):
        _check_layers(self)
        _check_positive(self)
        _check_attention(self)
        _check_rope(self)
        _check_experts(self)
        _check_hyper_connections(self)
        check_draft(self)
        _check_files(self)

    @property
    def num_hidden_layers(self) -> int:
        return len(self.layers)

    @property
    def shared_intermediate_size(self) -> int:
        return self.n_shared_experts * self.moe_intermediate_size


@dataclasses.dataclass(frozen=True)
class Segment:
    """`repeats` runs of a unit of `period` layers that starts at layer `start`."""

    start: int
    period: int
    repeats: int

    @property
    def name(self) -> str:
        return f"layers_{self.start}"

    def path(self, place: int) -> tuple[str, str]:
        """Where a layer of the unit lies among the variables: ("layers_2", "block_0")."""
        return self.name, f"block_{place}"

    def layers(self, place: int) -> range:
        """The numbers of the layers that lie there, one for each repeat."""
        first = self.start + place
        return range(first, first + self.period * self.repeats, self.period)


def segments(layers: tuple[LayerSpec, ...], min_repeats: int = 4) -> tuple[Segment, ...]:
    """Cuts the layers into units that repeat, so that each is compiled once and scanned.

    Greedy from the front: the period (up to 8) that covers the most layers wins, the shortest of
    equals. A unit that repeats fewer than `min_repeats` times is left unrolled, a layer a segment.
    """
    cut = []
    start = 0
    while start < len(layers):
        period, repeats = _best_period(layers[start:])
        if repeats < max(min_repeats, 2):
            period, repeats = 1, 1
        cut.append(Segment(start, period, repeats))
        start += period * repeats
    return tuple(cut)


def _best_period(layers):
    best = (1, 1)
    for period in range(1, min(8, len(layers) // 2) + 1):
        unit, repeats = layers[:period], 1
        while layers[repeats * period : (repeats + 1) * period] == unit:
            repeats += 1
        if repeats > 1 and period * repeats > best[0] * best[1]:
            best = (period, repeats)
    return best


def layer_place(cut: tuple[Segment, ...], layer: int) -> tuple[Segment, int, int]:
    """Where a layer lives: its segment, its place in the unit and which repeat it is."""
    for segment in cut:
        offset = layer - segment.start
        if 0 <= offset < segment.period * segment.repeats:
            return segment, offset % segment.period, offset // segment.period
    raise InputError(f"layer {layer} is not one of the model's layers")


# Fields and the least that each may be. Counts are whole numbers, the others finite ones.
_COUNTS = {
    "vocab_size": 1,
    "hidden_size": 1,
    "draft_layers": 0,
    "num_attention_heads": 1,
    "head_dim": 1,
    "qk_rope_head_dim": 1,
    "q_lora_rank": 1,
    "o_groups": 1,
    "o_lora_rank": 1,
    "sliding_window": 1,
    "index_n_heads": 1,
    "index_head_dim": 1,
    "n_routed_experts": 1,
    "n_shared_experts": 0,
    "num_experts_per_tok": 1,
    "moe_intermediate_size": 1,
    "hc_mult": 1,
    "hc_sinkhorn_iters": 1,
    "max_position_embeddings": 1,
}
_POSITIVE = (
    "rope_theta",
    "compress_rope_theta",
    "swiglu_limit",
    "routed_scaling_factor",
    "hc_eps",
    "rms_norm_eps",
)


def _check_layers(config):
    for name in ("layers", "mtp_layers"):
        value = getattr(config, name)
        if not (isinstance(value, tuple) and all(isinstance(x, LayerSpec) for x in value)):
            raise InputError(
                f"{name} is {repr(value)[:100]}; expected a tuple of LayerSpec, one for each layer"
            )
    if not config.layers:
        raise InputError("num_hidden_layers is 0; expected at least one layer")


def _check_positive(config):
    for name, least in _COUNTS.items():
        check_whole(name, getattr(config, name), least)
    for name in _POSITIVE:
        value = getattr(config, name)
        # A SwiGLU limit of infinity is none at all; the rest would make zeros or NaN of it.
        finite = name == "swiglu_limit" or (is_number(value) and math.isfinite(value))
        if not (is_number(value) and value > 0 and finite):
            raise InputError(f"{name} is {value}; expected a positive number")
    deviation = config.initializer_range
    if not (is_number(deviation) and 0 <= deviation < math.inf):
        raise InputError(f"initializer_range is {deviation}; expected 0 or a positive number")
    if config.index_topk is not None:
        check_whole("index_topk", config.index_topk, 1, ", or None for all")


def _check_rope(config):
    """YaRN divides by the logarithm of the base, and below 1 its channels turn the wrong way."""
    compresses = any(layer.compresses for layer in config.layers)
    if compresses and config.rope_scaling is not None and config.compress_rope_theta <= 1:
        raise InputError(
            f"compress_rope_theta is {config.compress_rope_theta} and rope_scaling is YaRN's; "
            "expected a base of more than 1, or rope_scaling None"
        )


def _check_attention(config):
    if config.num_attention_heads % config.o_groups:
        raise InputError(
            f"num_attention_heads is {config.num_attention_heads}, not divisible by o_groups "
            f"{config.o_groups}; the output projection needs equal groups of heads"
        )
    for name in ("head_dim", "index_head_dim"):
        if config.qk_rope_head_dim > getattr(config, name) or config.qk_rope_head_dim % 2:
            raise InputError(
                f"qk_rope_head_dim is {config.qk_rope_head_dim}; expected an even number of at "
                f"most {name} = {getattr(config, name)}"
            )
    for i, layer in enumerate(config.mtp_layers):
        if layer.attention != "window" or layer.routing != "score":
            raise InputError(
                f"MTP block {i} has {layer.attention} attention and {layer.routing} routing; "
                "expected window attention and score routing"
            )
    if config.dtype not in ("float32", "bfloat16"):
        raise InputError(f"dtype is {config.dtype!r}; expected 'float32' or 'bfloat16'")
    if config.index_head_dim & (config.index_head_dim - 1):
        raise InputError(
            f"index_head_dim is {config.index_head_dim}; the Hadamard transform needs a power of 2"
        )


def _check_experts(config):
    if config.num_experts_per_tok > config.n_routed_experts:
        raise InputError(
            f"num_experts_per_tok is {config.num_experts_per_tok}, more than n_routed_experts "
            f"{config.n_routed_experts}"
        )
    if config.scoring_func not in SCORING_FUNCTIONS:
        raise InputError(
            f"scoring_func is {config.scoring_func!r}; expected one of {SCORING_FUNCTIONS}"
        )


def _check_hyper_connections(config):
    if config.hc_mult > 8:
        raise InputError(f"hc_mult is {config.hc_mult}; expected 1 (plain residual) to 8")


def _check_files(config):
    if config.draft_layers and config.mtp_layers:
        raise InputError(
            f"draft_layers is {config.draft_layers} and there are {len(config.mtp_layers)} MTP "
            "blocks; a checkpoint has one or the other"
        )
    if config.expert_dtype not in (None, "fp4"):
        raise InputError(f"expert_dtype is {config.expert_dtype!r}; expected 'fp4' or None")
    if config.expert_dtype == "fp4" and config.quantization is None:
        raise InputError(
            "expert_dtype is 'fp4' and there is no quantization_config; FP4 experts are stored "
            "next to FP8 matrices, so give both or neither"
        )
