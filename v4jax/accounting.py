"""Parameters, stored bytes, KV bytes a token and FLOPs a decoded token of a config, and V3.2's.

Everything is counted from the config and the tensor table, so it holds for ablations too. FLOPs are
in FP8 equivalents, as the report counts them: a multiply-add is two operations, a BF16 operation
costs two FP8 ones, an FP4 index score half of one. Prices are those of the released precisions,
whatever form the checkpoint at hand is stored in.
"""

import collections
import dataclasses
import math

from v4jax import block_sizes
from v4jax.config import LayerSpec, ModelConfig
from v4jax.hf.tensors import TensorSpec, tensor_table


@dataclasses.dataclass(frozen=True)
class Prices:
    """What one operation costs in each of the released precisions."""

    fp8: float = 1.0
    bf16: float = 2.0
    fp4_scores: float = 0.5


REPORT = Prices()
ONE_EACH = Prices(1.0, 1.0, 1.0)  # operations as they are, for hardware that computes all in bf16


@dataclasses.dataclass(frozen=True)
class Parameters:
    """Parameters of the main model, of each layer, of each MTP block and of a draft's stages.

    Active ones are those that one token's forward pass reads: its routed experts only, and of the
    embedding, a lookup, nothing. Router biases and hash tables are buffers and not counted.
    """

    total: int
    active: int
    layers: tuple[int, ...]
    active_layers: tuple[int, ...]
    mtp_blocks: tuple[int, ...]
    draft_stages: tuple[int, ...] = ()


def count_parameters(config: ModelConfig, table: list[TensorSpec] | None = None) -> Parameters:
    """Counts the parameters of a config; `table` is its `tensor_table`, if it is at hand."""
    rest, routed = collections.Counter(), collections.Counter()
    for spec in table or tensor_table(config):
        (rest if spec.expert is None else routed)[spec.item] += _parameters_of(spec)
    chosen, experts = config.num_experts_per_tok, config.n_routed_experts
    total = {item: rest[item] + routed[item] for item in rest}
    active = {item: rest[item] + routed[item] * chosen // experts for item in rest}
    layers = [f"layer_{i:03d}" for i in range(len(config.layers))]
    mtp_blocks = [f"mtp_{k}" for k in range(len(config.mtp_layers))]
    stages = [f"draft_{k}" for k in range(config.draft_layers if config.dspark else 0)]
    main = ["head", *layers]
    return Parameters(
        total=total["embed"] + sum(total[item] for item in main),
        active=sum(active[item] for item in main),
        layers=tuple(total[item] for item in layers),
        active_layers=tuple(active[item] for item in layers),
        mtp_blocks=tuple(total[item] for item in mtp_blocks),
        draft_stages=tuple(total[item] for item in stages),
    )


def _parameters_of(spec):
    if spec.role == "scale" or spec.path[0] != "params":
        return 0
    packed = 2 if spec.dtypes[0] == "I8" else 1
    return packed * math.prod(spec.shape)


def kv_bytes_per_token(config: ModelConfig) -> float:
    """Bytes the cache grows by with each token, stored as the official kernels store it."""
    return sum(layer_kv_bytes_per_token(config, layer) for layer in config.layers)


def layer_kv_bytes_per_token(config: ModelConfig, layer: LayerSpec) -> float:
    """One layer's share of `kv_bytes_per_token`; a window does not grow."""
    if layer.attention == "window":
        return 0.0
    if layer.attention == "full":
        return float(main_entry_bytes(config))
    index = index_entry_bytes(config) if layer.attention == "csa" else 0
    return (main_entry_bytes(config) + index) / layer.ratio


def window_bytes(config: ModelConfig) -> int:
    """Bytes of all sliding windows once they are full, a constant for each sequence."""
    windows = sum(layer.attention != "full" for layer in config.layers)
    return windows * config.sliding_window * main_entry_bytes(config)


def main_entry_bytes(config: ModelConfig) -> int:
    """One cached entry as the official kernels store it."""
    return block_sizes.kv_row_bytes(config.head_dim, config.qk_rope_head_dim)


def index_entry_bytes(config: ModelConfig) -> int:
    """One cached entry of the indexer as the official kernels store it."""
    return block_sizes.index_key_bytes(config.index_head_dim)


def flops_per_token(config: ModelConfig, context: int, prices: Prices = REPORT) -> dict[str, float]:
    """FLOPs of one decode step with `context` tokens in the cache, by part of the model.

    MTP, norms and softmaxes are left out.
    """
    parts = collections.Counter()
    for layer, count in collections.Counter(config.layers).items():
        for part, flops in layer_flops(config, layer, context, prices).items():
            parts[_SHOWN_WITH.get(part, part)] += count * flops
    parts["head"] += _matmul(config.hidden_size * config.vocab_size, prices.bf16)
    return dict(parts)


_SHOWN_WITH = {"index_scores": "indexer", "shared_experts": "experts"}


def layer_flops(
    config: ModelConfig, layer: LayerSpec, context: int, prices: Prices = REPORT
) -> dict[str, float]:
    """One layer's share of `flops_per_token`, index scores and shared experts apart."""
    return {
        "projections": _matmul(_projection_weights(config), prices.fp8),
        "compressor": _compressor_flops(config, layer, config.head_dim, prices),
        "indexer": _indexer_flops(config, layer, prices),
        "index_scores": _score_flops(config, layer, context, prices),
        "attention": _core_flops(config, layer, context, prices),
        "experts": _routed_flops(config, prices),
        "shared_experts": _shared_flops(config, prices),
        "residual": _residual_flops(config, prices),
    }


def _projection_weights(c):
    heads = c.num_attention_heads * c.head_dim
    queries = c.hidden_size * c.q_lora_rank + c.q_lora_rank * heads
    output = heads * c.o_lora_rank + c.o_groups * c.o_lora_rank * c.hidden_size
    return queries + c.hidden_size * c.head_dim + output


def _compressor_flops(config, layer, width, prices):
    if not layer.ratio:
        return 0.0
    channels = 2 * width if layer.overlap else width
    return 2 * _matmul(config.hidden_size * channels, prices.bf16)


def _indexer_flops(c, layer, prices):
    if layer.attention != "csa":
        return 0.0
    return (
        _compressor_flops(c, layer, c.index_head_dim, prices)
        + _matmul(c.hidden_size * c.index_n_heads, prices.bf16)
        + _matmul(c.q_lora_rank * c.index_n_heads * c.index_head_dim, prices.fp8)
    )


def _score_flops(c, layer, context, prices):
    if layer.attention != "csa":
        return 0.0
    heads = c.index_n_heads * c.index_head_dim
    return _matmul(heads * (context // layer.ratio), prices.fp4_scores)


def _core_flops(config, layer, context, prices):
    # Queries times keys, and probabilities times values, which are the same entries.
    entries = attended_entries(config, layer, context)
    return _matmul(config.num_attention_heads * entries * 2 * config.head_dim, prices.bf16)


def attended_entries(config: ModelConfig, layer: LayerSpec, context: int) -> int:
    """How many entries one query's softmax runs over, the sink left out."""
    if layer.attention == "full":
        return context
    compressed = context // layer.ratio if layer.ratio else 0
    if layer.attention == "csa" and config.index_topk is not None:
        compressed = min(compressed, config.index_topk)
    return min(config.sliding_window, context) + compressed


def _routed_flops(c, prices):
    experts = 3 * c.hidden_size * c.moe_intermediate_size * c.num_experts_per_tok
    return _matmul(experts, prices.fp8) + _matmul(c.hidden_size * c.n_routed_experts, prices.bf16)


def _shared_flops(c, prices):
    return _matmul(3 * c.hidden_size * c.shared_intermediate_size, prices.fp8)


def _residual_flops(c, prices):
    if c.hc_mult == 1:
        return 0.0
    mix = (2 + c.hc_mult) * c.hc_mult
    return 2 * _matmul(mix * c.hc_mult * c.hidden_size, prices.bf16)


def _matmul(weights, price):
    return 2 * weights * price


@dataclasses.dataclass(frozen=True)
class V32:
    """DeepSeek-V3.2, with which the report compares: MLA and a token-wise indexer."""

    num_hidden_layers: int = 61
    num_dense_layers: int = 3
    hidden_size: int = 7168
    num_attention_heads: int = 128
    q_lora_rank: int = 1536
    kv_lora_rank: int = 512
    qk_nope_head_dim: int = 128
    qk_rope_head_dim: int = 64
    v_head_dim: int = 128
    index_n_heads: int = 64
    index_head_dim: int = 128
    index_topk: int = 2048
    intermediate_size: int = 18432
    moe_intermediate_size: int = 2048
    n_routed_experts: int = 256
    num_experts_per_tok: int = 8
    n_shared_experts: int = 1
    vocab_size: int = 129280

    def kv_bytes_per_token(self) -> float:
        """FP8 latent and index key with float32 scales a 128 channels, BF16 rotary channels."""
        entry = self.kv_lora_rank + 4 * (self.kv_lora_rank // 128) + 2 * self.qk_rope_head_dim
        index = self.index_head_dim + 4 * (self.index_head_dim // 128)
        return float(self.num_hidden_layers * (entry + index))

    def flops_per_token(self, context: int) -> dict[str, float]:
        """FLOPs of one decode step, by part, on the same count as `flops_per_token`."""
        d, layers, heads = self.hidden_size, self.num_hidden_layers, self.num_attention_heads
        index = self.index_n_heads * self.index_head_dim
        projections = d * self.q_lora_rank + d * (self.kv_lora_rank + self.qk_rope_head_dim)
        projections += self.q_lora_rank * heads * (self.qk_nope_head_dim + self.qk_rope_head_dim)
        projections += heads * self.v_head_dim * d
        absorbed = heads * self.kv_lora_rank * (self.qk_nope_head_dim + self.v_head_dim)
        indexer = _matmul(self.q_lora_rank * index + d * self.index_head_dim, REPORT.fp8)
        indexer += _matmul(d * self.index_n_heads, REPORT.bf16) + _matmul(
            index * context, REPORT.fp8
        )
        entries = min(self.index_topk, context)
        core = heads * entries * (2 * self.kv_lora_rank + self.qk_rope_head_dim)
        return {
            "projections": layers
            * (_matmul(projections, REPORT.fp8) + _matmul(absorbed, REPORT.bf16)),
            "indexer": layers * indexer,
            "attention": layers * _matmul(core, REPORT.bf16),
            "experts": self._expert_flops(),
            "head": _matmul(d * self.vocab_size, REPORT.bf16),
        }

    def _expert_flops(self):
        d = self.hidden_size
        chosen = self.num_experts_per_tok + self.n_shared_experts
        experts = _matmul(3 * d * self.moe_intermediate_size * chosen, REPORT.fp8)
        router = _matmul(d * self.n_routed_experts, REPORT.bf16)
        dense = _matmul(3 * d * self.intermediate_size, REPORT.fp8)
        sparse_layers = self.num_hidden_layers - self.num_dense_layers
        return sparse_layers * (experts + router) + self.num_dense_layers * dense
