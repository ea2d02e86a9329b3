"""Another model is chosen: only one that is there, only while nothing is drawn, and it draws its own pictures."""

from __future__ import annotations

import base64
import gc
import io
import shutil
import threading
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields
from pathlib import Path
from typing import Any

import openai
import pytest
from helpers_model import make_tiny_cascade
from helpers_server import Live, live, make_adapter
from PIL import Image

from cascade import CascadePipeline
from cascade.batch.metadata import read_metadata
from cascade.cli.serve import Request
from cascade.errors import CascadeError
from cascade.server.jobs import Piece
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


def openai_client(server: Live) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.address}/v1", api_key="none", max_retries=0, timeout=60)


def sent(client: openai.OpenAI, model: str) -> str:
    """The model in the metadata of a picture."""
    (datum,) = client.images.generate(prompt="a fox", model=model, extra_body={"seed": 1}).data or []
    return str(read_metadata(io.BytesIO(base64.b64decode(str(datum.b64_json))))[0]["model"])


def test_a_request_of_openais_client_names_its_model(two: tuple[Live, list[weakref.ref[CascadePipeline]]]) -> None:
    server, loaded = two
    with openai_client(server) as client:
        ids = [model.id for model in client.models.list()]
        assert ids[:3] == ["tiny", "broken", "other"]
        assert len(ids) == 4  # and the bundled one, by its own name
        assert [sent(client, "tiny"), sent(client, "other")] == ["tiny", "other"]
        assert next(model.id for model in client.models.list()) == "other"
        assert sent(client, "tiny") == "tiny"
        assert len(loaded) == 3
        with pytest.raises(openai.NotFoundError, match="'third' is not available; this server has 'tiny', 'broken'"):
            sent(client, "third")
        with pytest.raises(openai.BadRequestError, match=r"cascade\.json"):
            sent(client, "broken")
        assert sent(client, "other") == "other"


def test_requests_for_several_models_wait_for_each_other(
    two: tuple[Live, list[weakref.ref[CascadePipeline]]],
) -> None:
    server, _ = two
    with openai_client(server) as client, ThreadPoolExecutor(6) as pool:
        names = ["tiny", "other"] * 3
        assert list(pool.map(lambda name: sent(client, name), names)) == names


def test_a_request_for_another_model_is_refused_when_the_current_one_stays_busy(
    two: tuple[Live, list[weakref.ref[CascadePipeline]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    server, _ = two
    monkeypatch.setattr("cascade.server.openai._MODEL_SECONDS", 0.0)
    hub, held = server.queue.hub, threading.Event()
    publish = type(hub).publish.__get__(hub)
    hub.publish = lambda event: (publish(event), event.kind == "step" and held.wait(30))  # type: ignore[method-assign]
    id = server.client.post("/api/jobs", json={"prompt": "a fox"}).json()["id"]
    with openai_client(server) as client, pytest.raises(openai.ConflictError, match="choose another model"):
        sent(client, "other")
    held.set()
    assert server.over(id)["state"] == "done"


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


def test_an_adapter_of_the_command_line_belongs_to_the_first_model_and_is_in_the_recipe(
    model: Path, tmp_path: Path
) -> None:
    make_adapter(tmp_path / "mascot", model)
    adapters = {"base": [f"{tmp_path / 'mascot'}:0.5"]}
    expected = CascadePipeline.from_pretrained(model, device="cpu", adapters=adapters)("a fox", seed=1).images[0]

    options = {field.name: None for field in fields(Request)}
    request = Request(**{**options, "model": str(model), "lora": (f"base={tmp_path / 'mascot'}:0.5",), "device": "cpu"})
    models = Models(request._load, str(model))
    with live(models.choose(models.current), tmp_path / "out", models=models) as server:
        assert pixels(server, seed=1) == expected.tobytes()
        assert server.client.get("/api/model").json()["adapters"] == {"base": [0.5]}
        (picture,) = server.client.get("/api/pictures").json()["pictures"]
        assert list(server.gallery.said(picture["id"])["adapters"]) == ["base"]
    assert not any(slot.adapters for slot in request._load(None).slots)


@pytest.fixture
def adapted(model: Path, tmp_path: Path) -> Iterator[Live]:
    """A server that offers the adapters `mascot` and `hat`."""
    for seed, name in enumerate(("mascot", "hat")):
        make_adapter(tmp_path / "loras" / name, model, seed)
    (tmp_path / "loras" / "no-adapter").mkdir()
    options = {field.name: None for field in fields(Request)}
    request = Request(**{**options, "model": str(model), "lora": (), "device": "cpu"})
    models = Models(request._load, str(model), adapters=tmp_path / "loras", fixed=request._fixed)
    with live(models.choose(models.current), tmp_path / "out", models=models) as server:
        yield server


def test_a_request_adds_adapters_at_its_own_scales(adapted: Live, model: Path, tmp_path: Path) -> None:
    loras = tmp_path / "loras"
    several = {"base": [f"{loras / 'hat'}:-0.5", f"{loras / 'mascot'}:1.5"]}
    expected = CascadePipeline.from_pretrained(model, device="cpu", adapters=several)("a fox", seed=1).images[0]
    assert adapted.client.get("/api/model").json()["loras"] == ["hat", "mascot"]
    plain = pixels(adapted, seed=1)
    asked = {"mascot": 1.5, "hat": -0.5}
    (picture,) = adapted.draw(seed=1, adapters=asked)["pictures"].values()
    content = adapted.gallery.read(picture["id"])[1]
    assert Image.open(io.BytesIO(content)).tobytes() == expected.tobytes() != plain
    assert pixels(adapted, seed=1, adapters={"mascot": 0}) == plain
    assert adapted.client.get(f"/api/pictures/{picture['id']}/asked").json()["adapters"] == asked
    assert adapted.client.post("/api/read", files={"picture": ("x.png", content)}).json()["adapters"] == asked
    with openai_client(adapted) as client:
        body = {"seed": 1, "adapters": asked}
        (datum,) = client.images.generate(prompt="a fox", extra_body=body).data or []
    assert Image.open(io.BytesIO(base64.b64decode(str(datum.b64_json)))).tobytes() == expected.tobytes()


def test_requests_with_different_scales_share_no_batch(adapted: Live) -> None:
    jobs = [
        adapted.queue.job(adapted.client.post("/api/jobs", json={"prompt": "a fox", "adapters": scales}).json()["id"])
        for scales in ({}, {"hat": 1}, {"hat": 1.0, "mascot": 0}, {"hat": 0.5}, {"mascot": 1})
    ]
    keys = []
    for job in jobs:
        keys.append((Piece(job, next(job.plan.targets())).agreement, tuple(map(id, job.plan.slots))))
    for job in jobs:
        job.result.result(60)
    assert [[key == other for other in keys] for key in keys] == [
        [place == other or {place, other} == {1, 2} for other in range(5)] for place in range(5)
    ]


@pytest.mark.parametrize(
    ("adapters", "said"),
    [
        ({"cat": 1}, "adapters: 'cat'; expected one of 'hat', 'mascot'"),
        ({"../mascot": 1}, "expected one of 'hat', 'mascot'"),
        ({"no-adapter": 1}, "expected one of 'hat', 'mascot'"),
        ({"hat": 3}, "less than or equal to 2"),
    ],
)
def test_adapters_have_names_of_the_list_and_scales_of_the_range(
    adapted: Live, adapters: dict[str, float], said: str
) -> None:
    answer = adapted.client.post("/api/jobs", json={"prompt": "a fox", "adapters": adapters})
    assert answer.status_code in (400, 422)
    assert said in answer.json()["error"]


def test_a_server_without_adapters_says_how_to_offer_some(server: Live) -> None:
    answer = server.client.post("/api/jobs", json={"prompt": "a fox", "adapters": {"hat": 1}})
    assert answer.json()["error"] == "adapters: this server offers none; start it with --loras FOLDER"
