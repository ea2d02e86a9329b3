"""Monitoring of the server: health and metrics."""

from __future__ import annotations

from fastapi import APIRouter, Response
from fastapi.responses import JSONResponse, PlainTextResponse

from cascade.server.queue import Queue


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
