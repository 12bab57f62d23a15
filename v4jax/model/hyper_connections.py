"""The weights of manifold-constrained hyper-connections (mHC, architecture section 3)."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array

from v4jax import weights
from v4jax.config import ModelConfig
from v4jax.kernels.hyper_connections import api
from v4jax.model.layers import Execution, weight


class HyperConnection(nn.Module):
    """One sub-layer's mixing of the M residual streams. M = 1 is a plain residual, no weights."""

    config: ModelConfig
    execution: Execution

    def setup(self):
        if self.config.hc_mult == 1:
            return
        declared = weights.hyper_connection(self.config)
        self.fn = weight(self, "fn", declared["fn"])
        self.base = weight(self, "base", declared["base"])
        self.scale = weight(self, "scale", declared["scale"])

    def pre(self, h_BTMD: Array):
        """The sub-layer's input [B,T,D], rounded, and (post, comb) for `post`."""
        if self.config.hc_mult == 1:
            return h_BTMD[:, :, 0], None
        with jax.named_scope("mix"):
            u_BTD, *mixing = api.pre(h_BTMD, *self._weights(), **self._options())
        return u_BTD, tuple(mixing)

    def post(self, y_BTD: Array, h_BTMD: Array, mixing) -> Array:
        """The streams after the sub-layer's output y, rounded."""
        if mixing is None:
            return self.execution.round(h_BTMD + y_BTD[:, :, None])
        execution = self.execution
        options = {"dtype": execution.dtype, "implementation": execution.kernels}
        with jax.named_scope("mix"):
            return api.post(y_BTD, h_BTMD, *mixing, **options)

    def post_pre(self, y_BTD: Array, h_BTMD: Array, mixing):
        """The streams after another sub-layer's output y, whose mixing it is, and `pre` of them."""
        if mixing is None:
            h_BTMD = self.post(y_BTD, h_BTMD, mixing)
            return h_BTMD, *self.pre(h_BTMD)
        arrays = (y_BTD, h_BTMD, *mixing, *self._weights())
        with jax.named_scope("mix"):
            h_BTMD, u_BTD, *mixing = api.post_pre(*arrays, **self._options())
        return h_BTMD, u_BTD, tuple(mixing)

    def _weights(self):
        return tuple(w.astype(jnp.float32) for w in (self.fn, self.base, self.scale))

    def _options(self):
        config = self.config
        return {
            "iterations": config.hc_sinkhorn_iters,
            "eps": config.hc_eps,
            "rms_eps": config.rms_norm_eps,
            "dtype": self.execution.dtype,
            "implementation": self.execution.kernels,
        }


class HyperHead(nn.Module):
    """The streams collapsed before the output head."""

    config: ModelConfig
    execution: Execution

    @nn.compact
    def __call__(self, h_BTMD: Array) -> Array:
        config = self.config
        if config.hc_mult == 1:
            return h_BTMD[:, :, 0]
        declared = weights.hyper_head(config)
        fn, base, scale = (
            weight(self, name, declared[name]).astype(jnp.float32)
            for name in ("fn", "base", "scale")
        )
        y_BTD = api.head(h_BTMD, fn, base, scale, eps=config.hc_eps, rms_eps=config.rms_norm_eps)
        return self.execution.round(y_BTD)
