"""Sets of prompts: every choice once and in order; frames between two prompts begin and end with these."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers_model import make_tiny_cascade
from PIL import Image

from cascade import CascadeError
from cascade.cli.program import main
from cascade.diffusion.noise import NoiseBetween, noise_like
from cascade.prompts.reading import prompts_of_set, way_between
from cascade.seeds import generator
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


@pytest.mark.parametrize("options", [["--sampler", "ddim"], ["--sampler", "ddpm", "--aug-level", "0.3"]])
def test_between_two_seeds_the_ends_are_the_single_pictures_bit_for_bit(tmp_path: Path, options: list[str]) -> None:
    """Also with noise in every step and on the smaller pictures, which leads from one seed to the other too."""
    model = make_tiny_cascade(tmp_path / "tiny")
    usual = ["generate", "a fox", "--model", str(model), "--device", "cpu", *options]
    travel = [*usual, "--seed", "5", "--travel-seed", "9", "--frames", "5", "--out", str(tmp_path / "way")]
    assert main(travel) == 0
    for seed in ("5", "9"):
        assert main([*usual, "--seed", seed, "--out", str(tmp_path / seed)]) == 0
    way, first, last = (
        [np.asarray(Image.open(path)).astype(float) for path in sorted((tmp_path / name).glob("*.png"))]
        for name in ("way", "5", "9")
    )
    assert len(way) == 5
    assert np.array_equal(way[0], first[0])
    assert np.array_equal(way[-1], last[0])
    distances = [float(np.abs(frame - way[0]).mean()) for frame in way]
    assert distances == sorted(distances)  # monotone, as the shares are
    steps = [float(np.abs(one - other).mean()) for one, other in pairwise(way)]
    assert max(steps) < 0.9 * distances[-1]  # no frame is the whole way, with a network that magnifies each change
    with Image.open(tmp_path / "way" / "travel.webp") as animation:
        assert animation.n_frames == 8
    again = ["--from-image", str(tmp_path / "way" / "000002-a-fox.png"), "--out", str(tmp_path / "again")]
    assert main(["generate", "--model", str(model), *again]) == 0


def test_noise_between_two_seeds_is_normal_and_the_ends_are_theirs() -> None:
    z = torch.empty(1, 3, 64, 64)
    own = [noise_like(z, [generator(seed)]) for seed in (1, 2)]
    for share, angle in ((0.0, 0.0), (0.5, math.pi / 4), (1.0, math.pi / 2)):
        between = noise_like(z, [NoiseBetween(generator(1), generator(2), share)])
        torch.testing.assert_close(between, math.cos(angle) * own[0] + math.sin(angle) * own[1])
        assert between.std().item() == pytest.approx(1, abs=4 / (2 * z.numel()) ** 0.5)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["a", "b", "--travel-seed", "3"], "--travel-seed: leads from one picture to another; give one prompt"),
        (["a", "--travel-seed", "3", "--shard", "1/2"], "leave out --shard"),
    ],
)
def test_a_way_without_two_ends_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], more: list[str], message: str
) -> None:
    assert main(["generate", *more, "--seed", "1", "--out", str(tmp_path / "out")]) == 2
    assert message in capsys.readouterr().err


def test_a_set_on_the_command_line_is_one_run(tmp_path: Path) -> None:
    model = make_tiny_cascade(tmp_path / "tiny")
    command = ["generate", "--model", str(model), "--device", "cpu", "--prompt-sets", "{red|blue} fox", "--seed", "5"]
    assert main([*command, "--out", str(tmp_path / "out")]) == 0
    names = sorted(path.name for path in (tmp_path / "out").glob("*.png"))
    assert names == ["000000-red-fox.png", "000001-blue-fox.png"]
