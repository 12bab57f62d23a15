"""The weights of manifold-constrained hyper-connections (mHC, architecture section 3)."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array

from v4jax.config import ModelConfig
from v4jax.kernels.hyper_connections import api
from v4jax.model.layers import Execution, weight


class HyperConnection(nn.Module):
    """One sub-layer's mixing of the M residual streams. M = 1 is a plain residual, no weights."""

    config: ModelConfig
    execution: Execution

    def setup(self):
        m, d = self.config.hc_mult, self.config.hidden_size
        if m == 1:
            return
        rows = (2 + m) * m
        normal = nn.initializers.normal(self.config.initializer_range)
        # The paper starts the dynamic part at 0.01, so that the static base dominates at first.
        small = nn.initializers.constant(0.01)
        self.fn = weight(self, "fn", (rows, m * d), ("hc", "hc_embed"), normal)
        self.base = weight(self, "base", (rows,), ("hc",), nn.initializers.zeros)
        self.scale = weight(self, "scale", (3,), (None,), small)

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
        m, d = config.hc_mult, config.hidden_size
        if m == 1:
            return h_BTMD[:, :, 0]
        normal = nn.initializers.normal(config.initializer_range)
        small = nn.initializers.constant(0.01)
        fn = weight(self, "fn", (m, m * d), ("hc", "hc_embed"), normal)
        base = weight(self, "base", (m,), ("hc",), nn.initializers.zeros)
        scale = weight(self, "scale", (1,), (None,), small)
        fn, base, scale = (w.astype(jnp.float32) for w in (fn, base, scale))
        y_BTD = api.head(h_BTMD, fn, base, scale, eps=config.hc_eps, rms_eps=config.rms_norm_eps)
        return self.execution.round(y_BTD)
