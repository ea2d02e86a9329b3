"""`cascade upscale`: written files, kept files, refusals."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from helpers_model import make_tiny_cascade
from PIL import Image

from cascade import CascadePipeline
from cascade.cli.program import main


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_cascade(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two pictures, one of them partly transparent."""
    Image.new("RGB", (8, 6), "red").save(tmp_path / "red.png")
    Image.new("RGBA", (5, 8), (0, 0, 255, 90)).save(tmp_path / "blue.png")
    return tmp_path


def upscale(model: Path, folder: Path, *arguments: object) -> int:
    """The exit status of a call."""
    words = ["upscale", "--model", str(model), "--device", "cpu", "--out", str(folder / "out"), *map(str, arguments)]
    return main(words)


def manifest(folder: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (folder / "out" / "manifest.jsonl").read_text().splitlines()]


def test_it_writes_what_the_pipeline_draws_and_says_how_in_picture_and_manifest(model: Path, folder: Path) -> None:
    options = ("--to", 24, "--seed", 3, "--prompt", "a fox", "--steps", "sr16=1")
    assert upscale(model, folder, folder / "red.png", folder / "blue.png", *options) == 0
    pipeline = CascadePipeline.from_pretrained(model, device="cpu")
    expected = pipeline.upscale(folder / "red.png", to=24, seed=3, prompt="a fox", steps={"sr16": 1}).images[0]
    with Image.open(folder / "out" / "red.png") as image:
        image.load()
        assert image.size == (24, 18)
        assert image.tobytes() == expected.tobytes()
        said = getattr(image, "text", {})
    assert (said["prompt"], said["seed"], said["source"]) == ("a fox", "3", "red.png")
    assert json.loads(said["upscale"])["steps"] == {"sr16": 1}
    red, blue = manifest(folder)
    assert (red["file"], red["width"], red["height"]) == ("red.png", 24, 18)
    assert (blue["file"], blue["width"], blue["height"]) == ("blue.png", 15, 24)


def test_the_same_call_keeps_what_is_there_and_another_needs_overwrite(
    model: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    call = (folder / "red.png", "--to", 16)
    assert upscale(model, folder, *call) == 0
    written = (folder / "out" / "red.png").stat().st_mtime_ns
    assert upscale(model, folder, *call) == 0
    assert "kept" in capsys.readouterr().out
    assert (folder / "out" / "red.png").stat().st_mtime_ns == written
    assert len(manifest(folder)) == 1
    assert upscale(model, folder, *call, "--prompt", "a fox") == 2
    assert "exists, but from another call" in capsys.readouterr().err
    assert upscale(model, folder, *call, "--prompt", "a fox", "--overwrite") == 0
    assert manifest(folder)[-1]["prompt"] == "a fox"


def test_a_result_beyond_the_largest_picture_that_is_read_is_kept(
    model: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is ours, and says so before any of its pixels is decoded."""
    monkeypatch.setenv("CASCADE_MAX_PIXELS", "48")  # of the source; the result has four times as many
    for said in ("16x12", "kept"):
        assert upscale(model, folder, folder / "red.png", "--to", 16) == 0
        assert said in capsys.readouterr().out
    Image.new("RGB", (40, 40)).save(folder / "out" / "red.png")
    assert upscale(model, folder, folder / "red.png", "--to", 16) == 2
    assert "exists, and `cascade upscale` did not write it" in capsys.readouterr().err


def test_a_picture_that_fails_is_named_and_the_others_are_made(
    model: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "broken.png").write_bytes(b"no picture")
    assert upscale(model, folder, folder / "broken.png", folder / "red.png", "--to", 16) == 1
    out, err = capsys.readouterr()
    assert "broken.png: not a readable picture" in err
    assert "red.png: 16x12" in out


# --- what a file holds besides its pixels ------------------------------------------------------------------


def test_frames_are_enlarged_one_by_one_and_shown_as_long(model: Path, folder: Path) -> None:
    frames = [Image.new("RGB", (8, 6), colour) for colour in ("red", "blue")]
    frames[0].save(folder / "a.gif", save_all=True, append_images=frames[1:], duration=[40, 700], loop=0)
    assert upscale(model, folder, folder / "a.gif", "--to", 16) == 0
    pipeline = CascadePipeline.from_pretrained(model, device="cpu")
    with Image.open(folder / "out" / "a.png") as image:
        assert (image.size, image.n_frames, image.info["loop"]) == ((16, 12), 2, 0)  # type: ignore[attr-defined]
        for place, duration in enumerate((40, 700)):
            image.seek(place)
            image.load()
            assert image.info["duration"] == pytest.approx(duration)
            alone = pipeline.upscale(frames[place], to=16, seed=0).images[0]
            assert image.convert("RGB").tobytes() == alone.tobytes()
    assert manifest(folder)[-1]["frames"] == 2


def test_an_animation_that_is_there_is_kept_and_a_damaged_one_is_not(
    model: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    frames = [Image.new("RGB", (8, 6), colour) for colour in ("red", "blue")]
    frames[0].save(folder / "a.gif", save_all=True, append_images=frames[1:], duration=40)
    for said in ("16x12, 2 frames", "kept"):
        assert upscale(model, folder, folder / "a.gif", "--to", 16) == 0
        assert said in capsys.readouterr().out
    content = (folder / "out" / "a.png").read_bytes()
    (folder / "out" / "a.png").write_bytes(content[: content.rindex(b"fdAT") + 9])
    assert upscale(model, folder, folder / "a.gif", "--to", 16) == 2
    assert upscale(model, folder, folder / "a.gif", "--to", 16, "--overwrite") == 0


def test_transparency_is_enlarged_and_hidden_colours_leave_no_fringe(model: Path, folder: Path) -> None:
    """A red square under whose transparent surroundings lies white, becomes what a red picture becomes."""
    square = Image.new("RGBA", (8, 8), (255, 255, 255, 0))
    square.paste((255, 0, 0, 255), (2, 2, 6, 6))
    square.save(folder / "square.png")
    Image.new("RGB", (8, 8), (255, 0, 0)).save(folder / "plain.png")
    assert upscale(model, folder, folder / "square.png", folder / "plain.png", "--to", 16) == 0
    with Image.open(folder / "out" / "square.png") as image, Image.open(folder / "out" / "plain.png") as plain:
        assert (image.mode, plain.mode) == ("RGBA", "RGB")
        assert image.convert("RGB").tobytes() == plain.tobytes()
        alpha = image.getchannel("A")
        assert [alpha.getpixel(place) for place in ((0, 0), (8, 8), (15, 8))] == [0, 255, 0]


def test_a_result_of_too_many_frames_is_refused_before_one_is_drawn(
    model: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    frames = [Image.new("RGB", (8, 6), colour) for colour in ("red", "blue")]
    frames[0].save(folder / "a.gif", save_all=True, append_images=frames[1:], duration=40)
    monkeypatch.setenv("CASCADE_MAX_PIXELS", "383")
    monkeypatch.setattr(CascadePipeline, "upscale", lambda *_, **__: pytest.fail("drawn"))
    assert upscale(model, folder, folder / "a.gif", "--to", 16) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "a.gif: 2 frames of 16x12 have 384 pixels, more than 383; make them smaller" in line


def test_what_the_camera_noted_stays(model: Path, folder: Path) -> None:
    exif = Image.Exif()
    exif[0x010F], exif[0x0112] = "Camera", 6
    Image.new("RGB", (8, 6)).save(folder / "photo.jpg", exif=exif)
    assert upscale(model, folder, folder / "photo.jpg", "--to", 16) == 0
    with Image.open(folder / "out" / "photo.png") as image:
        assert image.size == (12, 16)
        assert dict(image.getexif()) == {0x010F: "Camera"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere.png"], "nowhere.png: cannot be read: No such file"),
        (["red.png", "--to", "4"], "red.png: to: 4; the picture's longer side already has 8 px"),
        (["red.png", "--to", "100000000"], "red.png: out of memory in stage sr32: needs more than"),
        (["red.png", "blue.png", "--steps", "0"], "stage base: steps: should be greater than 0"),
        (["red.png", "--to", "0"], "0 is not in the range x>=1"),
        (["red.png", "--tile", "8"], "tile: stage sr16 sees the whole picture at once"),
        (["red.png", "--steps", "base4=3"], "no stage is called 'base4'"),
        (["red.png", "--preset", "best"], "no stage of this cascade defines 'best'"),
        (["red.png", "sub/red.png"], "would become"),
        (["red.png", "--out", "."], "would be overwritten"),
        (["red.png", "--out", "blue.png"], "cannot be written"),
        ([], "Missing argument"),
    ],
    ids=str,
)
def test_wrong_calls_end_with_status_2_and_one_line(
    model: Path,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(folder)
    assert upscale(model, folder, *arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("cascade: error: ")
    assert message in line
