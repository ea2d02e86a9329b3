"""Sets of prompts: every choice once and in order; frames between two prompts begin and end with these."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from helpers_model import make_tiny_cascade
from PIL import Image

from cascade import CascadeError
from cascade.cli.program import main
from cascade.prompts.sets import prompts_of_set, way_between
from cascade.text.language import read_prompt


@pytest.mark.parametrize(
    ("text", "prompts"),
    [
        ("a car", ["a car"]),
        ("{red|green} car", ["red car", "green car"]),
        ("{a|b} {c|d}", ["a c", "a d", "b c", "b d"]),
        (r"\{a\|b\} {c|}", ["{a|b} c", "{a|b} "]),
        ("__one__ __two words__", ["x 1", "x 2"]),
    ],
)
def test_every_choice_is_one_prompt_and_the_last_changes_fastest(text: str, prompts: list[str], tmp_path: Path) -> None:
    (tmp_path / "one.txt").write_text("# comment\nx\n\n")
    (tmp_path / "two words.txt").write_text("1\n2\n")
    assert list(prompts_of_set(text, tmp_path)) == prompts


@pytest.mark.parametrize("text", ["{a|b", "a}", "__none__", "{a|b}" * 17])
def test_a_wrong_set_is_one_line(text: str, tmp_path: Path) -> None:
    with pytest.raises(CascadeError) as caught:
        prompts_of_set(text, tmp_path)
    assert "\n" not in str(caught.value)


def test_the_way_between_prompts_has_weights_that_add_up_to_one() -> None:
    frames = way_between("a (big) fox", "this AND that", 5)
    read = [read_prompt(frame)[0].portions for frame in frames]
    assert [[one.text for one in portions] for portions in (read[0], read[-1])] == [["a (big) fox"], ["this AND that"]]
    assert [[one.weight for one in portions] for portions in read] == [[1], [0.75, 0.25], [0.5, 0.5], [0.25, 0.75], [1]]


def test_the_ends_of_a_travel_are_the_single_pictures_bit_for_bit(tmp_path: Path) -> None:
    model = make_tiny_cascade(tmp_path / "tiny")
    usual = ["--model", str(model), "--device", "cpu", "--seed", "5"]
    travel = ["generate", *usual, "--travel", "a fox", "a box: 1", "--frames", "4", "--out", str(tmp_path / "way")]
    assert main(travel) == 0
    assert main(["generate", *usual, "a fox", "a box: 1", "--out", str(tmp_path / "single")]) == 0
    way, single = (
        [np.asarray(Image.open(path)) for path in sorted((tmp_path / name).glob("*.png"))] for name in ("way", "single")
    )
    assert len(way) == 4
    assert np.array_equal(way[0], single[0])
    assert np.array_equal(way[-1], single[1])
    distances = [float(np.abs(frame.astype(float) - way[0]).mean()) for frame in way]
    assert 0 < distances[1] < distances[-1]
    with Image.open(tmp_path / "way" / "travel.webp") as animation:
        assert animation.n_frames == 6  # there and back, the ends once
        assert np.array_equal(np.asarray(animation.convert("RGB")), way[0])
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "way").glob("0*.png")}
    assert main(travel) == 0  # nothing is drawn twice
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_a_set_on_the_command_line_is_one_run(tmp_path: Path) -> None:
    model = make_tiny_cascade(tmp_path / "tiny")
    command = ["generate", "--model", str(model), "--device", "cpu", "--prompt-sets", "{red|blue} fox", "--seed", "5"]
    assert main([*command, "--out", str(tmp_path / "out")]) == 0
    names = sorted(path.name for path in (tmp_path / "out").glob("*.png"))
    assert names == ["000000-red-fox.png", "000001-blue-fox.png"]
