"""Where a streamed model's weights come from: the one seam to the files that hold them."""

from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np


@runtime_checkable
class LayerSource(Protocol):
    """Weights read item by item; calls may come from several threads at once.

    Items are those of `weights.items`. What is returned lies on the device, and nothing of it is
    kept. `checkpoints.streamed.StreamedWeights` reads a checkpoint.

    Attributes:
      expert_bytes: what one routed expert takes in memory.
      head_row_bytes: what one row of the output head takes in memory.
    """

    expert_bytes: int
    head_row_bytes: int

    def embedding(self, ids: np.ndarray) -> jax.Array:
        """Rows of the embedding, [*ids.shape, D]."""
        ...

    def dense(self, item: str) -> dict[str, Any]:
        """An item's variables {"params", "buffers"} without routed experts, embedding and head."""
        ...

    def experts(self, item: str, chosen: np.ndarray, room: int) -> dict[str, Any]:
        """w1, w2 and w3 of the chosen experts of a layer, stacked, zeros behind them.

        Args:
          chosen: their numbers. room: the length of the stack, at least as many.
        """
        ...

    def head_rows(self, first: int, end: int) -> jax.Array:
        """Rows of the output head, [end - first, D]."""
        ...
