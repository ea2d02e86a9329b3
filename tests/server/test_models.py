"""Another model is chosen: only one that is there, only while nothing is drawn, and it draws its own pictures."""

from __future__ import annotations

import gc
import io
import shutil
import threading
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers_model import make_tiny_cascade
from helpers_server import Live, live
from PIL import Image

from cascade import CascadePipeline
from cascade.errors import CascadeError
from cascade.server.models import Models


@pytest.fixture
def two(model: Path, tmp_path: Path) -> Iterator[tuple[Live, list[weakref.ref[CascadePipeline]]]]:
    """A server over `tiny`, and a folder with `other`, which draws differently, and `broken`."""
    folder = tmp_path / "models"
    other = make_tiny_cascade(folder / "other")
    (other / "cascade.json").write_text((other / "cascade.json").read_text().replace('"tiny"', '"other"'))
    shutil.rmtree(folder / "other-t5")
    (folder / "broken").mkdir()
    (folder / "broken" / "cascade.json").write_text("{}")
    (folder / "no-model").mkdir()
    loaded: list[weakref.ref[CascadePipeline]] = []

    def load(place: str | None) -> CascadePipeline:
        pipeline = CascadePipeline.from_pretrained(place, device="cpu")
        loaded.append(weakref.ref(pipeline))
        return pipeline

    models = Models(load, str(model), folder)
    with live(models.choose(models.current), tmp_path / "out", models=models) as server:
        yield server, loaded


def chosen(server: Live, name: str) -> Any:
    return server.client.put("/api/model", json={"name": name})


def pixels(server: Live, **asked: Any) -> bytes:
    (picture,) = server.draw(**asked)["pictures"].values()
    return Image.open(io.BytesIO(server.gallery.read(picture["id"])[1])).tobytes()


def test_a_chosen_model_draws_and_the_one_before_is_let_go(
    two: tuple[Live, list[weakref.ref[CascadePipeline]]],
) -> None:
    server, loaded = two
    assert server.client.get("/api/models").json()["models"] == ["tiny", "broken", "other", "bundled"]
    first = pixels(server, seed=1)
    assert chosen(server, "other").status_code == 202
    assert server.client.get("/api/model").json()["name"] == "other"
    assert server.client.get("/api/models").json()["models"][0] == "other"
    (picture,) = server.draw(seed=1)["pictures"].values()
    assert picture["model"] == "other"
    gc.collect()
    assert loaded[0]() is None
    chosen(server, "tiny")
    assert pixels(server, seed=1) == first


@pytest.mark.parametrize("name", ["no-model", "../models/other", "/etc", "", "Other"])
def test_a_name_that_is_not_on_the_list_is_refused(
    two: tuple[Live, list[weakref.ref[CascadePipeline]]], name: str
) -> None:
    server, _ = two
    answer = chosen(server, name)
    assert answer.status_code == 400
    assert "expected one of" in answer.json()["error"]
    assert server.client.get("/api/model").json()["name"] == "tiny"


def test_a_model_that_cannot_be_loaded_is_reported_and_another_can_be_chosen(
    two: tuple[Live, list[weakref.ref[CascadePipeline]]],
) -> None:
    server, _ = two
    _ = server.queue.pipeline
    assert chosen(server, "broken").status_code == 202
    with pytest.raises(CascadeError):
        _ = server.queue.pipeline
    assert server.client.get("/health").status_code == 503
    assert server.client.post("/api/jobs", json={"prompt": "a fox"}).status_code == 400
    chosen(server, "tiny")
    assert server.draw("a fox")["state"] == "done"


def test_no_model_is_changed_while_pictures_are_drawn(two: tuple[Live, list[weakref.ref[CascadePipeline]]]) -> None:
    server, _ = two
    hub, held = server.queue.hub, threading.Event()
    publish = type(hub).publish.__get__(hub)
    hub.publish = lambda event: (publish(event), event.kind == "step" and held.wait(30))  # type: ignore[method-assign]
    id = server.client.post("/api/jobs", json={"prompt": "a fox"}).json()["id"]
    answer = chosen(server, "other")
    held.set()
    assert answer.status_code == 409
    assert server.over(id)["state"] == "done"
    assert server.client.get("/api/models").json()["models"][0] == "tiny"
