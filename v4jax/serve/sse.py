"""Server-sent events: a response that goes on for as long as its pieces do."""

import asyncio
import json
from collections.abc import AsyncGenerator, Callable
from typing import Any

from v4jax.serve.body import stopped, until_left

QUIET = b": waiting\n\n"
DONE = b"data: [DONE]\n\n"


def data(value: Any, event: str | None = None) -> bytes:
    """One message."""
    head = b"" if event is None else f"event: {event}\n".encode()
    return head + b"data: " + json.dumps(value, separators=(",", ":")).encode() + b"\n\n"


class EventStream:
    """An ASGI response of pieces; they are closed when the client leaves.

    Args:
      pieces: bytes of whole messages or comments.
      end: called at the end, also where no piece was ever asked for.
      headers: more of the response.
    """

    def __init__(
        self,
        pieces: AsyncGenerator[bytes, None],
        end: Callable,
        headers: dict[str, str] | None = None,
    ):
        self._pieces, self._end = pieces, end
        self.headers = {
            "content-type": "text/event-stream; charset=utf-8",
            "cache-control": "no-store",
            "x-accel-buffering": "no",
        } | (headers or {})

    async def __call__(self, scope, receive, send) -> None:
        headers = [(name.encode(), value.encode()) for name, value in self.headers.items()]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        sending = asyncio.create_task(self._send(send))
        leaving = asyncio.create_task(until_left(receive))
        try:
            await asyncio.wait({sending, leaving}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            await stopped(sending, leaving)
            await self._pieces.aclose()
            self._end()

    async def _send(self, send):
        async for piece in self._pieces:
            await send({"type": "http.response.body", "body": piece, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})
