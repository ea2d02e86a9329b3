"""Traces through a real HTTP client: the same as the command's, in turn with all else, and nothing else is readable."""

from __future__ import annotations

import io
from typing import Any

import pytest
from helpers_server import Live
from PIL import Image

from cascade import CascadePipeline
from cascade.server import catalogue


def test_a_trace_holds_every_step_of_the_picture_and_leaves_the_gallery_alone(
    server: Live, pipeline: CascadePipeline
) -> None:
    job = server.draw("a red fox", seed=5, trace=True, until=16)
    assert (job["state"], job["pictures"]) == ("done", {})
    said = server.client.get(f"/api/traces/{job['trace']}").json()
    assert (said["prompt"], said["seed"], said["words"]) == ("a red fox", "5", ["a", "red", "fox"])
    assert [(stage["name"], len(stage["steps"])) for stage in said["stages"]] == [("base", 2), ("sr16", 2)]
    last = said["stages"][-1]["steps"][-1]["files"]["x_hat"]
    shown = Image.open(io.BytesIO(server.client.get(f"/api/traces/{job['trace']}/{last}").content)).convert("RGB")
    drawn = pipeline("a red fox", seed=5, until=16).images[0]
    assert shown.tobytes() == drawn.tobytes()
    assert server.client.get("/api/pictures").json()["total"] == 0
    assert server.draw("a red fox", seed=5, trace=True, until=16)["trace"] == job["trace"]


def test_a_traced_picture_and_others_wait_in_one_line(server: Live) -> None:
    ids = [
        server.client.post("/api/jobs", json={"prompt": "a fox", "until": 8, "trace": trace}).json()["id"]
        for trace in (False, True, False)
    ]
    jobs = [server.over(id) for id in ids]
    assert [job["state"] for job in jobs] == ["done"] * 3
    assert [bool(job["trace"]) for job in jobs] == [False, True, False]


@pytest.mark.parametrize(
    "path",
    ["..%2f..%2fqueue.json", "0" * 32, "x", "NAME/trace.json", "NAME/..%2ftrace.json", "NAME/0-000-z.png", "NAME/x"],
)
def test_nothing_but_a_traces_own_pictures_is_readable(server: Live, path: str) -> None:
    name = server.draw(until=8, trace=True)["trace"]
    assert server.client.get(f"/api/traces/{path.replace('NAME', name)}").status_code == 404
    assert server.client.get(f"/api/traces/{name}/sheet.png").status_code == 200


@pytest.mark.parametrize("asked", [{"num_images_per_prompt": 2}, {"image": "0" * 16}])
def test_a_trace_is_of_one_picture_from_a_prompt(server: Live, asked: dict[str, Any]) -> None:
    answer = server.client.post("/api/jobs", json={"prompt": "a fox", "trace": True, **asked})
    assert answer.status_code == 400
    assert "trace: is of one picture" in answer.json()["error"]


def test_old_traces_make_room(server: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(catalogue, "MOST", 2)
    names = [server.draw(until=8, seed=seed, trace=True)["trace"] for seed in range(4)]
    there = [server.client.get(f"/api/traces/{name}").status_code == 200 for name in names]
    assert there == [False, False, True, True]
