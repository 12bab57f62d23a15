"""Multi-token prediction: a block that reads the streams and the next token (section 8)."""

import flax.linen as nn
from jaxtyping import Array

from v4jax import weights
from v4jax.config import LayerSpec, ModelConfig
from v4jax.model.block import Block
from v4jax.model.cache import LayerCache
from v4jax.model.context import Context
from v4jax.model.hyper_connections import HyperHead
from v4jax.model.layers import Execution, Projection, RMSNorm


class MTPBlock(nn.Module):
    """Predicts one token further than the streams it reads; the output head is the model's."""

    config: ModelConfig
    spec: LayerSpec
    execution: Execution

    def setup(self):
        config, execution = self.config, self.execution
        d, eps = config.hidden_size, config.rms_norm_eps
        declared = weights.mtp(config, self.spec)
        self.enorm = RMSNorm(d, eps, execution)
        self.hnorm = RMSNorm(d, eps, execution)
        self.e_proj = Projection(declared["e_proj/weight"], execution)
        self.h_proj = Projection(declared["h_proj/weight"], execution)
        self.block = Block(config, self.spec, execution)
        self.hc_head = HyperHead(config, execution)
        self.norm = RMSNorm(d, eps, execution)

    def __call__(
        self,
        h_BTMD: Array,
        e_BTD: Array,
        context: Context,
        replay=None,
        cache: LayerCache | None = None,
    ):
        """The new streams, the normed state for the output head, auxiliary arrays, the new cache.

        Args:
          h_BTMD: streams of tokens t. e_BTD: embeddings of tokens t + 1.
          context: the places of tokens t + 1 (their ids; positions counted from t).
          replay: as for `Block`.
          cache: the block's own window, whose rows are those of earlier pairs.
        """
        e = self.e_proj("btd,xd->btx", self.enorm(e_BTD))
        h = self.h_proj("btmd,xd->btmx", self.hnorm(h_BTMD))
        z_BTMD = self.execution.round(e[:, :, None] + h)
        z_BTMD, cache, aux = self.block(z_BTMD, context, cache, replay=replay)
        return z_BTMD, self.norm(self.hc_head(z_BTMD)), aux, cache
