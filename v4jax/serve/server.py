"""The process that serves: one socket, one event loop, an engine's thread (uvicorn, h11)."""

import asyncio
import contextlib
import os
import signal
import socket
import sys
import threading

import h11
import uvicorn
from starlette.applications import Starlette
from uvicorn.protocols.http.h11_impl import H11Protocol

from v4jax.errors import InputError
from v4jax.serve.serving import Serving

MAX_HEADER_BYTES = 64 << 10
_CONNECTIONS = 256  # beside those of requests that wait


def bound_socket(host: str, port: int) -> socket.socket:
    """A socket that listens; 0 takes any free port.

    Raises:
      InputError: an unknown host, or a port in use.
    """
    try:
        if not 0 <= port < 65536:  # the system would take it modulo that
            raise OverflowError("there is no such port")
        family, kind, _, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        found = socket.socket(family, kind)
        try:
            found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            found.bind(address)
            found.listen(1024)
        except BaseException:
            found.close()
            raise
    except (OSError, OverflowError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise InputError(
            f"--host {host[:80]} --port {port}: cannot be listened on ({reason}); expected an "
            "address of this machine and a free port: give another --port, or stop what has it"
        ) from error
    return found


def check_loopback(found: socket.socket, keys: bool) -> None:
    """Raises InputError where others could ask a server that has no keys."""
    address = found.getsockname()[0]
    if not keys and not (address.startswith("127.") or address == "::1"):
        raise InputError(
            f"--host {address} lets other machines ask, and there is no key file; expected "
            "127.0.0.1 without one: make keys with v4jax keys create and give --keys FILE"
        )


def serve(app: Starlette, serving: Serving, listening: socket.socket) -> None:
    """Serves until SIGINT or SIGTERM; then what runs is finished, and nothing new begins."""
    server_of(app, serving).run([listening])


def server_of(app: Starlette, serving: Serving) -> uvicorn.Server:
    """The server that `serve` runs; setting its `should_exit` stops it too."""
    settings = serving.settings
    config = uvicorn.Config(
        app,
        http=type("Protocol", (_Patient,), {"header_seconds": settings.header_seconds}),
        ws="none",
        lifespan="on",
        access_log=False,  # paths may hold what a user wrote
        server_header=False,
        log_level="warning",
        proxy_headers=False,
        h11_max_incomplete_event_size=MAX_HEADER_BYTES,
        limit_concurrency=settings.max_waiting + _CONNECTIONS,
        timeout_keep_alive=int(settings.header_seconds) or 1,
        timeout_graceful_shutdown=settings.drain_seconds,
    )
    return _Server(config, serving)


class _Server(uvicorn.Server):
    """Takes signals as the wish to stop, and ends with no error then."""

    def __init__(self, config: uvicorn.Config, serving: Serving):
        super().__init__(config)
        self._serving = serving

    @contextlib.contextmanager
    def capture_signals(self):
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self._stop)
        yield

    def _stop(self):
        if self._serving.state == "warming up":
            # A compiler cannot be told to stop, and nothing has been answered yet.
            sys.stderr.flush()
            os._exit(0)
        self._serving.stop()
        self.force_exit = self.should_exit  # at the second time
        self.should_exit = True


class _Patient(H11Protocol):
    """Closes a connection on which no whole request head comes for `header_seconds`."""

    header_seconds = 15.0

    def connection_made(self, transport) -> None:
        super().connection_made(transport)
        self._head = self.loop.call_later(self.header_seconds, self._give_up)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.conn.their_state is not h11.IDLE:
            self._head.cancel()  # a request is there
        elif self._head.cancelled():
            self._head = self.loop.call_later(self.header_seconds, self._give_up)

    def connection_lost(self, exc: Exception | None) -> None:
        self._head.cancel()
        super().connection_lost(exc)

    def _give_up(self):
        self._head.cancel()
        if self.conn.their_state is h11.IDLE and not self.transport.is_closing():
            self.transport.close()
