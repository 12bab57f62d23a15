"""A request's body: bounded in bytes and time, read as JSON off the event loop where it is long."""

import asyncio
import json
from collections.abc import Callable
from concurrent.futures import Executor
from typing import Any

from starlette.requests import ClientDisconnect, Request

from v4jax.serve.errors import Refused

_SHORT = 32 << 10  # bytes that are read in less than a millisecond


class ClientLeft(Exception):
    """The client has closed the connection."""


async def read_body(request: Request, limit: int, seconds: float) -> bytes:
    """All bytes of the body.

    Raises:
      Refused: more than `limit`, or not there in so many seconds. ClientLeft.
    """
    coding = request.headers.get("content-encoding", "identity").strip().lower()
    if coding not in ("", "identity"):
        raise Refused(415, "the body is compressed; expected plain JSON", code="content_encoding")
    announced = request.headers.get("content-length", "")
    if announced.isascii() and announced.isdigit() and int(announced[:20]) > limit:
        raise _too_long(limit)
    parts, size = [], 0
    try:
        async with asyncio.timeout(seconds):
            async for part in request.stream():
                size += len(part)
                if size > limit:
                    raise _too_long(limit)
                parts.append(part)
    except TimeoutError:
        raise Refused(
            408, f"the body did not come within {seconds:g} s; send it faster", code="timeout"
        ) from None
    except ClientDisconnect:
        raise ClientLeft from None
    return b"".join(parts)


async def parse_json(content: bytes, pool: Executor) -> Any:
    """The JSON value of a body; constants that JSON does not know are refused."""
    if len(content) <= _SHORT:
        return _parse(content)
    return await asyncio.get_running_loop().run_in_executor(pool, _parse, content)


def _parse(content):
    try:
        return json.loads(content.decode("utf-8"), parse_constant=_refuse)
    except RecursionError:
        raise Refused(400, "the body is nested too deeply; expected plain JSON") from None
    except ValueError:
        raise Refused(400, "the body is not valid JSON; expected one object in UTF-8") from None


def _refuse(constant):
    raise ValueError(constant)


def _too_long(limit):
    return Refused(
        413, f"the body has more than {limit} bytes; send a shorter one", code="body_too_long"
    )


async def unless_left(receive: Callable, work: Any) -> Any:
    """What the coroutine `work` returns; it is cancelled where the client leaves before.

    Raises:
      ClientLeft: it did.
    """
    working = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(until_left(receive))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise ClientLeft
    finally:
        await stopped(working, leaving)


async def until_left(receive: Callable) -> None:
    """Returns when the client has closed the connection; the body was read before."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def stopped(*tasks: asyncio.Future) -> None:
    """Cancels tasks and waits until they have ended; how they ended is the caller's to ask."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
