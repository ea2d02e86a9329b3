"""Running the server on a socket."""

from __future__ import annotations

import asyncio
import errno
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from cascade.errors import CascadeError
from cascade.server.guard import App
from cascade.server.queue import Queue

HEAD_SECONDS = 10.0
"""Time limit for the headers of a request to arrive; uvicorn would wait for ever."""
_MOST_CONNECTIONS = 256
_GRACE_SECONDS = 5


class ImpatientProtocol(H11Protocol):
    """HTTP/1.1 that closes connections whose request headers arrive too slowly."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._patience = self.loop.call_later(HEAD_SECONDS, self._hang_up)

    def connection_lost(self, exc: Exception | None) -> None:
        self._patience.cancel()
        super().connection_lost(exc)

    def on_response_complete(self) -> None:
        self._patience.cancel()
        self._patience = self.loop.call_later(HEAD_SECONDS, self._hang_up)
        super().on_response_complete()

    def _hang_up(self) -> None:
        if self.cycle is None or self.cycle.response_complete:
            self.transport.close()


class Server(uvicorn.Server):
    """uvicorn's server, which closes event streams on shutdown; otherwise it would wait for them."""

    def __init__(self, app: App, queue: Queue, on_start: Callable[[], object] | None = None) -> None:
        config = uvicorn.Config(
            app,
            http=ImpatientProtocol,
            ws="none",
            lifespan="off",
            log_level="warning",
            access_log=False,
            server_header=False,
            limit_concurrency=_MOST_CONNECTIONS,
            timeout_graceful_shutdown=_GRACE_SECONDS,
        )
        super().__init__(config)
        self._queue, self._on_start = queue, on_start

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self._on_start is not None:
            self._on_start()

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """End the server on a signal, without uvicorn's second raise, which would kill the process before cleanup."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self.handle_exit) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def handle_exit(self, sig: int, frame: Any) -> None:
        super().handle_exit(sig, frame)
        self._queue.hub.close()


@contextmanager
def listening(host: str, port: int, others: int = 0) -> Iterator[socket.socket]:
    """A listening socket; if the port is taken, on one of the next `others` ports. Raises CascadeError."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as own:
        own.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        for candidate in range(port, port + others + 1):
            try:
                own.bind((host, candidate))
                break
            except OSError as error:
                if error.errno != errno.EADDRINUSE or candidate == port + others:
                    raise CascadeError(f"{host}:{port}: {error.strerror or error}; name another --port") from None
        yield own
