"""Requests that the lens can look into: their tokens, in memory, the newest only."""

import collections
import dataclasses
import threading
import time
from collections.abc import Collection, Sequence
from typing import Any


@dataclasses.dataclass(frozen=True)
class Seen:
    """A request that has ended.

    Attributes:
      tenant: whose it is. tokens: ids of prompt and answer. prompt_tokens: how many are the
        prompt's; of those `cached_tokens` came from the prefix cache.
      drafted: places among the answer's tokens that a draft proposed.
      ended: when, in seconds of `time.time`.
    """

    tenant: str
    tokens: tuple[int, ...]
    prompt_tokens: int
    cached_tokens: int
    drafted: frozenset[int]
    ended: float

    def origin(self, position: int) -> str:
        """Where a token comes from: "cache", "prefill", "decode" or "draft"."""
        if position < self.prompt_tokens:
            return "cache" if position < self.cached_tokens else "prefill"
        return "draft" if position - self.prompt_tokens in self.drafted else "decode"


class SeenRequests:
    """Keeps the newest requests; safe to use from several threads.

    Args:
      most: how many. most_tokens: of all of them together.
    """

    def __init__(self, most: int = 64, most_tokens: int = 1 << 21):
        self._most, self._most_tokens = most, most_tokens
        self._found: collections.OrderedDict[str, Seen] = collections.OrderedDict()
        self._tokens = 0
        self._lock = threading.Lock()

    def add(
        self,
        request: str,
        tenant: str,
        tokens: Sequence[int],
        prompt_tokens: int,
        cached_tokens: int = 0,
        drafted: Collection[int] = (),
    ) -> None:
        """Takes a request in; the oldest go. One that is too long alone is not kept."""
        if len(tokens) > self._most_tokens:
            return
        seen = Seen(
            tenant, tuple(tokens), prompt_tokens, cached_tokens, frozenset(drafted), time.time()
        )
        with self._lock:
            self._drop(request)
            self._found[request] = seen
            self._tokens += len(seen.tokens)
            while len(self._found) > self._most or self._tokens > self._most_tokens:
                self._drop(next(iter(self._found)))

    def get(self, request: str, tenant: str) -> Seen | None:
        """A tenant's own request; None for any other, whether it is there or not."""
        with self._lock:
            seen = self._found.get(request)
        return seen if seen is not None and seen.tenant == tenant else None

    def delete(
        self,
        request: str | None = None,
        tenant: str | None = None,
        older_than: float = 0.0,
    ) -> int:
        """Forgets what fits all that is given; how many.

        older_than: seconds since a request ended.
        """
        before = time.time() - older_than
        with self._lock:
            gone = [
                name
                for name, seen in self._found.items()
                if request in (None, name)
                and tenant in (None, seen.tenant)
                and seen.ended <= before
            ]
            for name in gone:
                self._drop(name)
        return len(gone)

    def _drop(self, request):
        seen = self._found.pop(request, None)
        self._tokens -= 0 if seen is None else len(seen.tokens)


def told(seen: Seen, texts: dict[int, str]) -> dict[str, Any]:
    """The request as JSON: every token with its text and its origin."""
    return {
        "prompt_tokens": seen.prompt_tokens,
        "cached_tokens": seen.cached_tokens,
        "tokens": [
            {"id": token, "text": texts[token], "origin": seen.origin(position)}
            for position, token in enumerate(seen.tokens)
        ],
    }
