"""The compatible APIs, tested with their own public clients."""

from __future__ import annotations

import base64
import io
import threading
from collections.abc import Iterator
from typing import Any

import httpx
import numpy as np
import openai
import pytest
import webuiapi
from helpers_server import Live
from PIL import Image

from cascade import CascadePipeline


@pytest.fixture
def client(server: Live) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.address}/v1", api_key="none needed", max_retries=0) as client:
        yield client


def image(text: str | None) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(text or "")))


def test_openais_client_gets_the_pictures_that_the_pipeline_draws(
    client: openai.OpenAI, pipeline: CascadePipeline
) -> None:
    answer = client.images.generate(
        model="tiny", prompt="a fox", n=2, size="32x32", response_format="b64_json", extra_body={"seed": 5}
    )
    expected = pipeline("a fox", seed=5, num_images_per_prompt=2, batch_size=1).images
    assert [image(datum.b64_json).tobytes() for datum in answer.data or []] == [own.tobytes() for own in expected]
    assert answer.size == "32x32"


def test_openais_client_gets_addresses_that_lead_to_pictures(client: openai.OpenAI, server: Live) -> None:
    (datum,) = client.images.generate(prompt="a fox", size="16x16", response_format="url").data or []
    assert str(datum.url).startswith(server.address)
    assert Image.open(io.BytesIO(httpx.get(str(datum.url)).content)).size == (16, 16)


@pytest.mark.parametrize(("size", "drawn"), [("8x8", 8), ("16x16", 16), ("24x24", 32), ("12x12", 16)])
def test_a_size_between_two_stages_is_drawn_by_the_larger_and_averaged_down(
    client: openai.OpenAI, server: Live, size: str, drawn: int
) -> None:
    (datum,) = client.images.generate(prompt="a fox", size=size).data or []  # type: ignore[arg-type]
    assert image(datum.b64_json).size == tuple(map(int, size.split("x")))
    (picture,) = server.client.get("/api/pictures").json()["pictures"]
    assert picture["width"] == drawn


def test_openais_client_gets_webp_and_jpeg(client: openai.OpenAI) -> None:
    for format in ("webp", "jpeg"):
        (datum,) = client.images.generate(prompt="a fox", output_format=format).data or []  # type: ignore[arg-type]
        assert image(datum.b64_json).format == format.upper()


def test_openais_client_streams_partial_pictures_and_then_the_finished_one(client: openai.OpenAI) -> None:
    stream = client.images.generate(prompt="a fox", stream=True, partial_images=2, extra_body={"seed": 5})
    events: list[Any] = list(stream)
    kinds = [event.type.rpartition(".")[2] for event in events]
    assert kinds[-1] == "completed"
    assert 1 <= kinds.count("partial_image") <= 2
    assert image(events[-1].b64_json).size == (32, 32)
    assert all(image(event.b64_json).size[0] in (8, 16, 32) for event in events)


def test_openais_client_gets_errors_in_its_format(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="WIDTHxHEIGHT"):
        client.images.generate(prompt="a fox", size="large")  # type: ignore[call-overload]
    with pytest.raises(openai.NotFoundError, match=r"dall-e-3.*tiny"):
        client.images.generate(prompt="a fox", model="dall-e-3")
    with pytest.raises(openai.BadRequestError, match="not possible"):
        client.images.generate(prompt="a fox", size="33x31")  # type: ignore[call-overload]
    with pytest.raises(openai.BadRequestError, match="not a readable picture"):
        client.images.edit(image=("x.png", b"x"), prompt="a fox")
    with pytest.raises(openai.BadRequestError, match="2 pictures; expected one"):
        client.images.edit(image=[("x.png", b"x"), ("y.png", b"y")], prompt="a fox")
    with pytest.raises(openai.BadRequestError, match="prompt"):
        client.images.edit(image=("x.png", b"x"), prompt=None)  # type: ignore[call-overload]


def png(array: np.ndarray[Any, Any]) -> tuple[str, bytes]:
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, format="PNG")
    return "../x.png", buffer.getvalue()


def noise(height: int, width: int) -> np.ndarray[Any, Any]:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


def test_openais_client_edits_where_its_mask_is_transparent_and_nowhere_else(
    client: openai.OpenAI, pipeline: CascadePipeline
) -> None:
    picture, hole = noise(48, 40), np.zeros((48, 40), dtype=bool)
    hole[4:20, 6:22] = True
    mask = np.dstack([picture, np.where(hole, 0, 255).astype(np.uint8)])
    answer = client.images.edit(image=png(picture), mask=png(mask), prompt="a fox", n=2, extra_body={"seed": 5})
    found = [np.asarray(image(datum.b64_json)) for datum in answer.data or []]
    expected = pipeline("a fox", seed=5, image=picture, mask=hole, num_images_per_prompt=2, batch_size=1).images
    assert [one.tobytes() for one in found] == [one.tobytes() for one in expected]
    assert all(np.array_equal(one[~hole], picture[~hole]) for one in found)
    assert answer.size == "40x48"
    own = client.images.edit(image=png(mask), prompt="a fox", extra_body={"seed": 5}).data or []
    assert np.array_equal(np.asarray(image(own[0].b64_json))[~hole], picture[~hole])


def test_openais_client_edits_a_whole_picture_at_the_size_it_asks_for(
    client: openai.OpenAI, pipeline: CascadePipeline
) -> None:
    picture = noise(20, 20)
    (datum,) = (
        client.images.edit(
            image=png(picture), prompt="a fox", size="32x32", extra_body={"seed": "5", "strength": 0.5}
        ).data
        or []
    )
    expected = pipeline("a fox", seed=5, image=picture, strength=0.5).images[0]
    assert image(datum.b64_json).tobytes() == expected.tobytes()


def test_openais_client_gets_a_stream_of_an_edit(client: openai.OpenAI) -> None:
    stream = client.images.edit(image=png(noise(32, 32)), prompt="a fox", stream=True, partial_images=1)
    events: list[Any] = list(stream)
    assert events[-1].type == "image_edit.completed"
    assert image(events[-1].b64_json).size == (32, 32)


@pytest.mark.filterwarnings("ignore:deprecated:DeprecationWarning")  # their client's word of this call
def test_openais_client_varies_a_picture_by_what_it_shows(client: openai.OpenAI, server: Live) -> None:
    (first,) = client.images.generate(prompt="a red fox", size="32x32").data or []
    content = base64.b64decode(first.b64_json or "")
    varied = client.images.create_variation(image=("x.png", content), n=2, response_format="b64_json").data or []
    assert len({datum.b64_json for datum in varied} - {first.b64_json}) == 2
    assert server.queue.jobs()[-1].asked.prompt == "a red fox"


def test_openais_client_finds_the_model(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").id == "tiny"


def test_a_client_that_goes_away_takes_its_job_with_it(server: Live) -> None:
    opened = threading.Event()
    hub = server.queue.hub
    publish = type(hub).publish.__get__(hub)

    def held(event: Any) -> None:
        publish(event)
        if event.kind == "step":
            opened.wait(10)

    hub.publish = held  # type: ignore[method-assign]
    with pytest.raises(httpx.TimeoutException):
        server.client.post("/v1/images/generations", json={"prompt": "a fox", "n": 8}, timeout=1)
    (job,) = server.queue.jobs()
    for _ in range(100):
        if job.stopping:
            break
        threading.Event().wait(0.05)
    opened.set()
    assert job.result.result(20).state == "stopped"
    assert len(job.pictures) <= 1


def test_automatic1111s_client_draws(server: Live, pipeline: CascadePipeline) -> None:
    api = webuiapi.WebUIApi(port=int(server.address.rpartition(":")[2]))
    result = api.txt2img(prompt="a fox", negative_prompt="red", seed=5, steps=3, cfg_scale=2.5, width=32, height=32)
    expected = pipeline("a fox", negative_prompt="red", seed=5, steps={"base": 3}, guidance={"base": 2.5}).images[0]
    assert result.image.tobytes() == expected.tobytes()
    assert result.info["seed"] == 5
    api.session.close()


def test_automatic1111s_client_changes_a_picture_and_keeps_what_its_mask_leaves(
    server: Live, pipeline: CascadePipeline
) -> None:
    api = webuiapi.WebUIApi(port=int(server.address.rpartition(":")[2]))
    picture, hole = noise(32, 32), np.zeros((32, 32), dtype=np.uint8)
    hole[4:20, 6:22] = 255
    options = {"prompt": "a fox", "seed": 5, "steps": 3, "cfg_scale": 2.5, "denoising_strength": 0.6}
    ours = {"seed": 5, "steps": {"base": 3}, "guidance": {"base": 2.5}, "strength": 0.6, "image": picture}
    found = api.img2img(images=[Image.fromarray(picture)], width=32, height=32, **options).image
    assert found.tobytes() == pipeline("a fox", **ours).images[0].tobytes()
    part = api.img2img(images=[Image.fromarray(picture)], mask_image=Image.fromarray(hole), **options).image
    assert part.tobytes() == pipeline("a fox", mask=hole, **ours).images[0].tobytes()
    assert np.array_equal(np.asarray(part)[hole == 0], picture[hole == 0])
    api.session.close()


def test_automatic1111s_client_asks_for_models_samplers_and_progress(server: Live) -> None:
    api = webuiapi.WebUIApi(port=int(server.address.rpartition(":")[2]))
    assert [model["title"] for model in api.get_sd_models()] == ["tiny"]
    assert api.get_options()["sd_model_checkpoint"] == "tiny"
    assert "DDIM" in [sampler["name"] for sampler in api.get_samplers()]
    assert api.get_progress()["progress"] == 0
    api.session.close()
