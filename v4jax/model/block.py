"""One layer, and the unit of layers that a segment repeats."""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
from jaxtyping import Array

from v4jax.config import LayerSpec, ModelConfig
from v4jax.model import taps
from v4jax.model.attention import Attention
from v4jax.model.cache import LayerCache
from v4jax.model.context import Context
from v4jax.model.hyper_connections import HyperConnection
from v4jax.model.keys import LayerState
from v4jax.model.layers import Execution, RMSNorm
from v4jax.model.moe import MoE


class Block(nn.Module):
    """mHC around attention, mHC around the experts (architecture section 2)."""

    config: ModelConfig
    spec: LayerSpec
    execution: Execution

    def setup(self):
        config, execution = self.config, self.execution
        d, eps = config.hidden_size, config.rms_norm_eps
        self.hc_attn = HyperConnection(config, execution)
        self.attn_norm = RMSNorm(d, eps, execution)
        self.attn = Attention(config, self.spec, execution)
        self.hc_ffn = HyperConnection(config, execution)
        self.ffn_norm = RMSNorm(d, eps, execution)
        self.ffn = MoE(config, self.spec, execution)

    def __call__(
        self,
        h_BTMD: Array,
        context: Context,
        cache: LayerCache | None = None,
        layer: int | Array = 0,
        replay: dict[str, Array] | None = None,
        state: Any = None,
    ):
        """The streams after the layer, its new cache and auxiliary arrays by name.

        Streams of the tokens whose output is wanted, if the context says so.

        Args:
          h_BTMD: residual streams. context: the tokens' places.
          cache, layer: the segment's buffers and which repeat this is.
          replay: "router_experts" and "chosen" to use instead of the layer's own choices.
          state: where the keys come from, instead of the cache (`dspark.Ring`).
        """
        replay = replay or {}
        state = state or LayerState(self.execution.layout, cache, layer)
        between, context, state, aux = before_experts(self, h_BTMD, context, state, replay)
        y_BTD, routing = self.ffn(between.x_BTD, context, replay.get("router_experts"))
        h_BTMD, after = after_experts(self, y_BTD, between, context)
        return h_BTMD, state.cache, aux | routing | after

    def rows(self, x_BTD: Array, position_BT: Array) -> Array:
        """The attention's kv rows of inputs that did not come through the layer."""
        return self.attn.rows(x_BTD, position_BT)


class Between(NamedTuple):
    """A layer between its attention and its experts.

    Attributes:
      h_BTMD: the streams after the attention. mixing: how the experts' output enters them.
      x_BTD: the experts' input.
    """

    h_BTMD: Any
    mixing: Any
    x_BTD: Any


# Functions and not methods: Linen would give their operations names of their own.


def before_experts(block: Block, h_BTMD, context: Context, state, replay):
    """The first half of a layer: attention, up to the experts' input.

    Returns:
      `Between`, the context of the tokens whose output is wanted, the new state, and auxiliary
      arrays by name.
    """
    u_BTD, mixing = block.hc_attn.pre(h_BTMD)
    x_BTD = block.attn_norm(u_BTD)
    y_BTD, state, aux = block.attn(x_BTD, context, state, replay.get("chosen"))
    h_BTMD, mixing = jax.tree.map(context.only_wanted, (h_BTMD, mixing))
    context = context.for_queries()
    h_BTMD, u_BTD, ffn_mixing = block.hc_ffn.post_pre(y_BTD, h_BTMD, mixing)
    if "mhc" in context.aux and mixing is not None:
        aux = aux | {"mhc_attn": mixing[1], "mhc_ffn": ffn_mixing[1]}
    return Between(h_BTMD, ffn_mixing, block.ffn_norm(u_BTD)), context, state, aux


def after_experts(block: Block, y_BTD, between: Between, context: Context):
    """The second half: the streams with the experts' output y, and auxiliary arrays by name."""
    h_BTMD = block.hc_ffn.post(y_BTD, between.h_BTMD, between.mixing)
    return h_BTMD, {"streams": h_BTMD} if "streams" in context.aux else {}


class Unit(nn.Module):
    """The layers between two repeats of a segment, called in order."""

    config: ModelConfig
    specs: tuple[LayerSpec, ...]
    execution: Execution

    @nn.compact
    def __call__(self, carry, step, context: Context):
        """A step of a scan over repeats.

        Args:
          carry: streams, caches, and the taps of `model.taps` if a draft reads them.
          step: index, replays, and the taps' slots (empty where there are none).
        """
        h_BTMD, caches, tapped = carry
        index, replays, slots = step
        kept, auxes = [], []
        for i, spec in enumerate(self.specs):
            block = Block(self.config, spec, self.execution, name=f"block_{i}")
            cache = None if caches is None else caches[i]
            last = i == len(self.specs) - 1
            here = context.replace(last_only=context.last_only and last)
            h_BTMD, cache, aux = block(h_BTMD, here, cache, index, replays[i])
            kept.append(cache)
            auxes.append(aux)
            if slots and slots[i] is not None:
                tapped = taps.write(tapped, slots[i], h_BTMD, self.execution)
        return (h_BTMD, None if caches is None else tuple(kept), tapped), tuple(auxes)
