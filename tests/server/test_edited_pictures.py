"""Editing through a real HTTP client: pictures are uploaded, limited, edited as by the pipeline, and stored."""

from __future__ import annotations

import io
import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers_server import Live, live
from PIL import Image

from cascade import CascadePipeline
from cascade.batch.metadata import read_metadata
from cascade.drawing.edit import read_picture
from cascade.pictures.images import digest_of
from cascade.server.jobs import Event
from cascade.server.sources import Sources


def pixels(height: int = 32, width: int = 32, seed: int = 0) -> np.ndarray[Any, Any]:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def png(array: np.ndarray[Any, Any]) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, format="PNG")
    return buffer.getvalue()


def uploaded(server: Live, array: np.ndarray[Any, Any]) -> str:
    answer = server.client.post("/api/uploads", files={"picture": ("x.png", png(array), "image/png")})
    assert answer.status_code == 201, answer.text
    assert (answer.json()["height"], answer.json()["width"]) == array.shape[:2]
    return str(answer.json()["name"])


def drawn(server: Live, **asked: Any) -> np.ndarray[Any, Any]:
    job = server.draw(**asked)
    assert job["state"] == "done", job
    (picture,) = job["pictures"].values()
    array = np.array(Image.open(io.BytesIO(server.gallery.read(picture["id"])[1])))
    assert (picture["height"], picture["width"]) == array.shape[:2] == (job["size"]["height"], job["size"]["width"])
    return array


def square(height: int = 32, width: int = 32) -> np.ndarray[Any, Any]:
    mask = np.zeros((height, width), dtype=np.uint8)
    mask[8:20, 8:20] = 255
    return mask


def test_a_changed_picture_is_the_one_that_the_pipeline_draws(server: Live, pipeline: CascadePipeline) -> None:
    image = pixels()
    name = uploaded(server, image)
    assert name == digest_of(read_picture(image)[0])
    found = drawn(server, seed=5, image=name, strength=0.6)
    assert np.array_equal(found, np.array(pipeline("a fox", seed=5, image=image, strength=0.6).images[0]))


def test_outside_the_mask_every_bit_stays_whatever_the_size(server: Live, pipeline: CascadePipeline) -> None:
    image, mask = pixels(50, 70), square(50, 70)
    found = drawn(server, seed=5, image=uploaded(server, image), mask=uploaded(server, mask))
    assert np.array_equal(found[mask == 0], image[mask == 0])
    assert not np.array_equal(found[mask > 0], image[mask > 0])
    assert np.array_equal(found, np.array(pipeline("a fox", seed=5, image=image, mask=mask).images[0]))


def test_a_side_is_extended_and_the_picture_is_still_there(server: Live) -> None:
    image = pixels()
    found = drawn(server, seed=5, image=uploaded(server, image), extend={"left": 16})
    assert found.shape == (32, 48, 3)
    assert np.array_equal(found[:, 16:], image)


def test_a_variation_of_share_zero_is_the_picture_and_of_another_share_is_not(server: Live) -> None:
    same = drawn(server, seed=5)
    assert np.array_equal(drawn(server, seed=5, variation=["9", 0.0]), same)
    assert not np.array_equal(drawn(server, seed=5, variation=["9", 0.5]), same)


@pytest.mark.parametrize("size", [(16, 16, 32), (10, 20, 50), (32, 32, 36)])
def test_a_picture_is_enlarged_as_the_pipeline_does_it(
    server: Live, pipeline: CascadePipeline, size: tuple[int, int, int]
) -> None:
    """Also where a stage is used twice, and where what it draws is averaged down."""
    height, width, to = size
    image = pixels(height, width)
    found = drawn(server, seed=5, image=uploaded(server, image), to=to)
    expected = pipeline.upscale(image, prompt="a fox", seed=5, to=to).images[0]
    assert max(found.shape) == to
    assert np.array_equal(found, np.array(expected))


def test_a_picture_of_the_gallery_is_changed_by_its_id(server: Live, pipeline: CascadePipeline) -> None:
    (first,) = server.draw(seed=1)["pictures"].values()
    again = drawn(server, seed=2, image=first["id"], strength=0.5)
    image = pipeline("a fox", seed=1).images[0]
    assert np.array_equal(again, np.array(pipeline("a fox", seed=2, image=image, strength=0.5).images[0]))


LANGUAGE: list[dict[str, Any]] = [
    {"prompt": "a (red:1.4) fox AND a box:0.5", "prompt_language": True},
    {"prompt": "two shapes", "regions": [{"box": [0, 0, 0.5, 1], "prompt": "a fox"}]},
    {"prompt": "a fox", "guidance": 4, "guidance_rescale": 0.7},
    {"prompt": "a fox", "guidance": 4, "projection": 0.2},
    {"prompt": "a fox", "guidance": 4, "projection": {"base": {"parallel": 0.0, "momentum": -0.5}}},
    {"prompt": "a red fox of the apple " * 20, "long_prompts": "chunk"},
    {"prompt": "a fox", "variation": ["9", 0.5], "variation_noise": "all"},
]


def as_call(asked: dict[str, Any]) -> dict[str, Any]:
    """The request as arguments of the pipeline."""
    call = dict(asked)
    if "regions" in call:
        call["regions"] = [(region["box"], region["prompt"]) for region in call["regions"]]
    if isinstance(call.get("projection"), float):
        call["projection"] = {"parallel": call["projection"]}
    if "variation" in call:
        call["variation"] = (int(call["variation"][0]), call["variation"][1])
    return call


@pytest.mark.parametrize("asked", LANGUAGE, ids=lambda asked: next(name for name in list(asked)[::-1]))
def test_prompts_regions_and_guidance_are_as_the_pipeline_draws_them_and_are_read_back(
    server: Live, pipeline: CascadePipeline, asked: dict[str, Any]
) -> None:
    job = server.draw(**asked, seed=5, until=8)
    (first,) = job["pictures"].values()
    found = np.array(Image.open(io.BytesIO(server.gallery.read(first["id"])[1])))
    assert np.array_equal(found, np.array(pipeline(**as_call(asked), seed=5, until=8).images[0]))
    assert not np.array_equal(found, np.array(pipeline("a fox", seed=5, until=8).images[0]))
    again = server.client.get(f"/api/pictures/{first['id']}/asked").json()
    (second,) = server.draw(**again)["pictures"].values()
    assert np.array_equal(np.array(Image.open(io.BytesIO(server.gallery.read(second["id"])[1]))), found)


def test_a_sheet_is_a_job_for_each_cell_with_one_seed(server: Live, pipeline: CascadePipeline) -> None:
    asked = {"prompt": "a red fox", "until": 8}
    answer = server.client.post("/api/matrix", json={"asked": asked, "matrix": ["words=red,blue", "steps=1,3"]})
    assert answer.status_code == 202, answer.text
    said = answer.json()
    assert (said["columns"], said["rows"]) == (["red", "blue"], ["steps 1", "steps 3"])
    (seed,) = {job["asked"]["seed"] for job in said["jobs"]}
    cells = [("a red fox", 1), ("a blue fox", 1), ("a red fox", 3), ("a blue fox", 3)]
    for job, (prompt, steps) in zip(said["jobs"], cells, strict=True):
        (picture,) = server.over(job["id"])["pictures"].values()
        found = np.array(Image.open(io.BytesIO(server.gallery.read(picture["id"])[1])))
        expected = pipeline(prompt, steps=steps, seed=int(seed), until=8).images[0]
        assert np.array_equal(found, np.array(expected))


@pytest.mark.parametrize(
    ("asked", "matrix", "reason"),
    [
        ({}, ["lora=0,1"], "the server's model has its adapters already"),
        ({}, ["seed=1..65"], "65 pictures; at most 64"),
        ({}, ["stepps=1"], "did you mean steps"),
        ({}, ["steps=1,0"], "steps"),
        ({}, ["sampler=ddim,eulr"], "eulr"),
        ({}, ["words=red,blue"], "'red' is not in the prompt"),
        ({"num_images_per_prompt": 2}, ["steps=1,2"], "has one drawn picture per cell"),
    ],
)
def test_a_sheet_with_a_cell_that_cannot_be_drawn_draws_none(
    server: Live, asked: dict[str, Any], matrix: list[str], reason: str
) -> None:
    answer = server.client.post("/api/matrix", json={"asked": {"prompt": "a fox", **asked}, "matrix": matrix})
    assert answer.status_code == 400, answer.text
    assert reason in answer.json()["error"]
    assert all(job.over or job.stopping for job in server.queue.jobs())


@pytest.mark.parametrize(
    ("asked", "reason"),
    [
        ({"prompt": "a (fox", "prompt_language": True}, "( is not closed"),
        ({"regions": [{"box": [0.5, 0, 0.2, 1], "prompt": "x"}]}, "expected left, top, right, bottom"),
        ({"regions": [{"box": [0, 0, 2, 1], "prompt": "x"}]}, "regions"),
        ({"regions": ["/etc/passwd: x"]}, "regions"),
        ({"regions": [{"box": [0, 0, 1, 1], "prompt": "x"}] * 17}, "regions"),
        ({"projection": {"bse": 0.5}}, "no stage is called 'bse'"),
        ({"known": "clean"}, "known: there is no picture to change"),
    ],
)
def test_a_wrong_prompt_or_region_is_refused_with_the_reason(server: Live, asked: dict[str, Any], reason: str) -> None:
    answer = server.client.post("/api/jobs", json={"prompt": "a fox", **asked})
    assert answer.status_code in (400, 422), answer.text
    assert reason in answer.json()["error"]
    assert server.queue.jobs() == []


@pytest.mark.parametrize("change", [{"strength": 0.6}, {"mask": True}, {"extend": {"top": 8}}, {"to": 64}])
def test_what_a_picture_records_of_its_change_draws_it_again(server: Live, change: dict[str, Any]) -> None:
    if change.get("mask"):
        change = {"mask": uploaded(server, square())}
    job = server.draw(seed=5, image=uploaded(server, pixels()), resampling=1, **change)
    (first,) = job["pictures"].values()
    asked = server.client.get(f"/api/pictures/{first['id']}/asked").json()
    (second,) = server.draw(**asked)["pictures"].values()
    one, other = (Image.open(io.BytesIO(server.gallery.read(id["id"])[1])) for id in (first, second))
    assert one.tobytes() == other.tobytes()
    said = read_metadata(io.BytesIO(server.gallery.read(first["id"])[1]))[0]
    assert said.get("image") or said.get("source")


def test_a_stopped_masked_picture_leaves_no_part_behind_as_if_it_were_whole(server: Live) -> None:
    hub = server.queue.hub
    publish = type(hub).publish.__get__(hub)

    def published(event: Event) -> None:
        publish(event)
        if event.kind == "step" and event.data["stage"] == "sr32":
            server.queue.stop(server.queue.job(event.data["job"]))

    hub.publish = published  # type: ignore[method-assign]
    job = server.draw(image=uploaded(server, pixels()), mask=uploaded(server, square()))
    assert (job["state"], job["pictures"]) == ("stopped", {})


def test_a_change_that_waits_is_drawn_after_a_restart(pipeline: CascadePipeline, tmp_path: Path) -> None:
    with live(lambda: pipeline, tmp_path) as server:
        name = uploaded(server, pixels())
        expected = drawn(server, seed=3, image=name, strength=0.6)
        left = [{"asked": {"prompt": "a fox", "seed": "3", "image": name, "strength": 0.6}, "missing": [0]}]
        kept = server.gallery.state / "queue.json"
    kept.write_text(json.dumps(left))
    with live(lambda: pipeline, tmp_path) as server:
        _ = server.queue.pipeline
        events = server.events(lambda _, data: data.get("jobs", [data])[0].get("state") == "done")
        job = events[-1][1].get("jobs", [events[-1][1]])[0]
        content = server.gallery.read(job["pictures"]["0"]["id"])[1]
    assert np.array_equal(np.array(Image.open(io.BytesIO(content))), expected)


def test_jobs_that_are_over_hold_no_picture(server: Live) -> None:
    job = server.draw(image=uploaded(server, pixels()), strength=0.5)
    own = server.queue.job(job["id"])
    assert own.held_bytes == 32 * 32 * 3
    assert own.plan.edit is None


@pytest.mark.parametrize(
    ("asked", "reason"),
    [
        ({"image": "../../etc/passwd"}, "no such picture"),
        ({"image": "/etc/passwd"}, "no such picture"),
        ({"image": "0" * 64}, "no such picture"),
        ({"image": "0" * 16}, "no such picture"),
        ({"strength": 0.5}, "strength: there is no picture to change"),
        ({"to": 64}, "to: no picture to enlarge"),
        ({"image": "UPLOAD", "to": 64, "strength": 0.5}, "strength: cannot be combined with `to`"),
        ({"image": "UPLOAD", "to": 20}, "to: 20"),
        ({"image": "UPLOAD", "to": 9000}, "pixels"),
        ({"image": "UPLOAD", "mask": "UPLOAD", "extend": {"left": 8}}, "extend: there is a mask already"),
        ({"image": "UPLOAD", "extend": {}}, "extend"),
    ],
)
def test_a_change_that_cannot_be_made_is_refused_with_the_reason(
    server: Live, asked: dict[str, Any], reason: str
) -> None:
    name = uploaded(server, pixels())
    asked = {field: name if value == "UPLOAD" else value for field, value in asked.items()}
    answer = server.client.post("/api/jobs", json={"prompt": "a fox", **asked})
    assert answer.status_code == 400, answer.text
    assert reason in answer.json()["error"]
    assert server.queue.jobs() == []


def bomb(side: int) -> bytes:
    """A PNG of side x side, a few kilobytes, whose pixels nobody wants in memory."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")

    head = side.to_bytes(4, "big") * 2 + bytes([8, 2, 0, 0, 0])
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


@pytest.mark.parametrize("content", [b"", b"nothing", bomb(6000), png(pixels())[:100], b"GIF89a" + bytes(50)])
def test_an_upload_that_is_no_picture_or_too_large_is_refused(server: Live, content: bytes) -> None:
    answer = server.client.post("/api/uploads", files={"picture": ("../x.png", content, "image/png")})
    assert answer.status_code == 400, answer.text
    assert "picture" in answer.json()["error"]
    assert list((server.gallery.state / "sources").glob("*")) == []


def test_more_bytes_than_a_request_may_have_are_refused_unread(server: Live) -> None:
    answer = server.client.post("/api/uploads", files={"picture": ("x.png", bytes(25 << 20), "image/png")})
    assert answer.status_code == 413


def test_uploads_are_kept_up_to_a_size_and_the_oldest_go_first(tmp_path: Path) -> None:
    one = len(png(pixels()))
    sources = Sources(tmp_path / "kept", tmp_path, lambda _: b"", most_bytes=3 * one)
    names = [str(sources.take(png(pixels(seed=seed)))["name"]) for seed in range(6)]
    there = {path.stem for path in (tmp_path / "kept").glob("*.png")}
    assert there <= set(names[2:])
    assert names[-1] in there


def test_what_was_uploaded_comes_back_as_it_was(server: Live) -> None:
    image = pixels()
    content = server.client.get(f"/api/uploads/{uploaded(server, image)}").content
    assert np.array_equal(np.array(Image.open(io.BytesIO(content))), image)
    assert server.client.get("/api/uploads/..%2f..%2fqueue.json").status_code in (400, 404)
