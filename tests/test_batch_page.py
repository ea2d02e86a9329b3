"""The page of a run, in a real browser: pictures with prompts, searchable, usable for ten thousand."""

from __future__ import annotations

import functools
import http.server
import json
import os
import re
import shutil
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from cascade.batch.reports import write_page

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
MANY = 10_000


def entry(number: int, prompt: str, file: str | None = None, **changes: Any) -> dict[str, Any]:
    size = {"height": 8, "width": 8}
    known = {"file": file or f"{number:06d}.png", "prompt": prompt, "id": f"{number:06d}", "seed": number}
    return {**known, "settings": size, **changes}


def listed(page: Path) -> list[list[Any]]:
    """The pictures as the page's script has them."""
    text = page.read_text(encoding="utf-8")
    return json.loads("[" + text.partition("const pictures = [")[2].partition("\n];")[0] + "]")


def test_the_page_has_every_picture_and_needs_nothing_else(tmp_path: Path) -> None:
    prompts = ["</script><b>", "a fox & \"two\" 'stars'", "ключ 🦊"]
    entries = [entry(number, prompt) for number, prompt in enumerate(prompts)]
    entries[2] |= {"file": "0001/a #1?.png", "seed": 2**63 - 1}
    write_page(entries, tmp_path / "index.html", "PICTURES of <TITLE>")
    assert [row[:4] for row in listed(tmp_path / "index.html")] == [
        ["000000.png", prompts[0], "000000", "0"],
        ["000001.png", prompts[1], "000001", "1"],
        ["0001/a%20%231%3F.png", prompts[2], "000002", str(2**63 - 1)],  # as text: JavaScript would round it
    ]
    page = (tmp_path / "index.html").read_text(encoding="utf-8")
    assert page.count("</script>") == 1
    assert "<title>PICTURES of &lt;TITLE></title>" in page
    assert "://" not in page


# --- in a browser ------------------------------------------------------------------------------------------


@contextmanager
def served(folder: Path) -> Iterator[tuple[str, list[str]]]:
    """(address of a folder, the paths that were asked for)."""
    asked: list[str] = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_request(self, *_status: Any) -> None:
            asked.append(self.path)

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=str(folder)))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", asked
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def shown(address: str, folder: Path) -> str:
    """The document as a browser has it, once its scripts ran."""
    assert CHROMIUM is not None
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--window-size=1200,900", f"--user-data-dir={folder}"]
    command = [CHROMIUM, *options, "--virtual-time-budget=5000", "--dump-dom", address]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")
def test_a_browser_shows_ten_thousand_pictures_and_loads_those_that_are_seen(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    Image.new("RGB", (8, 8), "red").save(out / "one.png")
    for number in range(MANY):
        os.link(out / "one.png", out / f"{number:06d}.png")
    animals = ("fox", "wolf", "hare", "owl")
    write_page(
        (entry(number, f"a {animals[number % 4]} in picture {number}") for number in range(MANY)),
        out / "index.html",
        "out",
    )
    with served(out) as (address, asked):
        page = shown(f"{address}/index.html", tmp_path / "profile")
        assert "<span>10,000 pictures</span>" in page
        assert len(re.findall("<figure", page)) == MANY
        pictures = {path for path in asked if path.endswith(".png")}
        assert {f"/{number:06d}.png" for number in range(4)} <= pictures
        assert len(pictures) < 200
        found = shown(f"{address}/index.html#q=wolf+picture+77", tmp_path / "profile")
        expected = [number for number in range(MANY) if number % 4 == 1 and "77" in str(number)]
        assert f"<span>{len(expected)} of 10,000</span>" in found
        assert [int(number) for number in re.findall(r'<figure id="(\d+)"', found)] == expected
