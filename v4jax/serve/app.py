"""The HTTP interface (inference.md, section 6): which path does what."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from v4jax.serve.call import Call, answered
from v4jax.serve.completions import completions
from v4jax.serve.conversations import chat, messages, responses
from v4jax.serve.errors import Refused
from v4jax.serve.look import Unavailable
from v4jax.serve.metrics import CONTENT_TYPE
from v4jax.serve.page import page_routes
from v4jax.serve.serving import Serving
from v4jax.serve.texts import detokenize, model, models, tokenize, tokenizer_info

Handler = Callable[[Call], Awaitable[Any]]


def make_app(serving: Serving, more: list[Route] | None = None) -> Starlette:
    """The ASGI application of a server.

    Args:
      more: routes of a page and of what it reads.
    """

    def post(path: str, endpoint: str, handler: Handler, works: bool = True) -> Route:
        return Route(path, endpoint_of(serving, endpoint, handler, works), methods=["POST"])

    def get(path: str, endpoint: str, handler: Handler) -> Route:
        return Route(path, endpoint_of(serving, endpoint, handler, False), methods=["GET"])

    routes = [
        post("/v1/chat/completions", "chat", chat),
        post("/v1/completions", "completions", completions),
        post("/v1/responses", "responses", responses),
        post("/v1/messages", "messages", messages),
        get("/v1/models", "models", models),
        get("/v1/models/{name}", "models", model),
        Route("/health", _health(serving), methods=["GET"]),
        get("/metrics", "metrics", _metrics),
        post("/tokenize", "tokenize", tokenize, works=False),
        post("/detokenize", "tokenize", detokenize, works=False),
        get("/tokenizer_info", "tokenize", tokenizer_info),
        *page_routes(_about(serving)),
        *([] if serving.look is None else [get("/lens", "lens", _lens)]),
        *(more or []),
    ]
    handlers: dict = {HTTPException: _elsewhere(serving)}
    app = Starlette(routes=routes, exception_handlers=handlers, lifespan=serving.lifespan)
    app.router.redirect_slashes = False  # a path is right, or it is nothing
    return app


def endpoint_of(serving: Serving, endpoint: str, handler: Handler, works: bool) -> Callable:
    """A handler with all that belongs to a request: access, limits, errors, counts, the log.

    works: whether it needs the engine, which may not be ready.
    """

    async def run(request: Request) -> Any:
        call = Call(serving, endpoint, request)
        return await answered(call, handler, works, endpoint == "messages")

    return run


def _health(serving):
    async def health(request: Request) -> Response:
        """200 once the programs are compiled, for as long as new requests are taken."""
        state = serving.state
        told = {"status": state} | ({"waits_for": why} if (why := serving.waits_for) else {})
        return JSONResponse(told, 200 if state == "ready" else 503)

    return health


def _about(serving) -> dict[str, Any]:
    """What the page has to know."""
    return {
        "model": serving.settings.name,
        "chat": serving.chat is not None,
        "lens": serving.look is not None,
        "keys": serving.keys is not None,
        "max_length": serving.engine.max_length,
    }


async def _lens(call: Call) -> Any:
    try:
        query = call.request.query_params
        return await asyncio.to_thread(call.serving.look, query, call.tenant)
    except Unavailable as error:
        raise Refused(error.status, error.message, code="lens") from None


async def _metrics(call: Call) -> Response:
    text = await call.serving.in_pool(call.serving.metrics.text)
    return Response(text, media_type=CONTENT_TYPE)


def _elsewhere(serving):
    async def refused(request: Request, error: Exception) -> Response:
        """Paths and methods that there are not."""
        status = getattr(error, "status_code", 404)
        serving.metrics.requests.labels("other", str(status)).inc()
        said = {404: "there is nothing at this path", 405: "this path has no such method"}
        message = said.get(status, "this request cannot be answered")
        return Refused(status, f"{message}; see docs/serve.md").response()

    return refused
