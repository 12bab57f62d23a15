"""A small client for JSON over HTTP, with server-sent events, on the standard library."""

import http.client
import json
import socket
import ssl
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

from v4jax.errors import InputError

_SHOWN = 300  # characters of an error's message
_LINE = 1 << 24  # bytes of one event, at most


class Refused(Exception):
    """An answer that is no success.

    Attributes:
      status: of HTTP; 0 where none came. retry_after: seconds that the server asks to wait.
    """

    def __init__(self, status: int, message: str, retry_after: float | None = None):
        super().__init__(f"{status} {message}")
        self.status, self.message, self.retry_after = status, message, retry_after


class Client:
    """Requests to one endpoint, each on a connection of its own.

    Args:
      url: its base, such as http://127.0.0.1:8000/v1. timeout: seconds without a byte.

    Raises:
      InputError: no URL of http or https.
    """

    def __init__(self, url: str, key: str | None = None, timeout: float = 600.0):
        parts = urlsplit(url)
        try:
            port = parts.port
        except ValueError:
            port = -1
        if parts.scheme not in ("http", "https") or not parts.hostname or port == -1:
            raise InputError(
                f"the endpoint is {url[:200]!r}; expected a URL such as http://127.0.0.1:8000/v1"
            )
        self.url, self._key, self._timeout = url.rstrip("/"), key, timeout
        self._parts, self._port = parts, port
        self._path = parts.path.rstrip("/")

    def get(self, path: str, **changes) -> Any:
        """The JSON at a path below the base."""
        return self._whole("GET", self._path + path, None, **changes)

    def post(self, path: str, body: Any, **changes) -> Any:
        return self._whole("POST", self._path + path, body, **changes)

    def get_root(self, path: str) -> Any:
        """As `get`, beside the API's version: without its /v1."""
        return self._whole("GET", self._path.removesuffix("/v1") + path, None)

    def post_root(self, path: str, body: Any) -> Any:
        """As `post`, there."""
        return self._whole("POST", self._path.removesuffix("/v1") + path, body)

    def stream(self, path: str, body: Any, **changes) -> Iterator[dict[str, Any]]:
        """The data of each server-sent event; of an answer in one piece, that.

        Raises:
          Refused: another status than 2xx, or an error in the stream.
        """
        connection = self._connect()
        try:
            response = self._send(connection, "POST", self._path + path, body, **changes)
            if "text/event-stream" not in (response.getheader("Content-Type") or ""):
                yield _unstreamed(self._json(response))
                return
            yield from self._events(response)
        finally:
            connection.close()

    def exchange(self, path: str, body: Any, **changes) -> tuple[int, dict[str, str], str]:
        """Status, headers (names in small letters) and text of a POST, whatever they are.

        Raises:
          Refused: nothing answers.
        """
        connection = self._connect()
        try:
            with _answering(self._timeout):
                response = self._response(connection, "POST", self._path + path, body, **changes)
                headers = {name.lower(): value for name, value in response.getheaders()}
                return response.status, headers, response.read().decode(errors="replace")
        finally:
            connection.close()

    def _whole(self, method, path, body, **changes):
        connection = self._connect()
        try:
            return self._json(self._send(connection, method, path, body, **changes))
        finally:
            connection.close()

    def _connect(self):
        if self._parts.scheme == "https":
            context = ssl.create_default_context()
            return http.client.HTTPSConnection(
                self._parts.hostname, self._port, timeout=self._timeout, context=context
            )
        return http.client.HTTPConnection(self._parts.hostname, self._port, timeout=self._timeout)

    def _send(self, connection, method, path, body, **changes):
        with _answering(self._timeout):
            response = self._response(connection, method, path, body, **changes)
            if not 200 <= response.status < 300:
                raise Refused(response.status, _message(response.read(1 << 16)), _after(response))
        return response

    def _response(self, connection, method, path, body, key=""):
        """key: another one than the client's own; None: none."""
        headers = {"Content-Type": "application/json", "Accept": "application/json"}
        key = self._key if key == "" else key
        if key is not None:
            headers["Authorization"] = f"Bearer {key}"
        content = None if body is None else json.dumps(body).encode()
        connection.request(method, path, content, headers)
        return connection.getresponse()

    def _json(self, response):
        with _answering(self._timeout):
            raw = response.read()
        try:
            return json.loads(raw)
        except ValueError as error:
            shown = raw[:80].decode(errors="replace")
            raise Refused(0, f"the answer is no JSON: {shown!r}") from error

    def _events(self, response):
        ended = False
        while not ended:
            with _answering(self._timeout):
                line = response.readline(_LINE)
            if not line:
                raise Refused(503, "the stream broke off before its end")
            if not line.startswith(b"data:"):
                continue
            data = line[5:].strip()
            if data == b"[DONE]":
                return
            try:
                event = json.loads(data)
            except ValueError as error:
                raise Refused(0, f"an event is no JSON: {data[:80]!r}") from error
            if not isinstance(event, dict):
                raise Refused(0, f"an event is no object: {data[:80]!r}")
            if event.get("error"):
                raise Refused(_status_of(event["error"]), _message(data))
            yield event


class _answering:
    """What the network does wrong, as `Refused`."""

    def __init__(self, timeout):
        self._timeout = timeout

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        if isinstance(error, socket.timeout):
            raise Refused(
                0,
                f"not a byte came for {self._timeout:g} seconds; the records are kept: run again, "
                "or give a longer --timeout",
            ) from error
        if isinstance(error, ConnectionRefusedError | socket.gaierror):
            raise Refused(
                0, f"nothing answers there ({error.strerror or error}); start the server first"
            ) from error
        if isinstance(error, ConnectionError | http.client.HTTPException):
            raise Refused(503, f"the connection broke off ({type(error).__name__})") from error
        if isinstance(error, OSError):
            raise Refused(0, f"cannot be reached ({error.strerror or error})") from error


def _message(raw):
    """The text of an error body, as servers write it, on one line."""
    text = raw.decode(errors="replace")
    try:
        found = json.loads(text)
        found = found.get("error", found) if isinstance(found, dict) else found
        text = found.get("message", text) if isinstance(found, dict) else found
    except ValueError:
        pass
    return " ".join(str(text).split())[:_SHOWN]


def _status_of(error):
    code = error.get("code") if isinstance(error, dict) else None
    return code if isinstance(code, int) else 500


def _after(response):
    try:
        return float(response.getheader("Retry-After") or "")
    except ValueError:
        return None


def _unstreamed(body):
    """An answer in one piece in the form of a piece of a streamed one."""
    if not isinstance(body, dict):
        raise Refused(0, "the answer is no JSON object")
    if body.get("error"):
        raise Refused(_status_of(body["error"]), _message(json.dumps(body).encode()))
    for choice in body.get("choices") or []:
        if "message" in choice:
            choice["delta"] = choice.pop("message")
            for place, call in enumerate(choice["delta"].get("tool_calls") or []):
                call.setdefault("index", place)
    return body
