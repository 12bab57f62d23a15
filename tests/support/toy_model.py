"""A recurrent model with the interface of `Transformer`, small enough to generate in milliseconds.

Its state mixes every token that came before, so that a token that is lost, repeated or fed to the
wrong row changes all that follow.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from v4jax.config import ModelConfig
from v4jax.named_configs import get_config
from v4jax.sharding.rules import ONE_DEVICE, Layout


def toy_config(**changes):
    sizes = {"vocab_size": 97, "hidden_size": 32, "eos_token_id": None}
    return dataclasses.replace(get_config("flash_tiny"), **(sizes | changes))


class ToyCache(NamedTuple):
    state_BD: Any
    lengths: Any
    room_BS: Any  # one slot a token, as a real cache has: its size is part of the program


class ToyOutput(NamedTuple):
    logits: Any
    cache: Any


@dataclasses.dataclass(frozen=True)
class ToyModel:
    config: ModelConfig = dataclasses.field(default_factory=toy_config)
    sharding: Layout = ONE_DEVICE

    def init(self, key):
        embed_key, mix_key, head_key = jax.random.split(key, 3)
        size, vocab = self.config.hidden_size, self.config.vocab_size
        params = {
            "embed": jax.random.normal(embed_key, (vocab, size)),
            "mix": 1.2 * jax.random.normal(mix_key, (size, size)) / size**0.5,
            "head": jax.random.normal(head_key, (size, vocab)),
        }
        return {"params": params, "buffers": {}}

    def init_cache(self, batch, max_length):
        return ToyCache(
            jnp.zeros((batch, self.config.hidden_size)),
            jnp.zeros(batch, jnp.int32),
            jnp.zeros((batch, max_length)),
        )

    def apply(self, variables, tokens_BT, cache=None, lengths=None, logits="all"):
        params = variables["params"]
        batch, count = tokens_BT.shape
        cache = self.init_cache(batch, count) if cache is None else cache
        lengths_B = jnp.full(batch, count, jnp.int32) if lengths is None else lengths

        def step(state_BD, at):
            mixed_BD = jnp.tanh(state_BD @ params["mix"] + params["embed"][tokens_BT[:, at]])
            state_BD = jnp.where((at < lengths_B)[:, None], mixed_BD, state_BD)
            return state_BD, state_BD

        state_BD, states_TBD = jax.lax.scan(step, cache.state_BD, jnp.arange(count))
        out_BTD = state_BD[:, None] if logits == "last" else jnp.swapaxes(states_TBD, 0, 1)
        new_cache = ToyCache(state_BD, cache.lengths + lengths_B, cache.room_BS)
        return ToyOutput(out_BTD @ params["head"], new_cache)
