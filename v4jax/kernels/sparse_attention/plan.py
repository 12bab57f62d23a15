"""What each implementation of sparse attention is given next to the differentiated arrays."""

import dataclasses
from typing import Any, NamedTuple


@dataclasses.dataclass(frozen=True)
class Plan:
    """What the trace needs to know.

    scale: factor on q.k. window: rows that a query sees before and with its own. topk: the most
    entries that a query chooses (0: no choice, every visible entry).
    """

    scale: float
    window: int
    topk: int = 0


class Visible(NamedTuple):
    """Which keys each query sees; see `api.sparse_attention`. None where there is no such key.

    first_BT; low_BT, high_BT; and the choice, chosen_BTK or member_BTW.
    """

    first: Any = None
    low: Any = None
    high: Any = None
    chosen: Any = None
    member: Any = None
