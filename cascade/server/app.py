"""The whole application (page, cascade's API, compatible APIs, health, behind the guard), run on a socket."""

from __future__ import annotations

import asyncio
import errno
import hashlib
import math
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import resources
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import APIRouter, FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse
from starlette.exceptions import HTTPException
from uvicorn.protocols.http.h11_impl import H11Protocol

from cascade._version import __version__
from cascade.batch.metadata import NoRecipeError
from cascade.errors import CascadeError
from cascade.server.a1111 import a1111_router
from cascade.server.api import files_router, gallery_router, jobs_router, model_router, runs_router
from cascade.server.guard import App, Guard, Rules
from cascade.server.jobs import FullError
from cascade.server.models import Models
from cascade.server.openai import error_of, openai_router
from cascade.server.queue import BusyError, Queue
from cascade.server.runs import Runs

# --- health ----------------------------------------------------------------------------------------------------------
# Monitoring of the server: health and metrics.


def health_router(queue: Queue) -> APIRouter:
    """`/health` and `/metrics`."""
    router = APIRouter(tags=["health"])

    @router.get("/health", response_model=None)
    def health() -> Response:
        """`ok`, `loading` or `failed`; status 503 if nothing can be drawn."""
        loaded = queue.worker.pipeline
        failed = not queue.worker.alive or (loaded.done() and loaded.exception() is not None)
        status = "failed" if failed else "ok" if loaded.done() else "loading"
        return JSONResponse({"status": status, "waiting": len(queue.line)}, 503 if failed else 200)

    @router.get("/metrics")
    def metrics() -> PlainTextResponse:
        """Prometheus' text format."""
        counts = queue.worker.counts
        lines = [
            *_metric("pictures_drawn_total", "counter", "Pictures drawn since the start.", counts.drawn),
            *_metric("pictures_failed_total", "counter", "Pictures that could not be drawn.", counts.failed),
            *_metric("pictures_stopped_total", "counter", "Pictures that were stopped.", counts.stopped),
            *_metric("drawing_seconds_total", "counter", "Seconds of drawing.", counts.seconds),
            *_metric("pictures_waiting", "gauge", "Pictures waiting.", len(queue.line)),
            *_metric("seconds_left", "gauge", "Estimated time until all are drawn.", queue.seconds_left()),
        ]
        return PlainTextResponse("\n".join(lines) + "\n", media_type="text/plain; version=0.0.4")

    return router


def _metric(name: str, kind: str, help: str, value: float) -> list[str]:
    return [f"# HELP cascade_{name} {help}", f"# TYPE cascade_{name} {kind}", f"cascade_{name} {value:g}"]


# --- app -------------------------------------------------------------------------------------------------------------

_TYPES = {".html": "text/html", ".css": "text/css", ".mjs": "text/javascript", ".svg": "image/svg+xml"}


def make_app(queue: Queue, rules: Rules, models: Models, *, page: bool, runs: Path | None = None) -> App:
    """The application. page: also serve the web page. runs: a folder of training runs."""
    app = _bare_app()
    app.include_router(model_router(queue, models))
    app.include_router(openai_router(queue, models))
    for router in (jobs_router, gallery_router, files_router, a1111_router, health_router):
        app.include_router(router(queue))
    app.include_router(runs_router(Runs(runs or Path("runs"))))
    if page:
        app.include_router(_page_router())
    _answer_errors(app, queue)
    return Guard(app, rules)


def make_stateless_app(queue: Queue, rules: Rules) -> App:
    """The application of one of several replicas: only requests that need no state from earlier ones."""
    app = _bare_app()
    app.include_router(openai_router(queue, keeps=False))
    app.include_router(health_router(queue))
    _answer_errors(app, queue)
    return Guard(app, rules)


def _bare_app() -> FastAPI:
    # FastAPI's documentation pages would load scripts from a CDN.
    return FastAPI(title="cascade", version=__version__, docs_url=None, redoc_url=None)


def _page_router() -> APIRouter:
    """Routes of the page's files, which are read once, so that no path of a request reaches the disk."""
    router = APIRouter()
    for file in resources.files("cascade.server").joinpath("page").iterdir():
        content, suffix = file.read_bytes(), Path(file.name).suffix
        if suffix in _TYPES:
            address = "/" if file.name == "index.html" else f"/page/{file.name}"
            router.add_api_route(address, _sending(content, _TYPES[suffix]), include_in_schema=False)
    return router


def _sending(content: bytes, kind: str) -> Any:
    tag = f'"{hashlib.sha256(content).hexdigest()[:16]}"'
    headers = {"etag": tag, "cache-control": "no-cache"}

    def send(request: Request) -> Response:
        if request.headers.get("if-none-match") == tag:
            return Response(status_code=304, headers=headers)
        return Response(content, media_type=f"{kind}; charset=utf-8", headers=headers)

    return send


def _answer_errors(app: FastAPI, queue: Queue) -> None:
    @app.exception_handler(FullError)
    def full(request: Request, error: FullError) -> Response:
        wait = {"retry-after": str(max(1, math.ceil(queue.seconds_left())))}
        return _answer(request, 429, str(error), wait)

    @app.exception_handler(BusyError)
    def busy(request: Request, error: BusyError) -> Response:
        return _answer(request, 409, str(error))

    @app.exception_handler(CascadeError)
    def wrong(request: Request, error: CascadeError) -> Response:
        return _answer(request, 400, str(error), code="no_recipe" if isinstance(error, NoRecipeError) else "")

    @app.exception_handler(RequestValidationError)
    def invalid(request: Request, error: RequestValidationError) -> Response:
        told = [f"{'.'.join(map(str, part['loc'][1:])) or 'body'}: {part['msg']}" for part in error.errors()]
        return _answer(request, 422, "; ".join(told))

    @app.exception_handler(HTTPException)
    def http(request: Request, error: HTTPException) -> Response:
        return _answer(request, error.status_code, str(error.detail), dict(error.headers or {}))


def _answer(
    request: Request, status: int, message: str, headers: dict[str, str] | None = None, code: str = ""
) -> Response:
    """An error response in the format of the requested API. code: what the page acts on; messages are for people."""
    path = request.url.path
    body: dict[str, Any] = {"error": message} | ({"code": code} if code else {})
    if path.startswith("/v1/"):
        body = error_of(status, message)
    elif path.startswith("/sdapi/"):
        body = {"detail": message}
    return JSONResponse(body, status, headers)


# --- run -------------------------------------------------------------------------------------------------------------
# Running the server on a socket.

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
