"""A request on its way: the caller's end of it."""

import queue
import time
from collections.abc import Callable, Iterator

from v4jax.engine.request import Event, Result, TokenLogprob


class Stream:
    """The events of one request, to be iterated over once; `result` gives them together.

    Args:
      prompt_tokens: length of the prompt.
      work: called while an event is awaited; makes the engine go on, or waits for its thread.
      cancel: called with this stream to end the request.
      notify: called, by whichever thread makes the steps, once the request has a slot and after
        every event.
    """

    def __init__(
        self,
        prompt_tokens: int,
        work: Callable[[], None],
        cancel: Callable[["Stream"], None],
        notify: Callable[[], None] = lambda: None,
    ):
        self._events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self._work, self._cancel, self._notify = work, cancel, notify
        self._result = Result(prompt_tokens)
        self._began = time.perf_counter()
        self._over = False

    @property
    def finished(self) -> bool:
        """Whether the request has ended, whoever has read its events."""
        return self._result.finish is not None

    @property
    def admitted(self) -> bool:
        """Whether the request has or had a slot, or has ended without one."""
        return self._result.queue_seconds is not None or self.finished

    @property
    def begun_answer(self) -> bool:
        """Whether a token has come, or the request has ended without one."""
        return self._result.first_token_seconds is not None or self.finished

    @property
    def cached_tokens(self) -> int:
        """Tokens of the prompt that were not read again; known once the first event has come."""
        return self._result.cached_tokens

    def __iter__(self) -> Iterator[Event]:
        while not self._over:
            yield from self.ready()
            if not self._over:
                self._work()

    def ready(self) -> Iterator[Event]:
        """The events that are there already; waits for none."""
        while not self._over:
            try:
                event = self._events.get_nowait()
            except queue.Empty:
                return
            self._over = event.finish is not None
            yield event

    def result(self) -> Result:
        """The whole answer, once it has come; events that were not read count as read."""
        for _ in self:
            pass
        return self._result

    @property
    def so_far(self) -> Result:
        """What has come by now; the engine adds to it."""
        return self._result

    def cancel(self) -> None:
        """Ends the request wherever it is; its last event has `finish` "cancelled"."""
        self._cancel(self)

    # What follows is the engine's.

    def begun(self, cached_tokens: int) -> None:
        """The request has a slot, and so many tokens of its prompt are there already."""
        self._result.queue_seconds = time.perf_counter() - self._began
        self._result.cached_tokens = cached_tokens
        self._notify()

    def scored(self, prompt_logprobs: list[TokenLogprob | None]) -> None:
        """The prompt's log-probabilities."""
        self._result.prompt_logprobs = prompt_logprobs

    def verified(self, drafted: int, accepted: int) -> None:
        """A round verified so many drafts and accepted so many of them."""
        self._result.drafted += drafted
        self._result.accepted += accepted

    def push(self, event: Event) -> None:
        """Hands an event out."""
        result, since = self._result, time.perf_counter() - self._began
        if event.tokens and result.first_token_seconds is None:
            result.first_token_seconds = since
        result.tokens += event.tokens
        result.text += event.text
        result.logprobs += event.logprobs
        if event.finish is not None:
            result.error, result.seconds = event.error, since
            result.finish = event.finish  # last: `finished` asks for it
        self._events.put(event)
        self._notify()
