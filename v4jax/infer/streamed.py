"""Generation with a model whose weights stay on disk; see `streamed.model`."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from v4jax.infer import sampling as sampling_lib
from v4jax.infer.programs import choose
from v4jax.streamed.model import StreamedTransformer
from v4jax.streamed.source import LayerSource


class StreamedDecoder:
    """In place of `programs.Decoder`: its calls return when their tokens are known.

    Args:
      model, source: as `v4jax.load(..., stream=True)` returns them.
      setting, key: how tokens are drawn.
    """

    runs_ahead = False  # a step whose tokens nobody wants would read gigabytes

    def __init__(
        self,
        model: StreamedTransformer,
        source: LayerSource,
        setting: sampling_lib.Sampling,
        key: jax.Array,
    ):
        self._model, self._source = model, source
        self._setting, self._key = setting, key

    def empty_cache(self, rows: int, capacity: int):
        """A cache for so many rows of so many tokens."""
        return self._model.init_cache(rows, capacity)

    def compile(self, chunks, cache, decode) -> float:
        """Nothing: programs of layers are compiled on the way, which counts as reading."""
        return 0.0

    def prefill(self, chunks, cache):
        """The first token of each row, [B], and the cache that holds the prompts."""
        logits_BV = jnp.zeros((len(chunks[0][0]), self._model.config.vocab_size), jnp.float32)
        for tokens_BT, lengths_B in chunks:
            out = self._run(tokens_BT, cache, jnp.asarray(lengths_B))
            logits_BV = jnp.where(lengths_B[:, None] > 0, out.logits[:, 0], logits_BV)
            cache = out.cache
        return self._choice(logits_BV, 0), cache

    def decode(self, tokens_B, cache, step: int):
        """The token after `tokens_B` in each row, and the cache that holds `tokens_B` too."""
        # Of rows that ended with logits that are not finite, which the caller refuses.
        tokens_B1 = np.maximum(np.asarray(tokens_B), 0)[:, None]
        out = self._run(tokens_B1, cache, None)
        return self._choice(out.logits[:, 0], step), out.cache

    def _run(self, tokens_BT, cache, lengths_B) -> Any:
        options = {"cache": cache, "lengths": lengths_B, "logits": "last"}
        return self._model.apply(self._source, tokens_BT, **options)

    def _choice(self, logits_BV, step):
        model = self._model.transformer
        return choose(model, logits_BV, self._setting, self._key, step)
