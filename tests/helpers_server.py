"""A server in this process, on a free port, with the tiny cascade; and helpers for requests."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import torch

from cascade import CascadePipeline
from cascade.server.app import Server, listening, make_app
from cascade.server.gallery import Gallery
from cascade.server.guard import Rules
from cascade.server.models import Models
from cascade.server.queue import Queue
from cascade.storage.stage import load_stage
from cascade.training.weights import add_low_rank, save_adapter

Load = Callable[[], CascadePipeline]


@dataclass
class Live:
    """A running server with its client."""

    address: str
    queue: Queue
    gallery: Gallery
    client: httpx.Client

    def draw(self, prompt: str = "a fox", **asked: Any) -> dict[str, Any]:
        """A job, once it is over."""
        answer = self.client.post("/api/jobs", json={"prompt": prompt, **asked})
        assert answer.status_code == 202, answer.text
        return self.over(answer.json()["id"])

    def over(self, id: str) -> dict[str, Any]:
        """A job, once it is over."""
        self.queue.job(id).result.result(60)
        return self.client.get(f"/api/jobs/{id}").json()

    def events(self, until: Callable[[str, dict[str, Any]], bool]) -> list[tuple[str, dict[str, Any]]]:
        """The events up to the first for which `until` holds."""
        events: list[tuple[str, dict[str, Any]]] = []
        with self.client.stream("GET", "/api/events", timeout=60) as answer:
            kind = ""
            for line in answer.iter_lines():
                name, _, value = line.partition(": ")
                if name == "event":
                    kind = value
                elif name == "data":
                    events.append((kind, json.loads(value)))
                    if until(*events[-1]):
                        break
        return events


@contextmanager
def live(
    load: Load,
    folder: Path,
    *,
    rules: Rules | None = None,
    models: Models | None = None,
    runs: Path | None = None,
    **queue_options: Any,
) -> Iterator[Live]:
    """A server whose gallery is `folder`."""
    gallery = Gallery(folder)
    if models is not None:
        queue_options.setdefault("adapters", models.adapters_of)
    queue = Queue(load, gallery, **queue_options)
    started = threading.Event()
    app = make_app(queue, rules or Rules(), models or Models(lambda _: load()), page=True, runs=runs)
    with listening("127.0.0.1", 0) as own:
        server = Server(app, queue, started.set)
        thread = threading.Thread(target=server.run, args=([own],))
        queue.start()
        thread.start()
        assert started.wait(30)
        address = f"http://127.0.0.1:{own.getsockname()[1]}"
        try:
            with httpx.Client(base_url=address, timeout=60) as client:
                yield Live(address, queue, gallery, client)
        finally:
            queue.hub.close()
            server.should_exit = True
            thread.join(20)
            queue.close()
            gallery.close()


def make_adapter(folder: Path, model: Path, seed: int = 0) -> None:
    """An adapter with random weights for the base stage of a model."""
    network = load_stage(model / "base").network
    add_low_rank(network, 2, "all")
    weights = dict(network.named_parameters())
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in weights.values():
            if parameter.requires_grad:
                parameter.normal_(std=0.1)
    save_adapter(folder, weights, 2)
