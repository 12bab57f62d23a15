"""`GET /lens`: a request's tokens, and the figures of one of them.

It runs a prompt again, on the device that serves: one at a time, and off unless it is asked for.
"""

import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from v4jax.errors import InputError
from v4jax.serve.seen import SeenRequests, told

Figures = Callable[[Sequence[int], int], dict[str, Any]]


class Unavailable(Exception):
    """The lens cannot answer: a status and one sentence."""

    def __init__(self, status: int, message: str):
        super().__init__(message)
        self.status, self.message = status, message


class Look:
    """Answers of `/lens`; blocking, for a thread pool.

    Args:
      figures: `Lens.figures` of the model that serves.
      text_of: a token's own text, special tokens by name.
      requests: what can be looked into.
    """

    def __init__(
        self,
        figures: Figures,
        text_of: Callable[[int], str],
        requests: SeenRequests,
    ):
        self.requests = requests
        self._figures, self._text_of = figures, text_of
        self._one = threading.Lock()

    def __call__(self, query: Mapping[str, str], tenant: str) -> dict[str, Any]:
        """The answer to `?request=ID`, or to `?request=ID&position=P`.

        Raises:
          Unavailable: a request that is not there or is another tenant's, a position that it does
            not have, or another look that is under way.
        """
        seen = self.requests.get(query.get("request", ""), tenant)
        if seen is None:
            raise Unavailable(
                404,
                "there is no such request; expected the id of one of the newest that have ended, "
                "made with the same key",
            )
        if "position" not in query:
            return told(seen, {token: self._text_of(token) for token in set(seen.tokens)})
        position = query["position"]
        if not (position.isascii() and position.isdecimal() and len(position) < 12):
            raise Unavailable(400, "position is no number; expected one from 0 on")
        if not self._one.acquire(timeout=30):
            raise Unavailable(503, "another token is being looked at; try again")
        try:
            found = self._figures(seen.tokens, int(position))
        except InputError as error:
            raise Unavailable(400, str(error)) from None
        finally:
            self._one.release()
        return found | {"texts": {str(i): self._text_of(i) for i in _named(found)}}


def _named(figures) -> set[int]:
    """Ids whose text a reader wants to see."""
    likely = [each for each in (figures["before"], figures["next"]) if each]
    return {figures["token"], *(row["token"] for each in likely for row in each["top"])}
