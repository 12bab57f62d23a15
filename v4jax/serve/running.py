"""The engine's events in an event loop, without a thread a request.

The engine's thread leaves word and wakes the loop once, however many requests have news.
"""

import asyncio
import collections
import contextlib
import time
from collections.abc import AsyncIterator
from concurrent.futures import Executor
from typing import Any

from v4jax.engine.request import Event, Request
from v4jax.engine.stream import Stream
from v4jax.serve.errors import Refused


class Running:
    """An engine that runs in its own thread; its requests belong to the event loop that makes this.

    Args:
      engine: an `Engine`, or what submits requests as it does.
      max_waiting: requests without a slot; more are refused.
      pool: where requests are handed in: reading a long prompt or a grammar takes time.

    Attributes:
      waiting: requests without a slot. open: requests that have not ended.
    """

    def __init__(self, engine: Any, max_waiting: int, pool: Executor):
        self._engine, self._max_waiting, self._pool = engine, max_waiting, pool
        self._loop = asyncio.get_running_loop()
        self._news: collections.deque[Answering] = collections.deque()
        self._woken = False
        self.waiting = 0
        self.open = 0

    def check_room(self, count: int = 1) -> None:
        """Raises Refused where so many more requests would make the queue too long."""
        if self.waiting + count > self._max_waiting:
            raise Refused(
                429,
                f"{self.waiting} requests wait already; try again later",
                code="queue_full",
                retry_after=1 + self.waiting // 32,
            )

    async def submit(self, request: Request) -> "Answering":
        """Takes a request in.

        Raises:
          InputError: a value out of range. Refused: too many wait.
        """
        self.check_room()
        answering = Answering(self)
        handing = self._loop.run_in_executor(
            self._pool, self._engine.submit, request, lambda: self._tell(answering)
        )
        try:
            answering.stream = await asyncio.shield(handing)
        except BaseException:
            answering.gave_up()
            handing.add_done_callback(_cancel_late)
            raise
        return answering

    def _tell(self, answering):
        """Called by the engine's thread."""
        self._news.append(answering)
        if not self._woken:
            self._woken = True
            with contextlib.suppress(RuntimeError):  # the loop is closed
                self._loop.call_soon_threadsafe(self._wake)

    def _wake(self):
        self._woken = False  # before the look: what is left from now on wakes once more
        while self._news:
            self._news.popleft().look()


class Answering:
    """One request under way.

    Attributes:
      stream: the engine's; None until it has taken the request.
    """

    def __init__(self, running: Running):
        self.stream: Stream | None = None
        self._running, self._began = running, time.monotonic()
        self._changed = asyncio.Event()
        self._waits, self._open = True, True
        running.waiting += 1
        running.open += 1

    def look(self) -> None:
        """The engine has told of something."""
        if self.stream is not None:
            if self._waits and self.stream.admitted:
                self._leave_queue()
            if self._open and self.stream.finished:
                self._end()
        self._changed.set()

    def gave_up(self) -> None:
        """The engine has not taken the request, or nobody waits for it."""
        self._leave_queue()
        self._end()

    async def events(self, waiting_seconds: float, quiet: float) -> AsyncIterator[Event | None]:
        """Its events as they come, and None where none came for `quiet` seconds.

        Raises:
          Refused: it has had no slot after so many seconds.
        """
        spoke = time.monotonic()
        while True:
            self.look()
            self._changed.clear()
            for event in self.stream.ready():
                yield event
                spoke = time.monotonic()
                if event.finish is not None:
                    self.look()
                    return
            now = time.monotonic()
            if self._waits and now > self._began + waiting_seconds:
                raise Refused(
                    503,
                    f"no slot was free within {waiting_seconds:g} s; try again later",
                    code="waited_too_long",
                    retry_after=10,
                )
            if now > spoke + quiet:
                yield None
                spoke = now
            until = spoke + quiet
            if self._waits:
                until = min(until, self._began + waiting_seconds)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._changed.wait(), max(until - now, 0.0) + 0.001)

    def cancel(self) -> None:
        """Ends it, if it has not ended."""
        if self.stream is not None and not self.stream.finished:
            self.stream.cancel()

    def _leave_queue(self):
        if self._waits:
            self._waits = False
            self._running.waiting -= 1

    def _end(self):
        if self._open:
            self._open = False
            self._running.open -= 1


def _cancel_late(handing):
    """The client left while its request was handed in."""
    if not handing.cancelled() and handing.exception() is None:
        handing.result().cancel()


async def merged(
    answerings: list[Answering], waiting_seconds: float, quiet: float
) -> AsyncIterator[tuple[int, Event | None]]:
    """The events of several requests as they come, each with its place; None as in `events`.

    All are cancelled where one fails, or where nobody asks for more.
    """
    queue: asyncio.Queue = asyncio.Queue()

    async def listen(place, answering):
        try:
            async for event in answering.events(waiting_seconds, quiet):
                queue.put_nowait((place, event, None))
        except Exception as error:
            queue.put_nowait((place, None, error))

    tasks = [asyncio.create_task(listen(*each)) for each in enumerate(answerings)]
    left = len(tasks)
    try:
        while left:
            place, event, error = await queue.get()
            if error is not None:
                raise error
            left -= event is not None and event.finish is not None
            yield place, event
    finally:
        for task in tasks:
            task.cancel()
        for answering in answerings:
            answering.cancel()
