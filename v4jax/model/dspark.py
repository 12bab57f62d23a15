"""DSpark: a draft of several tokens at once that reads the model's layers as its context.

Stages are window blocks behind the model's layers. For every token that the model has run, each
stage has one kv row, made of the target layers' outputs (`taps`), in a ring of the last W. A draft
is one pass over a block of tokens, the anchor and noise: every one of its queries sees all ring
rows, all rows of the block, and the sink. Then a small head corrects each token's logits by the
token before it, and another tells how likely the draft is to be accepted.
"""

from typing import Any, NamedTuple

import flax.linen as nn
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array

from v4jax import weights
from v4jax.config import WINDOW, ModelConfig
from v4jax.kernels.sparse_attention import api as sparse_attention
from v4jax.model.block import Block
from v4jax.model.context import Context
from v4jax.model.hyper_connections import HyperHead
from v4jax.model.keys import Keys
from v4jax.model.layers import Execution, Projection, RMSNorm


class Heads(NamedTuple):
    """The last stage's small weights: markov_w1, markov_w2 [V,r] and the confidence's [1,D+r]."""

    before_VX: Any
    after_VX: Any
    confidence_1X: Any


@struct.dataclass
class Ring:
    """What a stage's queries attend to; takes the place of `keys.LayerState`.

    Attributes:
      rows_BWH: the ring, the newest row last. length_B: tokens that have ever had a row.
    """

    rows_BWH: Any
    length_B: Any
    cache = None

    def extend_window(self, kv_BTH: Array, context: Context, window: int) -> tuple[Keys, "Ring"]:
        """The ring's real rows and all rows of the block, the same for every query of it."""
        rows = jnp.concatenate([self.rows_BWH, kv_BTH.astype(self.rows_BWH.dtype)], axis=1)
        shape = kv_BTH.shape[:2]
        low = jnp.broadcast_to(jnp.maximum(window - self.length_B, 0)[:, None], shape)
        high = jnp.full(shape, rows.shape[1], jnp.int32)
        return Keys(entries_BCH=rows, low_BT=low, high_BT=high), self

    def attend(self, q_BTNH, sink_N, keys: Keys, scale: float, implementation):
        """The core attention [B,T,N,H] and its log-sum-exp."""
        options = {"scale": scale, "implementation": implementation, "with_lse": True}
        return sparse_attention.sparse_attention(q_BTNH, sink_N, **options, **keys._asdict())


class DSparkStage(nn.Module):
    """One stage; the first also reads the context, the last also has the heads."""

    config: ModelConfig
    stage: int
    execution: Execution

    def setup(self):
        config, execution = self.config, self.execution
        d, eps = config.hidden_size, config.rms_norm_eps
        declared = weights.draft(config, self.stage)
        self.block = Block(config, WINDOW, execution)
        if self.stage == 0:
            self.main_proj = Projection(declared["main_proj/weight"], execution)
            self.main_norm = RMSNorm(d, eps, execution)
        if self.stage == config.draft_layers - 1:
            self.norm = RMSNorm(d, eps, execution)
            self.hc_head = HyperHead(config, execution)
            self.markov_head = MarkovHead(config, execution)
            self.confidence_head = ConfidenceHead(config, execution)

    def read(self, features_BTX: Array) -> Array:
        """What all stages make their context's rows of, [B,T,D]."""
        return self.main_norm(self.main_proj("btx,dx->btd", features_BTX))

    def rows(self, f_BTD: Array, position_BT: Array) -> Array:
        """The stage's ring rows of these tokens, [B,T,H]."""
        return self.block.rows(f_BTD, position_BT)

    def __call__(self, x_BTMD: Array, context: Context, ring: Ring) -> Array:
        """The streams of the block after the stage."""
        return self.block(x_BTMD, context, state=ring)[0]

    def collapse(self, x_BTMD: Array) -> tuple[Array, Array]:
        """Of the last stage's streams: the state [B,T,D] before the norm, and after it."""
        y_BTD = self.hc_head(x_BTMD)
        return y_BTD, self.norm(y_BTD)

    def heads(self) -> Heads:
        """The weights of the heads, which are used one token after the other."""
        markov = self.markov_head
        before, after = markov.markov_w1.weight, markov.markov_w2.weight
        return Heads(before, after, self.confidence_head.proj.weight)


class MarkovHead(nn.Module):
    """What the token before adds to a token's logits: a table and a matrix of low rank."""

    config: ModelConfig
    execution: Execution

    def setup(self):
        declared = weights.markov_head(self.config)
        self.markov_w1 = Projection(declared["markov_w1/weight"], self.execution)
        self.markov_w2 = Projection(declared["markov_w2/weight"], self.execution)


class ConfidenceHead(nn.Module):
    """How likely a draft is to be accepted if those before it are: one row of weights."""

    config: ModelConfig
    execution: Execution

    def setup(self):
        declared = weights.confidence_head(self.config)
        self.proj = Projection(declared["proj/weight"], self.execution)
