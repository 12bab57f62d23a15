"""Turns with tool calls as the model wrote them, kept under the ids of their calls for a while.

A client sends a call back as JSON. Rendered anew, it may differ from the tokens that the model
chose, in spaces, in the order of arguments or in how a word is cut; then all that follows misses
the prefix cache. Where the turn comes back unchanged, its own tokens stand in.
"""

import collections
import json
import threading
import time
from collections.abc import Sequence
from typing import NamedTuple

from v4jax.chat.recipe import Said

TURNS, SECONDS = 4096, 3600.0
TOKENS = 1 << 22  # 34 MB of lists


class KeptTurn(NamedTuple):
    """What a turn said, the id that its answer began behind, and its tokens up to the end."""

    said: Said
    header: int
    tokens: Sequence[int]
    until: float


class KeptTurns:
    """The newest turns with calls; for several threads.

    Args:
      turns, tokens: how many are kept, and how many tokens together. seconds: for how long.
    """

    def __init__(self, turns: int = TURNS, tokens: int = TOKENS, seconds: float = SECONDS):
        self._most_turns, self._most_tokens, self._seconds = turns, tokens, seconds
        self._turns: collections.OrderedDict[tuple[str, str], KeptTurn] = collections.OrderedDict()
        self._tokens = 0
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._turns)

    def keep(self, tenant: str, said: Said, header: int, tokens: Sequence[int]) -> None:
        """Keeps a turn that has calls, for whom it was made."""
        turn = KeptTurn(said, header, tokens, time.monotonic() + self._seconds)
        with self._lock:
            self._drop((tenant, said.calls[0].id))
            self._turns[tenant, said.calls[0].id] = turn
            self._tokens += len(tokens)
            while self._turns and self._too_much():
                self._drop(next(iter(self._turns)))

    def find(self, tenant: str, said: Said) -> KeptTurn | None:
        """The turn with these very calls, ids too, reasoning and content; None if it changed."""
        if not said.calls:
            return None
        with self._lock:
            turn = self._turns.get((tenant, said.calls[0].id))
        if turn is None or turn.until < time.monotonic() or not _same(turn.said, said):
            return None
        return turn

    def forget(self, tenant: str) -> None:
        """Drops what was kept for one tenant."""
        with self._lock:
            for key in [key for key in self._turns if key[0] == tenant]:
                self._drop(key)

    def _too_much(self):
        old = next(iter(self._turns.values())).until < time.monotonic()
        return old or len(self._turns) > self._most_turns or self._tokens > self._most_tokens

    def _drop(self, key):
        turn = self._turns.pop(key, None)
        self._tokens -= 0 if turn is None else len(turn.tokens)


def _same(one: Said, other: Said) -> bool:
    if (one.reasoning, one.content, len(one.calls)) != (
        other.reasoning,
        other.content,
        len(other.calls),
    ):
        return False
    return all(
        mine.id == theirs.id
        and mine.name == theirs.name
        and _plain(mine.arguments) == _plain(theirs.arguments)
        for mine, theirs in zip(one.calls, other.calls, strict=True)
    )


def _plain(arguments):
    """The arguments whatever their spaces and order; 1 and 1.0 stay apart."""
    try:
        return json.dumps(json.loads(arguments), sort_keys=True)
    except (ValueError, RecursionError):
        return arguments
