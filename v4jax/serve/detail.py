"""What a client may ask to be told of an answer's tokens, beside their text.

A stream whose request has the header below gets one more event for each step of the engine.
"""

from typing import Any

from v4jax.engine.request import Event, Result

HEADER = "x-v4jax-detail"
EVENT = "v4jax"


class Detail:
    """The tokens of one answer, as they come.

    Args:
      request: the request's id. prompt_tokens: length of its prompt.

    Attributes:
      drafted: places among the answer's tokens that a draft proposed.
    """

    def __init__(self, request: str, prompt_tokens: int):
        self._request, self._prompt_tokens = request, prompt_tokens
        self._count = 0
        self._newest: tuple[int, int, tuple[int, ...]] = (0, 0, ())
        self.drafted: list[int] = []

    def saw(self, event: Event) -> None:
        """Takes an event in."""
        self._newest = (self._count, len(event.tokens), event.drafted)
        self.drafted += [self._count + place for place in event.drafted]
        self._count += len(event.tokens)

    def told(self, so_far: Result) -> dict[str, Any] | None:
        """What is told of the newest event; None where it had no tokens."""
        first, count, drafted = self._newest
        if not count:
            return None
        return {
            "request": self._request,
            "prompt_tokens": self._prompt_tokens,
            "cached_tokens": so_far.cached_tokens,
            "first": first,
            "count": count,
            "drafted": list(drafted),
        }
