"""Editing pictures: kept pixels keep all bits, and the rest follows the strength."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers_model import make_tiny_cascade
from measure_seams import hole_of, measured, seam
from PIL import Image

from cascade import CascadeError, CascadePipeline
from cascade.cli.program import main
from cascade.drawing import changes
from cascade.drawing.edit import Box, Edit, edit_of, extended

NOISE = np.random.default_rng(0)


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> CascadePipeline:
    return CascadePipeline.from_pretrained(make_tiny_cascade(tmp_path_factory.mktemp("m") / "tiny"), device="cpu")


def picture(height: int = 32, width: int = 32) -> np.ndarray[Any, Any]:
    return NOISE.integers(0, 256, (height, width, 3), dtype=np.uint8)


def mask(height: int, width: int, box: Box) -> np.ndarray[Any, Any]:
    white = np.zeros((height, width), dtype=np.uint8)
    white[box.top : box.top + box.height, box.left : box.left + box.width] = 255
    return white


def drawn(pipeline: CascadePipeline, **arguments: Any) -> np.ndarray[Any, Any]:
    (image,) = pipeline("a fox", seed=3, output_type="np", **arguments).images
    return np.asarray(image)


def distance(a: np.ndarray[Any, Any], b: np.ndarray[Any, Any]) -> float:
    return float(np.abs(a.astype(float) - b.astype(float)).mean())


# --- image to image ----------------------------------------------------------------------------------------------


def test_strength_zero_gives_the_picture_back_and_one_ignores_it(pipeline: CascadePipeline) -> None:
    given = picture()
    assert np.array_equal(drawn(pipeline, image=given, strength=0.0), given)
    assert np.array_equal(drawn(pipeline, image=given, strength=1.0), drawn(pipeline))


@pytest.mark.slow
def test_the_distance_from_the_picture_grows_with_the_strength() -> None:
    """Of the bundled base stage; for data whose best denoiser is known, see tests/diffusion/test_known_pixels.py."""
    bundled = CascadePipeline.from_pretrained(device="cpu")
    given = np.full((64, 64, 3), 255, dtype=np.uint8)
    given[16:48, 16:48] = (200, 40, 40)
    arguments = {"until": 64, "steps": 12, "image": given}
    distances = [distance(drawn(bundled, strength=strength, **arguments), given) for strength in (0.1, 0.4, 0.7, 0.9)]
    assert distances == sorted(distances)
    assert distances[-1] > 3 * distances[0]


def test_each_stage_may_have_its_own_strength(pipeline: CascadePipeline) -> None:
    """The base stage draws anew, the last one gives the picture back."""
    given = picture()
    assert np.array_equal(drawn(pipeline, image=given, strength={"sr32": 0.0}), given)


def test_the_shape_of_what_is_drawn_is_that_of_the_picture(pipeline: CascadePipeline) -> None:
    assert drawn(pipeline, image=picture(40, 80), strength=0.5).shape == (16, 32, 3)
    assert drawn(pipeline, image=picture(40, 80), strength=0.5, height=32, width=32).shape == (32, 32, 3)


# --- masks ---------------------------------------------------------------------------------------------------------

HOLE = Box(10, 12, 9, 7)


def test_outside_the_mask_every_bit_stays_and_inside_it_changes(pipeline: CascadePipeline) -> None:
    given = picture()
    white = mask(32, 32, HOLE)
    for more in ({}, {"resampling": 3}, {"strength": 0.7}, {"sampler": "ddpm"}, {"known": "clean"}):
        changed = drawn(pipeline, image=given, mask=white, **more)
        assert np.array_equal(changed[white == 0], given[white == 0])
        assert distance(changed[white > 0], given[white > 0]) > 10


def test_a_network_that_sees_kept_pixels_clean_draws_another_picture_from_the_same_noise(
    pipeline: CascadePipeline,
) -> None:
    given, white = picture(), mask(32, 32, HOLE)
    ways = [drawn(pipeline, image=given, mask=white, known=known) for known in ("noised", "clean")]
    assert np.array_equal(drawn(pipeline, image=given, mask=white), ways[0])
    assert 0 < distance(*ways) < distance(ways[1], picture())


@pytest.mark.parametrize("size", [(32, 32), (100, 90), (33, 70), (500, 40)])
def test_pictures_of_any_size_keep_what_is_not_masked(pipeline: CascadePipeline, size: tuple[int, int]) -> None:
    given, white = picture(*size), mask(*size, HOLE)
    changed = drawn(pipeline, image=given, mask=white)
    assert changed.shape == given.shape
    assert np.array_equal(changed[white == 0], given[white == 0])
    assert not np.array_equal(changed[white > 0], given[white > 0])


def test_only_the_neighbourhood_of_a_small_mask_is_drawn() -> None:
    image, hole = torch.zeros(3, 500, 400, dtype=torch.uint8), torch.zeros(500, 400)
    hole[300:310, 390:400] = 1
    edit, size = edit_of(image, hole, [(32, 32)])
    assert (edit.box, size) == (Box(289, 368, 32, 32), (32, 32)), "it ends where the picture does"
    hole[200:310, 300:400] = 1
    assert edit_of(image, hole, [(32, 32)])[0].box == Box(172, 235, 165, 165), "as large as the mask needs"
    hole[:] = 1
    assert edit_of(image, hole, [(32, 32), (40, 32)])[0].box == Box(0, 0, 500, 400)


def test_a_soft_mask_blends() -> None:
    edit = Edit(torch.zeros(3, 2, 2, dtype=torch.uint8), torch.tensor([[0.0, 0.5], [1.0, 0.0]]), Box(0, 0, 2, 2))
    new = torch.full((3, 2, 2), 200, dtype=torch.uint8)
    assert edit.finished(new)[0].tolist() == [[0, 100], [200, 0]]


def test_a_picture_and_a_mask_may_be_files(pipeline: CascadePipeline, tmp_path: Path) -> None:
    given, white = picture(), mask(32, 32, HOLE)
    Image.fromarray(given).save(tmp_path / "picture.png")
    Image.fromarray(white).save(tmp_path / "mask.png")
    by_file = drawn(pipeline, image=tmp_path / "picture.png", mask=tmp_path / "mask.png")
    assert np.array_equal(by_file, drawn(pipeline, image=given, mask=white > 0))


def test_a_larger_canvas_keeps_the_picture_and_draws_the_rest(pipeline: CascadePipeline) -> None:
    given = picture(16, 32)
    canvas, white = extended(torch.from_numpy(given).permute(2, 0, 1), top=16)
    changed = drawn(pipeline, image=canvas.permute(1, 2, 0).numpy(), mask=(white.numpy() * 255).astype(np.uint8))
    assert changed.shape == (32, 32, 3)
    assert np.array_equal(changed[16:], given)


def test_the_edge_of_the_mask_is_no_seam(pipeline: CascadePipeline) -> None:
    """A flat picture whose hole the exact denoiser would fill flat: the tiny one's steps at the edge are no larger than
    within what it drew."""
    given, white = np.full((32, 32, 3), 128, dtype=np.uint8), mask(32, 32, Box(8, 8, 16, 16))
    changed = drawn(pipeline, image=given, mask=white, resampling=2).astype(float)
    across = np.abs(np.diff(changed, axis=1))
    edge, inside = across[8:24, [7, 23]].mean(), across[8:24, 8:23].mean()
    assert edge < 3 * inside + 20


def test_the_measure_of_a_seam_is_one_for_an_edge_like_its_neighbours_and_large_for_a_paste() -> None:
    hole = hole_of(32)
    ramp = np.repeat(np.arange(32, dtype=np.uint8)[None, :, None], 32, axis=0).repeat(3, axis=2)
    both = ramp + ramp.swapaxes(0, 1)
    assert seam([both], hole) == pytest.approx(1)
    pasted = np.where(hole[..., None], both + 60, both).astype(np.uint8)
    assert 10 < seam([pasted], hole) < 61  # a step of about 60 among steps of 1, and of the paste's own corners


@pytest.mark.slow
def test_the_bundled_cascade_draws_into_a_hole_without_the_seam_of_a_paste() -> None:
    """The figures of docs/editing.md, with half of its pictures."""
    found = measured(CascadePipeline.from_pretrained(device="cpu"), 4)
    assert 0.8 < found["untouched"] < 1.2
    assert found["4 rounds of resampling"] < 1.7
    assert found["4 rounds of resampling"] < 0.75 * found["pasted"]
    assert max(found["one round"], found["known pixels clean"]) < found["pasted"]


# --- variations ----------------------------------------------------------------------------------------------------


def test_a_variation_leads_from_one_seed_to_the_other(pipeline: CascadePipeline) -> None:
    """In the noise that stages start from; DDIM adds none on the way, but the smaller picture gets some of its own."""
    own, other = drawn(pipeline, until=8), np.asarray(pipeline("a fox", seed=9, until=8, output_type="np").images[0])
    assert np.array_equal(drawn(pipeline, until=8, variation=(9, 0.0)), own)
    assert distance(drawn(pipeline, until=8, variation=(9, 1.0)), other) < 0.1
    steps = [distance(drawn(pipeline, until=8, variation=(9, share)), own) for share in (0.1, 0.3, 0.6, 1.0)]
    assert steps == sorted(steps)


# --- what is refused -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"mask": "m.png"}, "mask: there is no picture to change; give one as image"),
        ({"strength": 0.5}, "strength: there is no picture to change"),
        ({"image": picture(), "strength": 1.5}, "strength: 1.5; expected 0"),
        ({"image": picture(), "strength": {"bse": 0.5}}, "strength: no stage is called 'bse'; .* did you mean base"),
        ({"image": picture(), "mask": np.zeros((32, 32), np.uint8)}, "mask: is black everywhere"),
        ({"image": picture(), "mask": np.ones((16, 32), bool)}, "mask: 32x16; expected 32x32"),
        ({"image": picture(), "mask": np.ones((32, 32), np.float32)}, r"mask: an array float32 of shape \(32, 32\)"),
        ({"known": "clean"}, "known: there is no picture to change"),
        ({"image": picture(), "known": "clean"}, "known: is for the pixels outside a mask; give a mask, or extend"),
        (
            {"image": picture(), "mask": np.ones((32, 32), bool), "known": "clear"},
            "known: 'clear'; expected one of noi",
        ),
        ({"image": picture(), "resampling": 0}, "resampling: 0; expected at least 1"),
        ({"image": "none.png"}, "none.png: no such file"),
        ({"variation": (3, 1.5)}, r"variation: \(3, 1.5\); expected a seed, and a share"),
    ],
)
def test_changes_that_make_no_sense_are_refused(
    pipeline: CascadePipeline, arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(CascadeError, match=message):
        pipeline("a fox", **arguments)


# --- the command -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_cascade(tmp_path_factory.mktemp("m") / "tiny")


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """A folder with picture.png and mask.png."""
    Image.fromarray(picture()).save(tmp_path / "picture.png")
    Image.fromarray(mask(32, 32, HOLE)).save(tmp_path / "mask.png")
    return tmp_path


def generate(model: Path, folder: Path, *arguments: object) -> tuple[int, dict[str, Any]]:
    """(status, the last line of the manifest) of a run in `folder`/out."""
    call = ["generate", *arguments, "--model", model, "--out", folder / "out", "--device", "cpu"]
    status = main(list(map(str, call)))
    lines = (folder / "out/manifest.jsonl").read_text().splitlines()
    return status, json.loads(lines[-1])


def pixels_of(path: Path) -> np.ndarray[Any, Any]:
    return np.asarray(Image.open(path))


def test_the_command_changes_a_picture_and_says_from_what(model: Path, files: Path) -> None:
    call = ["a fox", "--seed", 3, "--image", files / "picture.png", "--mask", files / "mask.png", "--known", "clean"]
    status, line = generate(model, files, *call)
    assert status == 0
    assert len(line["image"]) == len(line["mask"]) == 64
    assert line["known"] == "clean"
    given, white = pixels_of(files / "picture.png"), pixels_of(files / "mask.png")
    changed = pixels_of(files / "out" / line["file"])
    assert np.array_equal(changed[white == 0], given[white == 0])
    again = ["generate", "--from-image", files / "out" / line["file"], "--model", model, "--out", files / "again"]
    assert main(list(map(str, again))) == 2, "the picture is not in the picture"
    assert main(list(map(str, [*again, "--image", files / "picture.png", "--mask", files / "mask.png"]))) == 0
    assert (files / "again" / line["file"]).read_bytes() == (files / "out" / line["file"]).read_bytes()


def test_a_run_with_another_picture_is_another_run(
    model: Path, files: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    call = ["a fox", "--seed", 3, "--strength", 0.5, "--image", files / "picture.png"]
    assert generate(model, files, *call)[0] == 0
    assert generate(model, files, *call)[0] == 0
    Image.fromarray(picture()).save(files / "picture.png")
    assert generate(model, files, *call)[0] == 2
    assert "was drawn from another prompt, seed or settings" in capsys.readouterr().err


def test_lines_of_a_prompt_file_change_pictures_of_their_own(model: Path, files: Path) -> None:
    rows = [{"prompt": "a fox", "image": str(files / "picture.png"), "strength": {"sr32": 0}}, {"prompt": "a box"}]
    (files / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    status, line = generate(model, files, "--prompts", files / "p.jsonl", "--seed", 3)
    assert (status, line["prompt"], "image" in line) == (0, "a box", False)
    assert np.array_equal(pixels_of(next((files / "out").glob("000000*.png"))), pixels_of(files / "picture.png"))


def test_the_command_draws_beyond_a_picture(model: Path, files: Path) -> None:
    call = ["a fox", "--seed", 3, "--image", files / "picture.png", "--extend", "left=16,right=16"]
    status, line = generate(model, files, *call)
    changed = pixels_of(files / "out" / line["file"])
    assert (status, changed.shape) == (0, (32, 64, 3))
    assert np.array_equal(changed[:, 16:48], pixels_of(files / "picture.png"))


def test_a_wrong_picture_of_the_call_ends_it_before_any_line(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    call = ["generate", "a fox", "a box", "--image", str(tmp_path / "none.png"), "--model", str(model)]
    assert main([*call, "--out", str(tmp_path / "out"), "--device", "cpu"]) == 2
    assert capsys.readouterr().err.count("no such file") == 1
    assert not (tmp_path / "out").exists()


def test_a_picture_is_read_once_for_all_lines_that_name_it(
    model: Path, files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads: list[object] = []
    real = changes.read_picture
    monkeypatch.setattr(changes, "read_picture", lambda image, form: (reads.append(image), real(image, form))[1])
    row = {"image": str(files / "picture.png"), "strength": 0.5}
    (files / "p.jsonl").write_text("".join(json.dumps({"prompt": f"a fox {n}", **row}) + "\n" for n in range(4)))
    assert generate(model, files, "--prompts", files / "p.jsonl", "--seed", 3)[0] == 0
    assert len(reads) == 1
    assert generate(model, files, "b", "c", "--seed", 3, "--image", files / "picture.png", "--overwrite")[0] == 0
    assert len(reads) == 3  # before --overwrite removes anything, and for the run
