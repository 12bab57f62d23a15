"""Which tokens of a row begin a block for a DSpark draft to learn from."""

import numpy as np

from v4jax.train.batch import Batch


def with_anchors(batch: Batch, numbers: range, stage: int, seed: int, most: int) -> Batch:
    """The batch with at most `most` anchors in each row, -1 where a row has fewer; on the host.

    Drawn by seed, stage and the row's number alone, as the rows themselves. An anchor and the token
    behind it are both targets, so something of its document stands before it.

    Args:
      numbers: of the batch's rows.
    """
    width = min(most, batch.tokens_BT.shape[1])
    found = np.full((len(numbers), width), -1, np.int32)
    for own, number, weight_T in zip(found, numbers, batch.weights_BTJ[..., 0], strict=True):
        target = weight_T > 0
        places = 1 + np.flatnonzero(target[:-1] & target[1:])
        rng = np.random.default_rng([seed, stage, number, 1])
        chosen = np.sort(rng.permutation(places)[:width])
        own[: chosen.size] = chosen
    return batch.replace(anchors_BA=found)
