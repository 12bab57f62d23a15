"""Who asks: the key of a request, and what a server without keys takes from a browser."""

import logging
import time

from starlette.requests import Request

from v4jax.errors import InputError
from v4jax.serve.errors import Refused
from v4jax.serve.keys import Key, KeyFile

LOOPBACK = ("127.0.0.1", "localhost", "[::1]")


def key_of(request: Request, keys: KeyFile, endpoint: str, model: str) -> Key:
    """The key of a request that may ask this endpoint.

    Raises:
      Refused: no key, an unknown one, one that has expired, or one for other things.
    """
    presented = _presented(request)
    if not presented:
        raise Refused(
            401, "there is no key; send one as Authorization: Bearer KEY", code="missing_key"
        )
    try:
        key = keys.find(presented)
    except InputError as error:
        logging.getLogger("v4jax.serve").error("%s", error)
        raise Refused(
            503, "the key file cannot be used; the operator has to mend it", code="key_file"
        ) from None
    if key is None or key.expired(time.time()):
        raise Refused(
            401, "the key is not known here, or has expired; ask for one", code="invalid_key"
        )
    if endpoint not in key.endpoints:
        raise Refused(403, f"this key is not for the endpoint {endpoint}", code="endpoint")
    if key.models and model not in key.models:
        raise Refused(403, "this key is not for the model that is served here", code="model")
    return key


def check_own(request: Request) -> None:
    """Raises Refused for what a foreign page has its visitor's browser send to this machine."""
    host = request.headers.get("host", "").rsplit(":", 1)
    name = host[0] if len(host) == 1 or host[1].isdigit() else ":".join(host)
    if name.lower() not in LOOPBACK:
        raise Refused(
            403,
            "without a key file this server answers to localhost alone; start it with --keys",
            code="host",
        )
    origin = request.headers.get("origin")
    if origin is not None and origin != f"{request.url.scheme}://{request.headers['host']}":
        raise Refused(403, "a page of another site may not ask this server", code="origin")


def _presented(request) -> str:
    """The key in the request's headers."""
    scheme, _, value = request.headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer":
        return value.strip()
    return request.headers.get("x-api-key", "").strip()  # as clients of Messages send it
