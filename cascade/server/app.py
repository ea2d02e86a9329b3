"""The whole application: page, cascade's API, and compatible APIs, behind the guard."""

from __future__ import annotations

import hashlib
import math
from importlib import resources
from pathlib import Path
from typing import Any

from fastapi import APIRouter, FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from cascade._version import __version__
from cascade.batch.metadata import NoRecipeError
from cascade.errors import CascadeError
from cascade.server.a1111 import a1111_router
from cascade.server.api import files_router, gallery_router, jobs_router, model_router, runs_router
from cascade.server.guard import App, Guard, Rules
from cascade.server.health import health_router
from cascade.server.models import Models
from cascade.server.openai import error_of, openai_router
from cascade.server.queue import BusyError, Queue
from cascade.server.runs import Runs
from cascade.server.waiting import FullError

_TYPES = {".html": "text/html", ".css": "text/css", ".mjs": "text/javascript", ".svg": "image/svg+xml"}


def make_app(queue: Queue, rules: Rules, models: Models, *, page: bool, runs: Path | None = None) -> App:
    """The application. page: also serve the web page. runs: a folder of training runs."""
    app = _bare_app()
    app.include_router(model_router(queue, models))
    for router in (jobs_router, gallery_router, files_router, openai_router, a1111_router, health_router):
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
