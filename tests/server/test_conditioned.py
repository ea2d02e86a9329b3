"""Conditions other than text through the API and on the page: listed, drawn as by the pipeline, and copied back."""

from __future__ import annotations

import io
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers_model import TEXT_DIM, tiny_stage, tiny_stage_config
from helpers_server import Live, live
from helpers_text import make_tiny_t5
from PIL import Image

from cascade import CascadePipeline, TextEncoder
from cascade.conditions.settings import ClassCondition, NumberCondition, PictureCondition, VectorCondition

CONDITIONS = {
    "shape": ClassCondition(labels=("circle", "star")),
    "age": NumberCondition(range=(0.0, 100.0), default=50.0),
    "style": VectorCondition(dim=2, default="none"),
    "layout": PictureCondition(default="none"),
    "map": PictureCondition(labels=3, default="none"),
}


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> CascadePipeline:
    encoder = TextEncoder.from_pretrained(make_tiny_t5(tmp_path_factory.mktemp("t5") / "t5", TEXT_DIM), max_length=48)
    return CascadePipeline(encoder, [tiny_stage(tiny_stage_config("base", 8, conditions=CONDITIONS))], name="seeing")


@pytest.fixture
def server(pipeline: CascadePipeline, tmp_path: Path) -> Iterator[Live]:
    with live(lambda: pipeline, tmp_path / "out") as running:
        yield running


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()


def layout() -> Image.Image:
    image = Image.new("L", (8, 8))
    image.paste(200, (2, 2, 6, 6))
    return image


def labels() -> Image.Image:
    return Image.fromarray((np.arange(64, dtype=np.uint8) % 3).reshape(8, 8))


def uploaded(server: Live, image: Image.Image) -> str:
    answer = server.client.post("/api/uploads", files={"picture": ("x.png", png(image), "image/png")})
    assert answer.status_code == 201, answer.text
    return str(answer.json()["name"])


def drawn(server: Live, **conditions: Any) -> np.ndarray[Any, Any]:
    job = server.draw(seed=5, conditions=conditions)
    assert job["state"] == "done", job
    (picture,) = job["pictures"].values()
    return np.array(Image.open(io.BytesIO(server.gallery.read(picture["id"])[1])))


def test_the_model_lists_its_conditions(server: Live) -> None:
    card = server.client.get("/api/model").json()
    assert card["reads_text"]
    fields = {field["name"]: field for field in card["conditions"]}
    assert fields.keys() == CONDITIONS.keys()
    assert fields["shape"]["labels"] == ["circle", "star"]
    assert fields["shape"]["default"] is None
    assert (fields["age"]["range"], fields["age"]["default"]) == ([0, 100], 50)
    assert fields["layout"]["kind"] == "picture"


def test_values_of_every_kind_draw_what_the_pipeline_draws(server: Live, pipeline: CascadePipeline) -> None:
    given = {"shape": "star", "age": 3, "style": [1.0, 2.0], "layout": layout(), "map": labels()}
    sent = {**given, "layout": uploaded(server, layout()), "map": uploaded(server, labels())}
    expected = np.array(pipeline("a fox", seed=5, conditions=given).images[0])
    assert np.array_equal(drawn(server, **sent), expected)
    assert np.array_equal(drawn(server, **{**sent, "style": "1, 2"}), expected)
    assert not np.array_equal(drawn(server, **{**sent, "map": "none"}), expected)


def test_the_settings_of_a_picture_draw_it_again_with_its_pictures(server: Live) -> None:
    first = drawn(server, shape="star", layout=uploaded(server, layout()), map=uploaded(server, labels()))
    (picture,) = server.client.get("/api/pictures").json()["pictures"]
    asked = server.client.get(f"/api/pictures/{picture['id']}/asked").json()
    assert (asked["conditions"]["shape"], asked["conditions"]["style"]) == ("star", "none")
    assert np.array_equal(drawn(server, **asked["conditions"]), first)


def test_single_weights_of_guidance_draw_as_by_the_pipeline_and_come_back(
    server: Live, pipeline: CascadePipeline
) -> None:
    weights = {"shape": 5.0, "text": 2.0}
    job = server.draw(seed=5, conditions={"shape": "star"}, guidance_of=weights)
    assert job["state"] == "done", job
    (picture,) = server.client.get("/api/pictures").json()["pictures"]
    found = np.array(Image.open(io.BytesIO(server.gallery.read(picture["id"])[1])))
    expected = pipeline("a fox", seed=5, conditions={"shape": "star"}, guidance_of=weights).images[0]
    assert np.array_equal(found, np.array(expected))
    assert server.client.get(f"/api/pictures/{picture['id']}/asked").json()["guidance_of"] == weights
    answer = server.client.post(
        "/api/jobs", json={"prompt": "a fox", "conditions": {"shape": "star"}, "guidance_of": {"colour": 3}}
    )
    assert answer.status_code == 400
    assert "guidance_of" in answer.json()["error"]


def test_a_vector_is_not_in_a_recipe_and_that_is_said(server: Live) -> None:
    drawn(server, shape="star", style=[1, 2])
    (picture,) = server.client.get("/api/pictures").json()["pictures"]
    answer = server.client.get(f"/api/pictures/{picture['id']}/asked")
    assert answer.status_code == 400
    assert "condition style, whose numbers it does not hold" in answer.json()["error"]


@pytest.mark.parametrize(
    ("conditions", "message"),
    [
        ({}, "condition shape"),
        ({"shape": "stars"}, "did you mean star?"),
        ({"shape": "star", "age": 200}, "expected a number from 0 to 100"),
        ({"shape": "star", "colour": "red"}, "this model reads shape"),
        ({"shape": "star", "style": "/etc/passwd"}, "expected 2 numbers"),
        ({"shape": "star", "layout": "/etc/passwd"}, "condition layout: no such picture here"),
        ({"shape": "star", "layout": 3}, "condition layout"),
        ({"shape": "star", "map": "UPLOAD"}, "has the label 200; expected numbers below 3"),
    ],
)
def test_wrong_conditions_are_one_line_and_name_no_file(server: Live, conditions: dict[str, Any], message: str) -> None:
    sent = {name: uploaded(server, layout()) if value == "UPLOAD" else value for name, value in conditions.items()}
    answer = server.client.post("/api/jobs", json={"prompt": "a fox", "conditions": sent})
    assert answer.status_code in (400, 422), answer.text
    assert message in answer.json()["error"]
    assert len(answer.json()["error"].splitlines()) == 1


@pytest.mark.skipif(shutil.which("chromium") is None, reason="no chromium is installed: `apt-get install chromium`")
@pytest.mark.filterwarnings("ignore::ResourceWarning")  # of the driver's pipes
def test_the_page_has_a_field_for_each_condition(server: Live, pipeline: CascadePipeline, tmp_path: Path) -> None:
    from playwright.sync_api import expect, sync_playwright

    layout().save(tmp_path / "layout.png")
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        page = browser.new_page()
        page.goto(server.address)
        expect(page.locator("#draw")).to_be_enabled()
        page.get_by_label("Prompt", exact=True).fill("a fox")
        page.get_by_role("button", name="Draw", exact=True).click()
        expect(page.locator("#toasts")).to_contain_text("Say what shape is: one of")
        page.get_by_label("shape", exact=True).select_option("star")
        page.get_by_label("age", exact=True).fill("3")
        page.get_by_label("style", exact=True).fill("1,2")
        page.get_by_label("layout", exact=True).set_input_files(tmp_path / "layout.png")
        expect(page.locator(".given-picture img").first).to_be_visible()
        page.get_by_text("Advanced").click()
        page.get_by_label("Guidance of single conditions", exact=True).fill("layout=5")
        page.get_by_label("Seed", exact=True).fill("5")
        page.get_by_role("button", name="Draw", exact=True).click()
        expect(page.locator(".tile")).to_have_count(1, timeout=20_000)
        page.get_by_label("style", exact=True).fill("")  # a recipe holds no vector
        page.get_by_label("age", exact=True).fill("none")
        page.get_by_label("Seed", exact=True).fill("6")
        page.get_by_role("button", name="Draw", exact=True).click()
        expect(page.locator(".tile")).to_have_count(2, timeout=20_000)
        browser.close()
    opened, entry = server.client.get("/api/pictures").json()["pictures"]
    found = np.array(Image.open(io.BytesIO(server.gallery.read(entry["id"])[1])))
    given = {"shape": "star", "age": 3, "style": [1, 2], "layout": layout()}
    assert np.array_equal(
        found, np.array(pipeline("a fox", seed=5, conditions=given, guidance_of={"layout": 5.0}).images[0])
    )
    again = server.client.get(f"/api/pictures/{opened['id']}/asked").json()
    assert again["conditions"]["age"] == "none"
