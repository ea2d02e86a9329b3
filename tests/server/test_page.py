"""The page in a real browser: it draws, shows progress, stops, and keeps all pictures; no outside requests."""

from __future__ import annotations

import copy
import io
import json
import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pytest
from helpers_server import Live, live, make_adapter
from PIL import Image
from playwright.sync_api import Browser, Page, expect, sync_playwright

from cascade import CascadePipeline
from cascade.server.jobs import Event
from cascade.server.models import Models

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
pytestmark = [
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium is installed: `apt-get install chromium`"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),  # of the driver's pipes
]
expect.set_options(timeout=20_000)  # a busy machine draws slowly
CARD = """---
widget: [{text: "a fox, noto style"}]
styles: [noto style, <img src=x onerror=alert(1)>]
---
"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as driver:
        # Without its sandbox, because tests may run as root in a container; it sees our own page alone.
        chromium = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture(scope="module")
def studio(pipeline: CascadePipeline, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    folder = tmp_path_factory.mktemp("studio")
    (folder / "README.md").write_text(CARD)
    models = Models(lambda _: pipeline, str(folder))
    with live(lambda: pipeline, folder / "out", models=models) as server:
        yield server


@pytest.fixture
def page(browser: Browser, studio: Live) -> Iterator[Page]:
    """A tab that fails its test for any request to elsewhere, any error, and anything that the policy stopped."""
    context = browser.new_context(viewport={"width": 1600, "height": 950}, accept_downloads=True)
    page = context.new_page()
    elsewhere: list[str] = []
    wrong: list[str] = []
    page.on("request", lambda request: _is_elsewhere(request.url, studio) and elsewhere.append(request.url))
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on(
        "console", lambda message: message.type == "error" and "400" not in message.text and wrong.append(message.text)
    )
    opened(page, studio)
    yield page
    context.close()
    slowed(studio, 0)
    for job in studio.queue.jobs():  # of a test that failed, or stopped looking
        studio.queue.stop(job)
        job.result.result(60)
    assert elsewhere == []
    assert wrong == []


def _is_elsewhere(url: str, studio: Live) -> bool:
    parts = urlsplit(url)
    return parts.scheme not in ("data", "blob") and f"{parts.scheme}://{parts.netloc}" != studio.address


def opened(page: Page, studio: Live) -> None:
    page.goto(studio.address)
    expect(page.locator("#draw")).to_be_enabled()
    expect(page.locator("#pictures")).to_have_attribute("aria-busy", "false")


def draw(page: Page, prompt: str) -> None:
    """Draw a prompt and wait for its picture."""
    before = page.locator(".tile").count()
    page.get_by_label("Prompt", exact=True).fill(prompt)
    page.get_by_role("button", name="Draw", exact=True).click()
    expect(page.locator(".tile")).to_have_count(before + 1)


def slowed(studio: Live, seconds: float) -> None:
    """Steps that take long enough to be looked at."""

    hub = studio.queue.hub
    publish = type(hub).publish.__get__(hub)

    def published(event: Event) -> None:
        publish(event)
        if event.kind == "step":
            time.sleep(seconds)

    hub.publish = published  # type: ignore[method-assign]


def test_a_picture_grows_and_then_stands_on_the_easel_and_in_the_gallery(page: Page, studio: Live) -> None:
    slowed(studio, 0.1)
    page.evaluate(
        """() => {
            window.seen = [];
            new MutationObserver(changes => changes.forEach(({ target }) => window.seen.push(target.src.slice(0, 30))))
              .observe(document.getElementById("now"), { attributes: true, attributeFilter: ["src"], subtree: true });
        }"""
    )
    draw(page, "a fox that grows")
    slowed(studio, 0)
    expect(page.locator(".sheet img")).to_have_attribute("src", re.compile("/api/pictures/.*/file"))
    seen = page.evaluate("() => window.seen")
    assert len(seen) >= 6  # two steps in each of three stages
    assert set(seen) == {"data:image/jpeg;base64,/9j/4AAQ"[:30]}
    expect(page.locator(".caption")).to_contain_text("a fox that grows")


def test_after_a_reload_everything_is_there_again(page: Page, studio: Live) -> None:
    draw(page, "a fox that stays")
    count = page.locator(".tile").count()
    opened(page, studio)
    expect(page.locator(".tile")).to_have_count(count)
    expect(page.locator(".sheet img")).to_have_attribute("alt", "a fox that stays")


def test_stop_ends_a_job_and_leaves_what_is_there(page: Page, studio: Live) -> None:
    slowed(studio, 0.3)
    page.get_by_label("Prompt", exact=True).fill("a fox to be stopped")
    page.locator("#count").fill("9")
    page.get_by_role("button", name="Draw", exact=True).click()
    expect(page.locator(".caption")).to_contain_text(re.compile(r"Picture \d of 9"))
    page.get_by_role("button", name="Stop", exact=True).click()
    expect(page.locator(".caption")).to_contain_text("Stopped")
    slowed(studio, 0)
    assert studio.queue.jobs()[-1].state == "stopped"


@pytest.mark.slow
def test_two_tabs_share_the_queue_and_the_news(page: Page, studio: Live, browser: Browser) -> None:
    other = browser.new_context().new_page()
    opened(other, studio)
    slowed(studio, 0.15)
    for tab, prompt in ((page, "of the first tab"), (other, "of the second tab")):
        tab.get_by_label("Prompt", exact=True).fill(prompt)
        tab.get_by_role("button", name="Draw", exact=True).click()
    expect(page.locator("#queue")).to_contain_text("of the second tab")
    for tab in (page, other):
        expect(tab.locator(".tile").nth(0).locator("img")).to_have_attribute("alt", "of the second tab")
        expect(tab.locator(".tile").nth(1).locator("img")).to_have_attribute("alt", "of the first tab")
    slowed(studio, 0)
    other.context.close()


def test_the_form_says_what_is_drawn(page: Page, studio: Live) -> None:
    page.get_by_label("Prompt", exact=True).fill("a box")
    page.get_by_role("button", name="noto style").click()
    page.get_by_label("16 px", exact=True).check()
    page.get_by_label("Wide").check()
    page.get_by_label("Fast").check()
    page.locator("#seed").fill("77")
    page.get_by_text("Advanced").click()
    page.get_by_label("Not in the picture").fill("red")
    page.locator("#guidance-base").fill("1.5")
    page.locator("#sampler-base").select_option("heun")
    count = page.locator(".tile").count()
    page.keyboard.press("Control+Enter")
    expect(page.locator(".tile")).to_have_count(count + 1)
    asked = studio.queue.jobs()[-1].asked
    assert (asked.prompt, asked.negative_prompt, asked.seed) == ("a box, noto style", "red", 77)
    assert (asked.until, asked.width, asked.height, asked.preset) == (16, 24, 16, "fast")
    assert (asked.guidance, asked.sampler, asked.steps) == ({"base": 1.5}, {"base": "heun"}, None)
    expect(page.locator("#seed")).to_have_value("77")  # a seed that was typed is kept


@pytest.mark.slow
def test_the_form_takes_the_prompt_language_regions_guidance_and_a_sheet(page: Page, studio: Live) -> None:
    page.get_by_label("Prompt", exact=True).fill("a (red:1.3) fox")
    page.get_by_text("Advanced").click()
    page.get_by_label("Read (word:1.3)").check()
    page.get_by_label("Regions, one in each line").fill("0,0,0.5,1: a box\n")
    page.locator("#guidance-base").fill("3")
    page.locator("#guidance_rescale-base").fill("0.5")
    page.locator("#projection-base").fill("0.2")
    page.get_by_label("Columns of a sheet").fill("steps=1,2,3")
    count = page.locator(".tile").count()
    page.keyboard.press("Control+Enter")
    expect(page.locator(".tile")).to_have_count(count + 3)
    jobs = studio.queue.jobs()[-3:]
    assert [job.asked.steps for job in jobs] == [1, 2, 3]
    asked = jobs[0].asked
    assert asked.prompt_language
    assert [(region.box, region.prompt) for region in asked.regions] == [((0, 0, 0.5, 1), "a box")]
    assert (asked.guidance_rescale, asked.projection) == ({"base": 0.5}, {"base": 0.2})
    assert len({job.asked.seed for job in jobs}) == 1
    page.locator(".tile button").first.click()
    page.get_by_role("button", name="Use settings").click()
    expect(page.get_by_label("Regions, one in each line")).to_have_value("0,0,0.5,1: a box")
    expect(page.get_by_label("Read (word:1.3)")).to_be_checked()
    expect(page.locator("#projection-base")).to_have_value("0.2")


@pytest.mark.slow
def test_a_seed_is_open_until_it_is_locked(page: Page, studio: Live) -> None:
    page.locator("#seed-dice").click()
    rolled = page.locator("#seed").input_value()
    draw(page, "a box")
    assert str(studio.queue.jobs()[-1].asked.seed) == rolled
    expect(page.locator("#seed")).to_have_value("")
    page.locator("#seed-lock").click()
    expect(page.locator("#seed")).to_have_value(rolled)  # the one of the picture that one sees
    draw(page, "a box")
    expect(page.locator("#seed")).to_have_value(rolled)


@pytest.mark.slow
def test_settings_come_back_from_the_gallery_and_from_a_dropped_file(page: Page, studio: Live, tmp_path: Path) -> None:
    page.locator("#seed").fill("123")
    page.get_by_label("8 px", exact=True).check()
    draw(page, "a fox to come back")
    page.locator(".tile button").first.click()
    with page.expect_download() as download:
        page.get_by_role("link", name="Download").click()
    download.value.save_as(tmp_path / "fox.png")
    page.keyboard.press("Escape")
    for give in (
        lambda: (page.locator(".tile button").first.click(), page.get_by_role("button", name="Use settings").click()),
        lambda: page.locator("#read-file").set_input_files(tmp_path / "fox.png"),
        lambda: dropped(page, tmp_path / "fox.png"),
    ):
        opened(page, studio)
        give()
        expect(page.get_by_label("Prompt", exact=True)).to_have_value("a fox to come back")
        expect(page.locator("#seed")).to_have_value("123")
        expect(page.get_by_label("8 px", exact=True)).to_be_checked()


def dropped(page: Page, path: Path) -> None:
    """A file dropped on the page, as the system would."""
    page.evaluate(
        """numbers => {
            const data = new DataTransfer();
            data.items.add(new File([new Uint8Array(numbers)], "x.png", { type: "image/png" }));
            document.body.dispatchEvent(new DragEvent("drop", { dataTransfer: data, bubbles: true, cancelable: true }));
        }""",
        list(path.read_bytes()),
    )


@pytest.mark.slow
def test_a_picture_that_is_none_of_ours_is_refused_with_a_reason(page: Page, tmp_path: Path) -> None:
    (tmp_path / "x.png").write_bytes(b"nothing")
    page.locator("#read-file").set_input_files(tmp_path / "x.png")
    expect(page.locator("#toasts")).to_contain_text("not a readable picture")


@pytest.mark.slow
def test_star_search_delete_and_undo(page: Page) -> None:
    draw(page, "an owl to be starred")
    page.locator(".tile").first.hover()
    page.locator(".tile .mark-star").first.click()
    page.locator("#starred").click()
    expect(page.locator(".tile")).to_have_count(1)
    page.locator("#starred").click()
    page.locator("#search").fill("owl starred")
    expect(page.locator(".tile")).to_have_count(1)
    page.locator(".tile button").first.click()
    page.get_by_role("button", name="Delete").click()
    expect(page.locator("#nothing")).to_have_text("Nothing found.")
    page.get_by_role("button", name="Undo").click()
    expect(page.locator(".tile")).to_have_count(1)


@pytest.mark.slow
def test_two_pictures_are_compared_with_a_slider_and_by_keyboard(page: Page) -> None:
    draw(page, "first of two")
    draw(page, "second of two")
    for place in (1, 0):
        page.locator(".tile").nth(place).hover()
        page.locator(".tile .mark-compare").nth(place).click()
    expect(page.locator("#comparison")).to_be_visible()
    expect(page.locator("#first")).to_have_attribute("alt", "first of two")
    page.locator("#split-at").focus()
    page.keyboard.press("End")
    expect(page.locator("#first")).to_have_css("clip-path", "inset(0px 0% 0px 0px)")
    page.keyboard.press("Escape")
    expect(page.locator("#comparison")).to_be_hidden()


@pytest.mark.slow
def test_draw_again_draws_the_same_with_another_seed(page: Page, studio: Live) -> None:
    page.get_by_label("16 px", exact=True).check()
    draw(page, "a fox once more")
    first = studio.queue.jobs()[-1].asked
    count = page.locator(".tile").count()
    page.locator(".tile button").first.click()
    page.get_by_role("button", name="Draw again").click()
    expect(page.locator(".tile")).to_have_count(count + 1)
    second = studio.queue.jobs()[-1].asked
    assert (second.prompt, second.until) == (first.prompt, first.until)
    assert second.seed != first.seed


def test_script_in_prompts_and_style_words_stays_text(page: Page, studio: Live) -> None:
    trap = "<img src=x onerror=trapped=1>"
    draw(page, trap)
    page.locator(".tile button").first.click()
    expect(page.locator("#viewer-prompt")).to_have_text(trap)
    opened(page, studio)
    expect(page.locator(".caption b")).to_have_text(trap)
    assert page.evaluate("() => window.trapped") is None


@pytest.mark.slow
@pytest.mark.parametrize(("width", "scheme"), [(390, "light"), (390, "dark"), (1600, "light"), (1600, "dark")])
def test_axe_finds_no_fault_and_nothing_is_wider_than_the_screen(
    studio: Live, browser: Browser, width: int, scheme: str
) -> None:
    from axe_playwright_python.sync_playwright import Axe

    context = browser.new_context(
        viewport={"width": width, "height": 844},
        color_scheme=scheme,
        reduced_motion="reduce",  # type: ignore[arg-type]
    )
    page = context.new_page()
    opened(page, studio)
    draw(page, "a fox for everyone")
    page.get_by_text("Advanced").click()
    assert page.evaluate("() => document.documentElement.scrollWidth") <= width
    found = Axe().run(page).response["violations"]
    page.locator(".tile button").first.click()
    expect(page.locator("#viewer")).to_be_visible()
    found += Axe().run(page).response["violations"]
    page.get_by_role("button", name="Change", exact=True).click()
    for mode in ("Whole", "Extend", "Enlarge", "Part"):
        page.get_by_label(mode, exact=True).check()
        found += Axe().run(page).response["violations"]
        assert page.evaluate("() => document.documentElement.scrollWidth") <= width
    page.get_by_role("button", name="Paint what is to change").click()
    found += Axe().run(page).response["violations"]
    assert page.evaluate("() => document.getElementById('masking').scrollWidth") <= width
    page.keyboard.press("Escape")
    page.locator(".tile button").first.click()
    page.get_by_role("button", name="Watch it think").click()
    expect(page.locator("#thinking")).to_be_visible()
    found += Axe().run(page).response["violations"]
    assert page.evaluate("() => document.getElementById('thinking').scrollWidth") <= width
    assert [(fault["id"], [node["html"][:200] for node in fault["nodes"]]) for fault in found] == []
    context.close()


def test_the_page_reports_a_stopped_server_and_reconnects(
    browser: Browser, pipeline: CascadePipeline, tmp_path: Path
) -> None:
    page = browser.new_page()
    with live(lambda: pipeline, tmp_path) as server:
        opened(page, server)
    expect(page.locator("#model")).to_have_text("The server does not answer.")
    page.close()


def picture_of(studio: Live, id: str) -> np.ndarray[Any, Any]:
    return np.array(Image.open(io.BytesIO(studio.gallery.read(id)[1])))


def newest(studio: Live) -> dict[str, Any]:
    return studio.client.get("/api/pictures").json()["pictures"][0]


def begun(page: Page, studio: Live, action: str) -> dict[str, Any]:
    """A picture of the gallery that is drawn, opened, and made what the next one starts from."""
    draw(page, "a fox to change")
    first = newest(studio)
    page.locator(".tile button").first.click()
    page.get_by_role("button", name=action, exact=True).click()
    expect(page.locator("#start-said")).to_have_text(f"{first['width']} × {first['height']}")
    return first


def changed(page: Page, studio: Live, button: str = "Draw") -> dict[str, Any]:
    """The picture that the form then asks for."""
    count = page.locator(".tile").count()
    page.get_by_role("button", name=button, exact=True).click()
    expect(page.locator(".tile")).to_have_count(count + 1)
    return newest(studio)


def painted(page: Page) -> None:
    """A mask in the middle of the picture, with the pointer."""
    page.get_by_label("Part", exact=True).check()
    page.get_by_role("button", name="Paint what is to change").click()
    box = page.locator("#mask-canvas").bounding_box()
    assert box is not None
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] / 2 + 20, box["y"] + box["height"] / 2)
    page.mouse.up()


def test_only_the_painted_part_is_redrawn(page: Page, studio: Live) -> None:
    first = begun(page, studio, "Change")
    page.evaluate("() => { document.getElementById('brush').value = 8; }")
    painted(page)
    page.get_by_role("button", name="Done").click()
    expect(page.locator("#mask-said")).to_have_text("Painted; paint more")
    second = changed(page, studio)
    one, other = picture_of(studio, first["id"]), picture_of(studio, second["id"])
    mask = studio.queue.sources.mask(studio.queue.jobs()[-1].asked.mask or "")
    assert 0 < (mask > 0).mean() < 0.7
    assert np.array_equal(one[mask == 0], other[mask == 0])
    assert not np.array_equal(one[mask > 0], other[mask > 0])


@pytest.mark.slow
def test_a_mask_is_painted_by_keyboard_and_undone(page: Page, studio: Live) -> None:
    begun(page, studio, "Change")
    page.get_by_label("Part", exact=True).check()
    page.get_by_role("button", name="Paint what is to change").press("Enter")
    canvas = page.locator("#mask-canvas")
    canvas.focus()

    def share() -> float:
        return float(
            canvas.evaluate(
                """canvas => {
                    const { data } = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
                    return data.filter((value, at) => at % 4 === 3 && value > 0).length / (data.length / 4);
                }"""
            )
        )

    for _ in range(12):
        page.keyboard.press("[")
    page.keyboard.press("Space")
    dot = share()
    assert 0 < dot < 0.5
    page.keyboard.press("Control+z")
    assert share() == 0
    page.keyboard.press("ArrowLeft")
    page.keyboard.down("Space")
    for _ in range(10):
        page.keyboard.press("ArrowRight")
    page.keyboard.up("Space")
    line = share()
    assert line > dot
    page.keyboard.press("ArrowUp")
    assert share() == line
    page.locator("#mask-invert").click()
    assert share() > 0.2
    page.keyboard.press("Escape")
    expect(page.locator("#mask-said")).to_have_text("Paint what is to change")


@pytest.mark.slow
def test_a_picture_is_changed_extended_enlarged_and_varied(page: Page, studio: Live, pipeline: CascadePipeline) -> None:
    first = begun(page, studio, "Change")
    page.locator("#strength").fill("0.5")
    page.locator("#seed").fill("4")
    again = changed(page, studio)
    start = Image.open(io.BytesIO(studio.gallery.read(first["id"])[1]))
    expected = pipeline("a fox to change", seed=4, image=start, strength=0.5).images[0]
    assert np.array_equal(picture_of(studio, again["id"]), np.array(expected))

    page.get_by_label("Extend", exact=True).check()
    page.locator("#side-left").fill("16")
    wide = changed(page, studio, "Extend")
    assert (wide["height"], wide["width"]) == (32, 48)
    assert np.array_equal(picture_of(studio, wide["id"])[:, 16:], np.array(start))

    page.get_by_label("Enlarge", exact=True).check()
    page.locator("#to").fill("40")
    assert changed(page, studio, "Enlarge")["width"] == 40

    count = page.locator(".tile").count()
    page.locator(".tile").last.locator("button").first.click()
    page.get_by_role("button", name="Variations", exact=True).click()
    expect(page.locator(".tile")).to_have_count(count + 4)


@pytest.mark.slow
def test_the_settings_of_a_changed_picture_bring_its_picture_and_mask_back(page: Page, studio: Live) -> None:
    begun(page, studio, "Change")
    painted(page)
    page.get_by_role("button", name="Done").click()
    expect(page.locator("#mask-said")).to_have_text("Painted; paint more")  # the mask has reached the server
    page.locator("#resampling").fill("2")
    first = changed(page, studio)
    opened(page, studio)
    page.locator(".tile button").first.click()
    page.get_by_role("button", name="Use settings").click()
    expect(page.locator("#mask-said")).to_have_text("Painted; paint more")
    expect(page.locator("#resampling")).to_have_value("2")
    second = changed(page, studio)
    assert np.array_equal(picture_of(studio, first["id"]), picture_of(studio, second["id"]))


@pytest.mark.slow
def test_a_dropped_picture_without_settings_becomes_the_start(page: Page, tmp_path: Path) -> None:
    Image.new("RGB", (40, 24), "red").save(tmp_path / "x.png")
    dropped(page, tmp_path / "x.png")
    expect(page.locator("#start-said")).to_have_text("40 × 24")
    page.get_by_role("button", name="No picture to start from").click()
    expect(page.locator("#start-choose")).to_be_focused()


def test_a_picture_is_watched_step_by_step(page: Page) -> None:
    page.get_by_label("16 px", exact=True).check()
    draw(page, "a red fox, seen")
    page.locator(".tile button").first.click()
    page.get_by_role("button", name="Watch it think").click()
    expect(page.locator("#thinking")).to_be_visible()
    expect(page.locator("#thinking-word option:checked")).to_have_text("fox")
    expect(page.locator("#thinking figure")).to_have_count(5)
    expect(page.locator("#thinking-said")).to_contain_text("Step 1 of 2")
    first = page.locator("#thinking figure img").nth(1).get_attribute("src")
    page.locator("#thinking-step").press("ArrowRight")
    expect(page.locator("#thinking-said")).to_contain_text("Step 2 of 2")
    assert page.locator("#thinking figure img").nth(1).get_attribute("src") != first
    page.get_by_label("sr16 16 px").check()
    expect(page.locator("#thinking figure img").nth(2)).to_have_js_property("naturalWidth", 16)
    page.get_by_role("button", name="Play").click()
    expect(page.locator("#thinking-said")).to_contain_text("Step 2 of 2")
    page.keyboard.press("Escape")
    expect(page.locator("#thinking")).to_be_hidden()


def test_a_training_run_is_followed_and_its_grids_turned(
    browser: Browser, pipeline: CascadePipeline, tmp_path: Path
) -> None:
    run = tmp_path / "runs" / "fox"
    (run / "samples").mkdir(parents=True)
    (run / "config.yaml").write_text("{stage: {name: base}, training: {steps: 100, batch_size: 16, log_every: 10}}")
    log = run / "log.jsonl"
    log.write_text('{"step": 10, "loss": 0.5, "images_per_second": 4.0}\n')
    for step in (10, 20):
        Image.new("RGB", (8, 8), "red").save(run / "samples" / f"step-{step:08d}.png")
    with live(lambda: pipeline, tmp_path / "out", runs=tmp_path / "runs") as server:
        page = browser.new_page()
        opened(page, server)
        page.get_by_role("link", name="Training").click()
        expect(page.locator("#run-said")).to_have_text("Training, step 10 of 100 · 6 min left · loss 0.500")
        with log.open("a") as file:
            file.write('{"step": 20, "loss": 0.25, "images_per_second": 4.0}\n')
        expect(page.locator("#run-said")).to_contain_text("step 20 of 100")  # without a click
        expect(page.locator("#run-curves figure")).to_have_count(2)
        expect(page.get_by_role("img", name="loss: 0.5 at step 10, 0.25 at step 20")).to_be_visible()
        expect(page.locator("#run-grid")).to_have_attribute("alt", "Sample pictures after step 20")
        page.locator("#run-grid-at").press("ArrowLeft")
        expect(page.locator("#run-grid")).to_have_attribute("alt", "Sample pictures after step 10")
        page.get_by_role("link", name="Draw", exact=True).click()
        expect(page.locator("#prompt")).to_be_visible()
        page.close()


@pytest.mark.slow
@pytest.mark.parametrize(("width", "scheme"), [(390, "dark"), (1600, "light")])
def test_axe_finds_no_fault_in_the_training_tab(
    browser: Browser, pipeline: CascadePipeline, tmp_path: Path, width: int, scheme: Any
) -> None:
    from axe_playwright_python.sync_playwright import Axe

    run = tmp_path / "runs" / "fox"
    run.mkdir(parents=True)
    entries = [{"step": step, "loss": 50.0 if step == 20 else 1.0} for step in range(1, 21)]
    (run / "log.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    with live(lambda: pipeline, tmp_path / "out", runs=tmp_path / "runs") as server:
        page = browser.new_context(viewport={"width": width, "height": 844}, color_scheme=scheme).new_page()
        page.goto(f"{server.address}#training")
        expect(page.locator("#run-warnings")).to_contain_text("Step 20: the loss is 50")
        found = Axe().run(page).response["violations"]
        assert page.evaluate("() => document.documentElement.scrollWidth") <= width
        assert [(fault["id"], [node["html"][:200] for node in fault["nodes"]]) for fault in found] == []
        page.context.close()


@pytest.mark.slow
def test_another_model_is_chosen_on_the_page(browser: Browser, pipeline: CascadePipeline, tmp_path: Path) -> None:
    other = copy.copy(pipeline)
    other.name = "other"
    (tmp_path / "models" / "other").mkdir(parents=True)
    (tmp_path / "models" / "other" / "cascade.json").write_text("{}")
    (tmp_path / "first").mkdir()
    models = Models(
        lambda place: other if place and place.endswith("other") else pipeline,
        str(tmp_path / "first"),
        tmp_path / "models",
    )
    with live(models.choose(models.current), tmp_path / "out", models=models) as server:
        page = browser.new_page()
        opened(page, server)
        expect(page.locator("#model")).to_contain_text("tiny")
        page.get_by_label("Model", exact=True).select_option("other")
        expect(page.locator("#model")).to_contain_text("other")
        draw(page, "a fox of the other one")
        assert newest(server)["model"] == "other"
        page.close()


def test_adapters_have_sliders_and_settings_bring_their_scales_back(
    browser: Browser, model: Path, pipeline: CascadePipeline, tmp_path: Path
) -> None:
    make_adapter(tmp_path / "loras" / "mascot", model)
    models = Models(lambda _: pipeline, str(model), adapters=tmp_path / "loras")
    with live(models.choose(models.current), tmp_path / "out", models=models) as server:
        page = browser.new_page(viewport={"width": 390, "height": 900})
        opened(page, server)
        draw(page, "a fox")
        plain = newest(server)
        page.get_by_text("Advanced", exact=True).click()
        slider = page.get_by_label("mascot")
        expect(slider).to_have_attribute("min", "-2")
        slider.fill("0.8")
        expect(page.locator("#loras output")).to_have_text("× 0.8")
        page.locator("#seed").fill(str(plain["seed"]))
        draw(page, "a fox")
        picture = newest(server)
        assert server.queue.jobs()[-1].asked.adapters == {"mascot": 0.8}
        assert server.gallery.read(picture["id"])[1] != server.gallery.read(plain["id"])[1]
        slider.fill("-2")
        page.locator(".tile button").first.click()
        page.get_by_role("button", name="Use settings").click()
        expect(slider).to_have_value("0.8")
        page.get_by_role("button", name="Reset", exact=True).click()
        expect(slider).to_have_value("0")
        page.close()
