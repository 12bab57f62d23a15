"""What a forward pass returns."""

from typing import Any

from flax import struct

from v4jax.reprs import short_repr


@struct.dataclass
class Output:
    """What `model.apply` returns.

    logits float32: [B,T,V], or [B,1,V] of each row's last token, or None with logits="none" and
    "normed". normed, mtp_normed: with logits="normed" what the output head would multiply, [B,T,D].
    cache: the new decode state, when one went in. mtp_logits: with mtp=True one array for each
    MTP block k = 1, 2, ...: [B,T-k,V], at t the prediction of token t + k + 1.
    aux: wanted auxiliary outputs, `aux[name][layer]`; MTP blocks count on after the layers.
    streams: [B,T,M,D] after the last layer, with logits="none" or aux=("last_streams",).
    """

    logits: Any = None
    cache: Any = None
    mtp_logits: Any = ()
    aux: Any = struct.field(default_factory=dict)
    streams: Any = None
    normed: Any = None
    mtp_normed: Any = ()

    def __repr__(self) -> str:
        return short_repr(self)
