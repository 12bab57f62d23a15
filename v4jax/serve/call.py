"""One HTTP request on its way: who asks, what it has cost so far, and how it ended."""

import asyncio
import dataclasses
import secrets
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import Any

import numpy as np
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from v4jax.engine.request import Event
from v4jax.errors import InputError
from v4jax.serve import sse
from v4jax.serve.access import check_own, key_of
from v4jax.serve.body import ClientLeft, parse_json, read_body
from v4jax.serve.detail import HEADER, Detail
from v4jax.serve.errors import Refused, of_ours
from v4jax.serve.keys import Key
from v4jax.serve.running import Answering
from v4jax.serve.serving import Serving

LEFT = 499  # never sent: the client has gone
UNRECORDED = ("metrics", "models")  # endpoints that say nothing of what users asked


@dataclasses.dataclass
class Cost:
    """Tokens of a request."""

    prompt: int = 0
    cached: int = 0
    output: int = 0
    reasoning: int = 0


class Call:
    """A request to one endpoint; see the module.

    Attributes:
      id: told to the client in the header x-request-id, and written in the audit log.
      tenant: separates prefixes and kept turns of keys; empty without keys.
      cost, finish, tools: what the audit line says of the answer.
      prompts, answer: ids and text, for the line's hash and, in mode full, its texts.
    """

    def __init__(self, serving: Serving, endpoint: str, request: Request):
        self.serving, self.endpoint, self.request = serving, endpoint, request
        self.id = secrets.token_hex(12)
        self.key: Key | None = None
        self.cost = Cost()
        self.finish: str | None = None
        self.tools: tuple[str, ...] = ()
        self.prompts: list[list[int]] = []
        self.answer: list[str] = []
        self.answerings: list[Answering] = []
        self._began = time.perf_counter()
        self._first: float | None = None
        self._last: dict[int, float] = {}
        self._counted = self._over = False
        self._reserved: list | None = None
        self._detail: Detail | None = None  # of the first answer

    @property
    def tenant(self) -> str:
        return "" if self.key is None else self.key.id

    async def admit(self, works: bool) -> None:
        """Raises Refused for who may not ask, or not now. works: whether the engine is needed."""
        serving = self.serving
        if serving.keys is None:
            check_own(self.request)
        else:
            self.key = key_of(self.request, serving.keys, self.endpoint, serving.settings.name)
        if works:
            serving.check_ready()
        if self.endpoint not in UNRECORDED and not await serving.can_record():
            raise Refused(
                503,
                "the audit log cannot be written, and nothing is answered unrecorded; the "
                "operator has to free disk space",
                code="audit_log",
                retry_after=60,
            )
        if self.key is not None:
            serving.limits.begin(self.key)
            self._counted = True

    async def body(self) -> bytes:
        """The bytes of the body, within the limits."""
        settings = self.serving.settings
        return await read_body(self.request, settings.max_body_bytes, settings.body_seconds)

    async def json(self) -> Any:
        """The body as a JSON value."""
        return await parse_json(await self.body(), self.serving.pool)

    def check_tokens(self, prompts: list[list[int]], new: int) -> None:
        """Raises Refused for prompts and answers of too many tokens.

        new: the most that each answer may have.
        """
        self.prompts = prompts
        self._detail = Detail(self.id, len(prompts[0]))
        self.cost.prompt = sum(map(len, prompts))
        longest = max(map(len, prompts))
        limit, most = self.serving.engine.max_length, self.serving.max_prompt_tokens
        if self.key is not None and self.key.max_context is not None:
            limit = min(limit, self.key.max_context)
        if longest > most or longest + new > limit:
            raise Refused(
                400,
                f"the prompt has {longest} tokens and the answer may have {new}; expected at most "
                f"{min(most, limit)} of the prompt and {limit} together: shorten it, or ask for "
                "fewer",
                code="context_length_exceeded",
            )
        if self.key is not None:
            total = self.cost.prompt + new * len(prompts)
            self._reserved = self.serving.limits.reserve(self.key, total)

    async def submit(self, requests) -> list[Answering]:
        """Takes requests of the engine in; all of them, or none."""
        self.serving.running.check_room(len(requests))
        try:
            for request in requests:
                self.answerings.append(await self.serving.running.submit(request))
        except InputError as error:
            self.cancel()
            raise _unusable(error, self.serving) from None
        except BaseException:
            self.cancel()
            raise
        return self.answerings

    def saw(self, place: int, event: Event) -> None:
        """Takes the time of an event's tokens."""
        count, now, metrics = len(event.tokens), time.perf_counter(), self.serving.metrics
        self.cost.output += count
        if place == 0:
            self._detail.saw(event)
            if event.finish is not None:
                self._show_lens()
        if not count:
            return
        if self._first is None:
            self._first = now - self._began
            metrics.first_token.observe(self._first)
        if place in self._last:
            for _ in range(count):
                metrics.between_tokens.observe((now - self._last[place]) / count)
        self._last[place] = now

    def detail(self, place: int) -> dict | None:
        """What the client asked to be told of the newest event of an answer, if anything."""
        if place or self.request.headers.get(HEADER) != "1":
            return None
        return self._detail.told(self.answerings[0].stream.so_far)

    def _show_lens(self):
        """From now on the lens can look into the first answer."""
        if self.serving.look is None or not self.answerings or self.answerings[0].stream is None:
            return
        result, prompt = self.answerings[0].stream.so_far, self.prompts[0]
        tokens, cached = [*prompt, *result.tokens], result.cached_tokens
        drafted = self._detail.drafted
        self.serving.look.requests.add(self.id, self.tenant, tokens, len(prompt), cached, drafted)

    def cancel(self) -> None:
        """Ends whatever of it still runs in the engine."""
        for answering in self.answerings:
            answering.cancel()

    def end(self, status: int) -> Awaitable[bool] | None:
        """Counts and records it, once; what comes back says whether it could be recorded."""
        if self._over:
            return None
        self._over = True
        self.cancel()
        self._show_lens()
        results = [each.stream.so_far for each in self.answerings if each.stream is not None]
        self.cost.cached = sum(each.cached_tokens for each in results)
        serving, cost, seconds = self.serving, self.cost, time.perf_counter() - self._began
        if self._counted:
            serving.limits.end(self.key)
            serving.limits.settle(self._reserved, cost.prompt + cost.output if results else 0)
        serving.metrics.requests.labels(self.endpoint, str(status)).inc()
        if results:
            serving.metrics.prompt_tokens.inc(cost.prompt)
            serving.metrics.cached_tokens.inc(cost.cached)
            serving.metrics.output_tokens.inc(cost.output)
            serving.metrics.request_seconds.observe(seconds)
        if self.endpoint in UNRECORDED or not self._is_recorded():
            return None
        ids = np.array([token for each in self.prompts for token in [*each, -1]], "<i4").tobytes()
        return serving.record(self._line(status, seconds, results), ids or None)

    def _is_recorded(self):
        """Whoever has no key cannot fill the disk."""
        if self.serving.keys is None or self.key is not None:
            return True
        return self.serving.unknown.allows()

    def _line(self, status, seconds, results):
        settings, cost = self.serving.settings, self.cost
        queued = [each.queue_seconds for each in results if each.queue_seconds is not None]
        line = {
            "time": round(time.time() - seconds, 3),
            "request": self.id,
            "key": None if self.key is None else self.key.id,
            "endpoint": self.endpoint,
            "model": settings.name,
            "profile": settings.profile,
            "prompt_tokens": cost.prompt,
            "cached_tokens": cost.cached,
            "output_tokens": cost.output,
            "reasoning_tokens": cost.reasoning,
            "finish": self.finish,
            "status": status,
            "queue_ms": _ms(max(queued, default=None)),
            "first_token_ms": _ms(self._first),
            "total_ms": _ms(seconds),
            "tools": list(self.tools),
        }
        if settings.retention == "full":
            line["prompt"] = [self.serving.tokenizer.decode(each) for each in self.prompts]
            line["answer"] = self.answer
        return line


async def answered(
    call: Call, handler: Callable[[Call], Awaitable[Any]], works: bool, messages: bool = False
) -> Any:
    """The response of a handler, or of what it was refused for; the call has ended with it.

    A handler returns an object, a response, or `Streamed` pieces, during which the call goes on.
    """
    try:
        await call.admit(works)
        found = await handler(call)
        if isinstance(found, Streamed):
            pieces = _recorded(call, found)
            headers = {"x-request-id": call.id}
            return sse.EventStream(pieces, lambda: call.end(LEFT), headers)
        response = found if isinstance(found, Response) else JSONResponse(found)
        recorded = call.end(response.status_code)
        if recorded is not None and not await recorded:
            raise Refused(503, "the audit log could not be written", code="audit_log")
    except asyncio.CancelledError:
        call.end(LEFT)
        raise
    except ClientLeft:
        call.end(LEFT)
        return Response(status_code=LEFT)  # to nobody
    except Exception as error:
        refused = as_refused(error)
        response = refused.response(messages)
        call.end(refused.status)
    response.headers["x-request-id"] = call.id
    return response


@dataclasses.dataclass
class Streamed:
    """A streamed answer: messages, what ends them, and how an error is written in between."""

    pieces: AsyncGenerator[bytes, None]
    done: bytes = sse.DONE
    messages: bool = False


async def _recorded(call, found):
    """The pieces of a stream; its call ends with them, however that comes about."""
    status = LEFT
    try:
        try:
            async for piece in found.pieces:
                yield piece
            status = 200
        except Exception as error:
            refused = as_refused(error)
            status = refused.status
            event = "error" if found.messages else None
            yield sse.data(refused.body(found.messages), event)
        recorded = call.end(status)
        if recorded is not None:
            await recorded
        if found.done:
            yield found.done
    finally:
        call.end(status)
        await found.pieces.aclose()


def as_refused(error: Exception) -> Refused:
    """What a client is told of an exception."""
    return error if isinstance(error, Refused) else of_ours(error)


def checked_end(event: Event) -> None:
    """Raises Refused for an answer that the engine could not give."""
    if event.finish == "error":
        raise Refused(500, event.error or "the engine could not answer", code="engine")
    if event.finish == "cancelled":
        raise Refused(503, "the server stops; try again later", code="stopping", retry_after=5)


def _unusable(error, serving):
    """Bad input that only the engine has found; it does not quote texts."""
    if serving.engine.closed:
        return Refused(503, "the engine has stopped; try again later", retry_after=5)
    return Refused(400, str(error)[:500], code="invalid_value")


def _ms(seconds):
    return None if seconds is None else round(1e3 * seconds, 3)
