"""The APIs of others, as their own public clients speak them."""

from __future__ import annotations

import base64
import io
import threading
from collections.abc import Iterator
from typing import Any

import httpx
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


def test_openais_client_hears_what_is_wrong_as_it_expects(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="WIDTHxHEIGHT"):
        client.images.generate(prompt="a fox", size="large")  # type: ignore[call-overload]
    with pytest.raises(openai.NotFoundError, match=r"dall-e-3.*tiny"):
        client.images.generate(prompt="a fox", model="dall-e-3")
    with pytest.raises(openai.BadRequestError, match="not possible"):
        client.images.generate(prompt="a fox", size="33x31")  # type: ignore[call-overload]
    with pytest.raises(openai.APIStatusError, match="does not edit"):
        client.images.edit(image=io.BytesIO(b"x"), prompt="a fox")


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


def test_automatic1111s_client_asks_for_models_samplers_and_progress(server: Live) -> None:
    api = webuiapi.WebUIApi(port=int(server.address.rpartition(":")[2]))
    assert [model["title"] for model in api.get_sd_models()] == ["tiny"]
    assert api.get_options()["sd_model_checkpoint"] == "tiny"
    assert "DDIM" in [sampler["name"] for sampler in api.get_samplers()]
    assert api.get_progress()["progress"] == 0
    api.session.close()
