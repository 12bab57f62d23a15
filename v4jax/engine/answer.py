"""An answer as it comes: tokens to events, with stop ids and stop texts found on the way.

A token that may turn out to belong to a stop text is held back until that is known, since nothing
that was handed out is ever taken back.
"""

import dataclasses

from v4jax.engine.request import Event, TokenLogprob


@dataclasses.dataclass
class _Held:
    """A token that was not handed out, and where its text ends; None: it is not whole yet."""

    token: int
    logprob: TokenLogprob | None
    drafted: bool
    end: int | None = None


class Answer:
    """The new tokens of one request.

    Args:
      stop_ids, stop: ids and texts that end the answer. limit: tokens that it may have.
      text: a `TextStream` of the engine's tokenizer, or None.
    """

    def __init__(self, stop_ids, stop, limit: int, text=None):
        self._stop_ids, self._stop, self._limit = stop_ids, stop, limit
        self._text = text
        self._held: list[_Held] = []
        self._waiting = ""  # text that was not handed out
        self._shown = 0  # characters that were
        self.count = 0  # tokens so far, held back or not
        self.finish: str | None = None

    def add(
        self, token: int, logprob: TokenLogprob | None = None, drafted: bool = False
    ) -> Event | None:
        """Takes one token; what can be handed out now, or None."""
        if token in self._stop_ids:
            self.finish = "stop"
            return self._all_out()
        self.count += 1
        self._held.append(_Held(token, logprob, drafted))
        if self._text is not None:
            self._take(self._text.add(token))
        if (at := self._found()) >= 0:
            self.finish = "stop"
            return self._out(at)
        if self.count >= self._limit:
            self.finish = "length"
            return self._all_out()
        return self._out(self._safe())

    def end(self, finish: str, error: str | None = None) -> Event:
        """Ends the answer from outside; with what was held back."""
        self.finish = finish
        return self._all_out()._replace(error=error)

    def _take(self, piece):
        """Text that the newest tokens complete; a character may have been spread over several."""
        if not piece:
            return
        self._waiting += piece
        for held in self._held:
            if held.end is None:
                held.end = self._shown + len(self._waiting)

    def _found(self) -> int:
        """Where in the waiting text the first stop text begins; -1 for none."""
        places = [self._waiting.find(stop) for stop in self._stop]
        return min((place for place in places if place >= 0), default=-1)

    def _safe(self) -> int:
        """How many characters of the waiting text can belong to no stop text any more."""
        size = len(self._waiting)
        for start in range(size):
            if any(stop.startswith(self._waiting[start:]) for stop in self._stop):
                return start
        return size

    def _all_out(self):
        if self._text is not None:
            self._take(self._text.flush())
        if (at := self._found()) >= 0:
            self.finish = "stop"
            return self._out(at)
        return self._out(len(self._waiting), everything=True)

    def _out(self, characters, everything=False):
        """An event of so many characters, and of the tokens whose text ends by then.

        everything: all tokens, also those whose text is not whole.
        """
        text, self._waiting = self._waiting[:characters], self._waiting[characters:]
        self._shown += characters
        count = len(self._held)
        if not everything and self._stop:
            count = sum(
                1 for held in self._held if held.end is not None and held.end <= self._shown
            )
        out, self._held = self._held[:count], self._held[count:]
        if not out and not text and self.finish is None:
            return None
        logprobs = tuple(held.logprob for held in out if held.logprob is not None)
        drafted = tuple(place for place, held in enumerate(out) if held.drafted)
        tokens = tuple(held.token for held in out)
        return Event(tokens, text, logprobs, self.finish, drafted=drafted)
