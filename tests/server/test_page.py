"""The page in a real browser: it draws, shows the picture growing, stops, and keeps everything; nothing leaves here."""

from __future__ import annotations

import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from helpers_server import Live, live
from playwright.sync_api import Browser, Page, expect, sync_playwright

from cascade import CascadePipeline
from cascade.server.events import Event

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
    with live(lambda: pipeline, folder / "out", card=folder) as server:
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
    assert [(fault["id"], [node["html"][:200] for node in fault["nodes"]]) for fault in found] == []
    context.close()


def test_a_server_that_ends_is_told_and_one_that_comes_back_is_found(
    browser: Browser, pipeline: CascadePipeline, tmp_path: Path
) -> None:
    page = browser.new_page()
    with live(lambda: pipeline, tmp_path) as server:
        opened(page, server)
    expect(page.locator("#model")).to_have_text("The server does not answer.")
    page.close()
