"""A report is consistent in its three formats, and equal in bytes when repeated."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from cascade.evaluation.report import Figure, Report, prompt_seeds, share, write_report

RUN = {
    "model": {"name": "tiny", "sha256": "0123456789abcdef"},
    "versions": {"cascade": "0.1.0"},
    "seed": 3,
    "settings": {"limit": 2},
}


def report() -> Report:
    figures = [*share("colour", [True, False, True, True], reference=1.0), Figure("distance", 0.12, "", "lower", 4)]
    pictures = [(Image.new("RGB", (8, 8), colour), colour) for colour in ("red", "blue")]
    return Report("scenes", figures, pictures, settings={"prompts": 2}, notes=["A note."])


def test_a_report_writes_its_figures_as_json_and_as_a_table(tmp_path: Path):
    write_report(report(), RUN, tmp_path)
    data = json.loads((tmp_path / "report.json").read_text())
    assert data["suite"] == "scenes"
    assert data["seed"] == 3
    assert data["settings"] == {"limit": 2, "prompts": 2}
    assert data["figures"][0] == {
        "name": "colour",
        "value": 0.75,
        "unit": "share",
        "better": "higher",
        "count": 4,
        "reference": 1.0,
    }
    table = (tmp_path / "report.md").read_text()
    assert "| colour | 0.750 | 1.000 | share | higher | 4 |" in table
    assert "| distance | 0.12 |  |  | lower | 4 |" in table
    assert table.endswith("\nA note.\n")
    with Image.open(tmp_path / "contact.png") as sheet:
        assert sheet.getpixel((96, 96)) == (255, 0, 0)


def test_the_same_report_has_the_same_bytes(tmp_path: Path):
    for name in ("once", "twice"):
        write_report(report(), RUN, tmp_path / name)
    for name in ("report.json", "report.md", "contact.png"):
        assert (tmp_path / "once" / name).read_bytes() == (tmp_path / "twice" / name).read_bytes()


def test_a_share_of_nothing_is_no_figure():
    assert share("nothing", []) == []


def test_a_figure_is_a_finite_number():
    with pytest.raises(AssertionError):
        Figure("distance", float("nan"), "", "lower", 1)


def test_the_seed_of_a_prompt_depends_on_no_other_prompt():
    first, again = prompt_seeds(["a", "a"], 0)
    assert first != again
    assert prompt_seeds(["b", "a", "c", "a"], 0)[1::2] == [first, again]
    assert prompt_seeds(["a"], 1) != [first]
