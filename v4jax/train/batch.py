"""What a step trains on: rows of tokens, and for each of them what is to be predicted there."""

from typing import Any

import numpy as np
from flax import struct
from jaxtyping import Bool, Int, Real


@struct.dataclass
class Batch:
    """Rows of packed documents; every array has a row axis and most a token axis, which may be cut.

    tokens_BT. targets_BTJ: the token j + 1 places further on, one column for the model and one for
    each MTP block. weights_BTJ: float32, how much that target counts, 0 where it does not: it
    lies beyond its document, or is masked. segment_ids_BT: one run of equal ids per document (None:
    every row is one document). anchors_BA: the tokens of each row at which a draft's blocks begin,
    -1 for none, where a draft is trained (`anchors`).
    """

    tokens_BT: Any
    targets_BTJ: Any
    weights_BTJ: Any
    segment_ids_BT: Any = None
    anchors_BA: Any = None


def make_batch(
    rows_BX: Int[np.ndarray, "b x"],
    documents_BX: Int[np.ndarray, "b x"],
    counts_BX: Bool[np.ndarray, "b x"] | Real[np.ndarray, "b x"],
    ahead: int,
    packed: bool = True,
) -> Batch:
    """Cuts rows of T + `ahead` tokens into inputs and targets, on the host.

    Args:
      rows_BX: ids. documents_BX: the document that each token belongs to.
      counts_BX: how much a token counts as a target, or whether (supervised fine-tuning: what the
        model says).
      ahead: how many tokens further the last column of targets looks; 1 + the MTP blocks k = 1, ...
      packed: keep attention inside documents; else a row is one text, whatever stands in it.
    """
    length = rows_BX.shape[1] - ahead
    shifted = [slice(1 + j, 1 + j + length) for j in range(ahead)]
    here = documents_BX[:, :length]
    # A document's last token predicts nothing: what follows it is no continuation.
    weights = [
        np.where((documents_BX[:, at] == here) | (not packed), counts_BX[:, at], 0)
        for at in shifted
    ]
    for block, weight in enumerate(weights):
        weight[:, length - block :] = 0  # MTP block k has no input for a row's last k tokens
    return Batch(
        tokens_BT=np.ascontiguousarray(rows_BX[:, :length], np.int32),
        targets_BTJ=np.stack([rows_BX[:, at] for at in shifted], axis=-1).astype(np.int32),
        weights_BTJ=np.stack(weights, axis=-1).astype(np.float32),
        segment_ids_BT=np.ascontiguousarray(here, np.int32) if packed else None,
    )
