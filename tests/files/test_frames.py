"""All content of a picture file is read, and written to a PNG."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers_icc import ADOBE_RGB, rgb_profile
from PIL import ExifTags, Image
from PIL.PngImagePlugin import PngInfo

from cascade.errors import CascadeError
from cascade.pictures.frames import Frames, check_pixels, read_frames, save_png

COLOURS = ((255, 0, 0), (0, 255, 0), (0, 0, 255))


def animation(path: Path, **options: object) -> Path:
    """Three frames of one colour each, for 40, 200 and 1000 ms."""
    first, *others = (Image.new("RGB", (6, 4), colour) for colour in COLOURS)
    first.save(path, save_all=True, append_images=others, duration=[40, 200, 1000], **options)
    return path


def written(frames: Frames, folder: Path) -> Frames:
    """As it is read from a PNG again."""
    save_png(folder / "again.png", frames, PngInfo())
    return read_frames(folder / "again.png")


@pytest.mark.parametrize(
    ("name", "options"), [("a.gif", {}), ("a.png", {}), ("a.webp", {"lossless": True})], ids=["gif", "png", "webp"]
)
def test_frames_and_durations_come_back_from_every_animation(
    tmp_path: Path, name: str, options: dict[str, object]
) -> None:
    for frames in (read_frames(animation(tmp_path / name, **options)), None):
        again = frames if frames is not None else written(read_frames(tmp_path / name), tmp_path)
        assert [image.getpixel((2, 2)) for image in again.images] == list(COLOURS)
        assert list(again.durations) == pytest.approx([40, 200, 1000])


@pytest.mark.parametrize(("loop", "plays"), [(None, 1), (0, 0), (3, 4)])
def test_a_gif_counts_repeats_and_a_png_how_often_it_is_shown(tmp_path: Path, loop: int | None, plays: int) -> None:
    frames = read_frames(animation(tmp_path / "a.gif", **({} if loop is None else {"loop": loop})))
    assert frames.plays == plays
    assert written(frames, tmp_path).plays == plays
    with Image.open(tmp_path / "again.png") as image:
        assert image.info["loop"] == plays


def test_transparent_parts_of_frames_stay(tmp_path: Path) -> None:
    frames = [Image.new("RGBA", (4, 1), (0, 0, 0, 0)) for _ in range(2)]
    for place, frame in enumerate(frames):
        frame.putpixel((place, 0), (255, 0, 0, 255))
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:], disposal=2, duration=50)
    found = written(read_frames(tmp_path / "a.gif"), tmp_path)
    alphas = [[image.getchannel("A").getpixel((x, 0)) for x in range(4)] for image in found.images]
    assert alphas == [[255, 0, 0, 0], [0, 255, 0, 0]]


def test_a_picture_for_programs_without_animation_is_no_frame(tmp_path: Path) -> None:
    path = animation(tmp_path / "a.png", default_image=True)
    assert [image.getpixel((0, 0)) for image in read_frames(path).images] == list(COLOURS[1:])


def test_pages_of_a_tiff_are_no_frames(tmp_path: Path) -> None:
    first, *others = (Image.new("RGB", (6, 4), colour) for colour in COLOURS)
    first.save(tmp_path / "a.tiff", save_all=True, append_images=others)
    (image,) = read_frames(tmp_path / "a.tiff").images
    assert image.getpixel((0, 0)) == COLOURS[0]


def test_colours_become_srgb_once_and_the_profile_goes(tmp_path: Path) -> None:
    Image.new("RGB", (2, 1), (200, 60, 40)).save(tmp_path / "a.png", icc_profile=rgb_profile(ADOBE_RGB, 563 / 256))
    frames = read_frames(tmp_path / "a.png")
    for found in (frames, written(frames, tmp_path)):
        assert found.images[0].getpixel((0, 0)) == (231, 57, 34)
    with Image.open(tmp_path / "again.png") as image:
        assert "icc_profile" not in image.info


# --- EXIF --------------------------------------------------------------------------------------------------


def photo(path: Path) -> Path:
    """A picture turned by its EXIF, with a camera, an exposure, a place, and a size and colour space of its own."""
    exif = Image.Exif()
    exif[ExifTags.Base.Make], exif[ExifTags.Base.Orientation] = "Camera", 6
    exif[ExifTags.IFD.Exif] = {
        ExifTags.Base.ExposureTime: 0.5,
        ExifTags.Base.ExifImageWidth: 8,
        ExifTags.Base.ExifImageHeight: 6,
        ExifTags.Base.ColorSpace: 0xFFFF,
    }
    exif[ExifTags.IFD.GPSInfo] = {ExifTags.GPS.GPSLatitudeRef: "N"}
    Image.new("RGB", (8, 6)).save(path, exif=exif.tobytes())
    return path


@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.webp", "a.tiff"])
def test_exif_stays_but_what_no_longer_holds(tmp_path: Path, name: str) -> None:
    frames = read_frames(photo(tmp_path / name))
    assert frames.images[0].size == (6, 8)
    exif = written(frames, tmp_path).exif
    assert dict(exif) == {
        ExifTags.Base.Make: "Camera",
        ExifTags.IFD.Exif: {
            ExifTags.Base.ExposureTime: 0.5,
            ExifTags.Base.ExifImageWidth: 6,
            ExifTags.Base.ExifImageHeight: 8,
            ExifTags.Base.ColorSpace: 1,
        },
        ExifTags.IFD.GPSInfo: {ExifTags.GPS.GPSLatitudeRef: "N"},
    }


def test_broken_exif_says_nothing(tmp_path: Path) -> None:
    Image.new("RGB", (2, 2)).save(tmp_path / "a.png", exif=b"Exif\0\0no tiff")
    frames = read_frames(tmp_path / "a.png")
    assert not dict(frames.exif)
    save_png(tmp_path / "again.png", frames, PngInfo())
    with Image.open(tmp_path / "again.png") as image:
        assert "exif" not in image.info


# --- how much ----------------------------------------------------------------------------------------------


def test_an_animation_too_large_for_memory_is_refused_before_its_frames_are_decoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = animation(tmp_path / "a.gif")
    monkeypatch.setenv("CASCADE_MAX_PIXELS", "71")
    monkeypatch.setattr(Image.Image, "load", lambda _image: pytest.fail("decoded"))
    with pytest.raises(CascadeError, match=r"a\.gif: 3 frames of 6x4 have 72 pixels, more than 71; .*CASCADE_MAX"):
        read_frames(path)


def test_a_still_of_any_size_may_be_written() -> None:
    check_pixels("a.png", 1, (1 << 20, 1 << 20))


def test_a_duration_that_png_cannot_hold_is_cut(tmp_path: Path) -> None:
    frames = read_frames(animation(tmp_path / "a.gif"))
    long = Frames(frames.images, [1, 10_000_000, 5], 0, frames.exif)
    assert written(long, tmp_path).durations == pytest.approx([1, 65_535, 5])
