"""The page at `/`: static files of the package, under a policy that asks no other host.

The files are read once; a path is looked up among their names, so that none leads elsewhere.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

FOLDER = Path(__file__).with_name("page")
_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
HEADERS = {
    "content-security-policy": (
        "default-src 'self'; object-src 'none'; base-uri 'none'; form-action 'none'; "
        "frame-ancestors 'none'"
    ),
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "cache-control": "no-cache",
}


def page_routes(about: Mapping[str, Any]) -> list[Route]:
    """The page, its files, and what it has to know of the server. None of them needs a key.

    Args:
      about: "model", the name served; "chat", whether it has chat tokens; "lens" and "keys",
        whether the server has them; "max_length", tokens of prompt and answer.
    """
    files = {
        path.name: (path.read_bytes(), _TYPES[path.suffix])
        for path in sorted(FOLDER.iterdir())
        if path.suffix in _TYPES
    }

    def file(name: str) -> Response:
        if name not in files:
            return Response("there is no such file\n", 404, HEADERS, "text/plain; charset=utf-8")
        body, media_type = files[name]
        return Response(body, headers=HEADERS, media_type=media_type)

    async def index(request: Request) -> Response:
        return file("index.html")

    async def part(request: Request) -> Response:
        return file(request.path_params["name"])

    async def server(request: Request) -> Response:
        return JSONResponse(dict(about), headers=HEADERS)

    return [
        Route("/", index),
        Route("/page/server.json", server),
        Route("/page/{name}", part),
    ]
