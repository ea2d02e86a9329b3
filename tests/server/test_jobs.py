"""Jobs through a real HTTP client: submitted, watched, stopped, shared, resumed."""

from __future__ import annotations

import io
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers_server import Live, live
from PIL import Image

from cascade import CascadePipeline
from cascade.server.jobs import Event


class Gate:
    """Holds the thread that draws after its first step, until it is opened."""

    def __init__(self, server: Live) -> None:
        self.reached, self.open = threading.Event(), threading.Event()

        def hold(_: Event) -> None:
            self.reached.set()
            assert self.open.wait(30)

        at_each_step(server, hold)


def at_each_step(server: Live, act: Callable[[Event], None]) -> None:
    """Have something done in the thread that draws, after each step."""
    hub = server.queue.hub
    publish = type(hub).publish.__get__(hub)

    def published(event: Event) -> None:
        publish(event)
        if event.kind == "step":
            act(event)

    hub.publish = published  # type: ignore[method-assign]


def test_a_job_draws_the_bytes_that_a_call_of_the_pipeline_draws(server: Live, pipeline: CascadePipeline) -> None:
    job = server.draw("a red fox", seed=5, num_images_per_prompt=2, steps={"base": 3})
    assert job["state"] == "done"
    assert list(job["pictures"]) == ["0", "1"]
    expected = pipeline("a red fox", seed=5, num_images_per_prompt=2, steps={"base": 3}, batch_size=1).images
    for number, picture in job["pictures"].items():
        _, content = server.gallery.read(picture["id"])
        assert content == server.client.get(f"/api/pictures/{picture['id']}/file").content
        assert Image.open(io.BytesIO(content)).tobytes() == expected[int(number)].tobytes()


def test_one_picture_of_several_can_be_asked_for_alone(server: Live) -> None:
    both = server.draw("a fox", seed=1, num_images_per_prompt=2)
    second = server.draw("a fox", seed=1, num_images_per_prompt=2, number=1)
    assert list(second["pictures"]) == ["1"]
    ids = [both["pictures"]["1"]["id"], second["pictures"]["1"]["id"]]
    assert ids[0] != ids[1]
    contents = [server.gallery.read(id)[1] for id in ids]
    pixels = [content[content.index(b"IDAT") :] for content in contents]
    assert pixels[0] == pixels[1]


def test_the_news_show_each_step_of_each_stage_growing_and_then_the_picture(server: Live) -> None:
    job: dict[str, Any] = {}

    def ask() -> None:
        job.update(server.client.post("/api/jobs", json={"prompt": "a fox", "seed": 1}).json())

    gate = Gate(server)
    asking = threading.Timer(0.5, lambda: (ask(), gate.open.set()))
    asking.start()
    events = server.events(lambda kind, data: kind == "job" and data["state"] == "done")
    assert events[0][0] == "state"
    steps = [data for kind, data in events if kind == "step"]
    kinds = [kind for kind, _ in events]
    assert "step" not in kinds[kinds.index("picture") :]
    assert steps[-1]["stage"] == "sr32"
    assert steps[-1]["fraction"] == 1
    assert all(step["preview"].startswith("data:image/jpeg;base64,") for step in steps)
    fractions = [step["fraction"] for step in steps]
    assert fractions == sorted(fractions)


def test_a_stop_keeps_the_picture_of_the_last_stage_that_was_done(server: Live) -> None:
    def stop(event: Event) -> None:
        if event.data["stage"] == "sr32":
            server.queue.stop(server.queue.job(event.data["job"]))

    at_each_step(server, stop)
    job = server.draw("a fox", seed=3)
    assert job["state"] == "stopped"
    (picture,) = job["pictures"].values()
    assert (picture["height"], picture["width"]) == (16, 16)
    whole = server.draw("a fox", seed=3, until=16)["pictures"]["0"]
    one, other = (server.gallery.read(found["id"])[1] for found in (picture, whole))
    assert one[one.index(b"IDAT") :] == other[other.index(b"IDAT") :]


def test_a_stopped_job_that_waits_is_never_drawn_and_others_go_on(server: Live) -> None:
    gate = Gate(server)
    first = server.client.post("/api/jobs", json={"prompt": "a fox"}).json()["id"]
    assert gate.reached.wait(30)
    second = server.client.post("/api/jobs", json={"prompt": "an owl"}).json()["id"]
    assert server.client.delete(f"/api/jobs/{second}").json()["state"] == "stopped"
    gate.open.set()
    assert server.over(first)["state"] == "done"
    assert server.client.get(f"/api/jobs/{second}").json()["pictures"] == {}


def test_a_short_job_of_one_tab_is_not_kept_waiting_by_a_long_one_of_another(server: Live) -> None:
    gate = Gate(server)
    headers = [{"x-cascade-client": name} for name in ("long", "short")]
    asked = [{"prompt": "a fox", "num_images_per_prompt": 6}, {"prompt": "an owl"}]
    ids = [
        server.client.post("/api/jobs", json=body, headers=header).json()["id"]
        for body, header in zip(asked, headers, strict=True)
    ]
    gate.open.set()
    server.over(ids[1])
    assert len(server.queue.job(ids[0]).pictures) <= 3
    assert server.over(ids[0])["state"] == "done"


def test_more_than_may_wait_is_refused_with_a_time_to_come_back(pipeline: CascadePipeline, tmp_path: Path) -> None:
    with live(lambda: pipeline, tmp_path, most_waiting=2) as server:
        gate = Gate(server)
        ids = [server.client.post("/api/jobs", json={"prompt": "a fox"}).json()["id"]]
        assert gate.reached.wait(30)
        ids += [server.client.post("/api/jobs", json={"prompt": "a fox"}).json()["id"] for _ in range(2)]
        refused = server.client.post("/api/jobs", json={"prompt": "a fox"})
        gate.open.set()
        assert refused.status_code == 429
        assert int(refused.headers["retry-after"]) >= 1
        assert all(server.over(id)["state"] == "done" for id in ids)


def test_unfinished_jobs_are_drawn_after_a_restart(pipeline: CascadePipeline, tmp_path: Path) -> None:
    with live(lambda: pipeline, tmp_path) as server:
        gate = Gate(server)
        server.client.post("/api/jobs", json={"prompt": "a fox", "seed": 4, "num_images_per_prompt": 3})
        assert gate.reached.wait(30)
        threading.Timer(0.3, gate.open.set).start()
    with live(lambda: pipeline, tmp_path) as server:
        _ = server.queue.pipeline
        events = server.events(lambda _, data: data.get("jobs", [data])[0].get("state") == "done")
        job = events[-1][1].get("jobs", [events[-1][1]])[0]
        assert job["asked"]["prompt"] == "a fox"
        assert job["asked"]["seed"] == "4"
        page = server.client.get("/api/pictures").json()
        assert sorted(picture["number"] for picture in page["pictures"]) == [0, 1, 2]


def test_a_model_that_cannot_be_loaded_is_an_error_of_every_request(tmp_path: Path) -> None:
    from cascade.errors import CascadeError

    def load() -> CascadePipeline:
        raise CascadeError("tiny/base: no such folder")

    with live(load, tmp_path) as server:
        answer = server.client.post("/api/jobs", json={"prompt": "a fox"})
        assert (answer.status_code, answer.json()["error"]) == (400, "tiny/base: no such folder")
        assert server.client.get("/health").status_code == 503


@pytest.mark.parametrize(
    ("asked", "reason"),
    [
        ({"prompt": "a fox", "until": 7}, "until: no stage draws 7 px"),
        ({"prompt": "a fox", "height": 33}, "height: 33 is not possible"),
        ({"prompt": "a fox", "steps": {"bse": 2}}, "did you mean base"),
        ({"prompt": "a fox", "height": 1 << 15, "width": 1 << 15}, "pixels"),
        ({"prompt": "a fox", "sampler": "euler"}, "sampler"),
    ],
)
def test_what_cannot_be_drawn_is_refused_with_the_reason(server: Live, asked: dict[str, Any], reason: str) -> None:
    answer = server.client.post("/api/jobs", json=asked)
    assert answer.status_code == 400
    assert reason in answer.json()["error"]


@pytest.mark.parametrize("asked", [{}, {"prompt": 3}, {"prompt": "x" * 4001}, {"prompt": "x", "sead": 1}])
def test_a_malformed_job_is_refused_with_the_name_of_the_field(server: Live, asked: dict[str, Any]) -> None:
    answer = server.client.post("/api/jobs", json=asked)
    assert answer.status_code == 422
    assert ("sead" if "sead" in asked else "prompt") in answer.json()["error"]


def test_an_error_while_drawing_fails_the_job_and_the_next_one_is_drawn(server: Live) -> None:
    def fail(_: Event) -> None:
        raise RuntimeError("a secret of the machine")

    at_each_step(server, fail)
    job = server.draw("a fox")
    at_each_step(server, lambda _: None)
    assert job["state"] == "failed"
    assert "secret" not in job["error"]
    assert server.draw("a fox")["state"] == "done"


def test_the_metrics_count_what_was_drawn(server: Live) -> None:
    server.draw("a fox", num_images_per_prompt=2)
    text = server.client.get("/metrics").text
    assert "cascade_pictures_drawn_total 2\n" in text
    assert "cascade_pictures_waiting 0\n" in text
    assert server.client.get("/health").json() == {"status": "ok", "waiting": 0}
