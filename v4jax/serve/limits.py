"""Limits of each key: requests and tokens in the last minute, requests at the same time."""

import collections
import time
from collections.abc import Callable

from v4jax.serve.errors import Refused
from v4jax.serve.keys import Key

MINUTE = 60.0


class Use:
    """What one key has used of late."""

    def __init__(self):
        self.requests: collections.deque[float] = collections.deque()
        self.tokens: collections.deque[list] = collections.deque()  # [when, how many]
        self.running = 0


class Rate:
    """At most so many a minute; for one thread."""

    def __init__(self, limit: int, clock: Callable[[], float] = time.monotonic):
        self._limit, self._clock = limit, clock
        self._times: collections.deque[float] = collections.deque()

    def allows(self) -> bool:
        """Whether one more may be; it counts then."""
        now = self._clock()
        while self._times and self._times[0] <= now - MINUTE:
            self._times.popleft()
        if len(self._times) >= self._limit:
            return False
        self._times.append(now)
        return True


class Limits:
    """All keys' use; for one thread. clock: seconds."""

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        self._clock = clock
        self._uses: collections.defaultdict[str, Use] = collections.defaultdict(Use)

    def begin(self, key: Key) -> None:
        """Counts a request in; `end` has to follow.

        Raises:
          Refused: it is one too many.
        """
        use, now = self._uses[key.id], self._clock()
        while use.requests and use.requests[0] <= now - MINUTE:
            use.requests.popleft()
        if key.concurrent is not None and use.running >= key.concurrent:
            raise _too_many(f"{key.concurrent} requests at a time", 1)
        if key.requests_per_minute is not None:
            if len(use.requests) >= key.requests_per_minute:
                wait = use.requests[0] + MINUTE - now
                raise _too_many(f"{key.requests_per_minute} requests a minute", wait)
            use.requests.append(now)
        use.running += 1

    def end(self, key: Key) -> None:
        """The request has ended."""
        use = self._uses[key.id]
        use.running -= 1
        if not (use.running or use.requests or use.tokens):
            del self._uses[key.id]

    def reserve(self, key: Key, tokens: int) -> list | None:
        """Counts the most tokens that a request can have; give what comes back to `settle`.

        Raises:
          Refused: more than is left of this minute.
        """
        limit = key.tokens_per_minute
        if limit is None:
            return None
        if tokens > limit:
            raise Refused(
                400,
                f"the prompt and max_tokens are {tokens} tokens together; expected at most the "
                f"{limit} tokens a minute of this key: ask for fewer",
                code="tokens_per_minute",
            )
        use, now = self._uses[key.id], self._clock()
        while use.tokens and use.tokens[0][0] <= now - MINUTE:
            use.tokens.popleft()
        wait, room = 0.0, limit - sum(count for _, count in use.tokens)
        for when, count in [*use.tokens, (now, 0)]:
            if tokens <= room:
                break
            room, wait = room + count, when + MINUTE - now
        if tokens > limit - sum(count for _, count in use.tokens):
            raise _too_many(f"{limit} tokens a minute", wait)
        use.tokens.append([now, tokens])
        return use.tokens[-1]

    @staticmethod
    def settle(reserved: list | None, tokens: int) -> None:
        """The tokens that a request has really had."""
        if reserved is not None:
            reserved[1] = min(tokens, reserved[1])


def _too_many(what: str, wait: int | float) -> Refused:
    return Refused(
        429, f"this key may have {what}; try again later", code="rate_limit", retry_after=wait
    )
