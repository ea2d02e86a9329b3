"""Pictures of any mode, depth and colour space become 8-bit sRGB, as in every viewer."""

from __future__ import annotations

import io
import os
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from helpers_icc import ADOBE_RGB, DISPLAY_P3, SRGB, gray_profile, rgb_profile
from PIL import Image, ImageCms

from cascade.data.records import BadRecordError, Record
from cascade.data.transforms import decode
from cascade.drawing.edit import read_picture
from cascade.errors import CascadeError
from cascade.pictures.images import from_pil
from cascade.pictures.reading import _OPENING, open_picture, picture_errors, read_rgb, straight

ADOBE = rgb_profile(ADOBE_RGB, 563 / 256)


def pixels(image: Image.Image) -> list[object]:
    """Its values, one a pixel."""
    return [image.getpixel((x, y)) for y in range(image.height) for x in range(image.width)]


def stored(image: Image.Image, format: str, **options: object) -> Image.Image:
    """As it is opened again."""
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return Image.open(buffer)


# --- colour profiles ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("format", "options"), [("PNG", {}), ("TIFF", {}), ("WEBP", {"lossless": True})])
def test_adobe_rgb_becomes_srgb(format: str, options: dict[str, object]) -> None:
    image = stored(Image.new("RGB", (1, 1), (200, 60, 40)), format, icc_profile=ADOBE, **options)
    assert pixels(straight(image)) == [(231, 57, 34)]


def test_display_p3_becomes_srgb_as_the_matrices_say() -> None:
    """By hand: linear P3 -> XYZ -> linear sRGB, all of one gamma, so that neither curve needs a table."""
    colour = np.array([180, 120, 90])
    linear = (colour / 255) ** 2.2 @ np.array(DISPLAY_P3) @ np.linalg.inv(np.array(SRGB))
    encoded = np.where(linear > 0.0031308, 1.055 * linear ** (1 / 2.4) - 0.055, 12.92 * linear) * 255
    image = stored(Image.new("RGB", (1, 1), tuple(colour.tolist())), "PNG", icc_profile=rgb_profile(DISPLAY_P3, 2.2))
    (found,) = pixels(straight(image))
    assert np.abs(np.array(found) - encoded).max() <= 1
    assert np.abs(np.array(found) - colour).max() >= 5


def test_whoever_reads_a_picture_sees_srgb(tmp_path: Path) -> None:
    """Upscaling, training, evaluation: a path, bytes, a picture of Pillow."""
    path = tmp_path / "a.png"
    Image.new("RGB", (1, 1), (200, 60, 40)).save(path, icc_profile=ADOBE)
    for found in (
        read_picture(path)[0],
        read_picture(Image.open(path))[0],
        decode(Record(path, (), "a")),
        decode(Record(path.read_bytes(), (), "a")),
        from_pil(Image.open(path)),
    ):
        assert found.flatten().tolist() == [231, 57, 34]


def test_alpha_palettes_and_gray_have_profiles_too() -> None:
    see_through = stored(Image.new("RGBA", (1, 1), (200, 60, 40, 100)), "PNG", icc_profile=ADOBE)
    assert pixels(straight(see_through)) == [(231, 57, 34, 100)]
    palette = Image.new("RGB", (1, 1), (200, 60, 40)).convert("P", palette=Image.Palette.ADAPTIVE)
    assert pixels(straight(stored(palette, "PNG", icc_profile=ADOBE))) == [(231, 57, 34)]
    # A gray of 128 under gamma 1.8 has a luminance of 0.289, which sRGB writes as 146.
    for image in (Image.new("L", (1, 1), 128), Image.fromarray(np.full((1, 1), 128 * 257, np.uint16))):
        assert pixels(straight(stored(image, "PNG", icc_profile=gray_profile(1.8)))) == [(146, 146, 146)]
    half = stored(Image.new("LA", (1, 1), (128, 50)), "PNG", icc_profile=gray_profile(1.8))
    assert pixels(straight(half)) == [(146, 146, 146, 50)]


def test_a_profile_that_says_srgb_changes_no_bit() -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    assert straight(stored(noise, "PNG", icc_profile=profile)).tobytes() == noise.tobytes()


@pytest.mark.parametrize("profile", [b"", b"damaged", ADOBE[:200], ADOBE[:132] + b"\xff" * 400, gray_profile(1.8)])
def test_a_profile_that_is_damaged_or_not_for_these_colours_counts_as_none(profile: bytes) -> None:
    image = Image.new("RGB", (1, 1), (200, 60, 40))
    image.info["icc_profile"] = profile
    assert pixels(straight(image)) == [(200, 60, 40)]
    cmyk = Image.new("CMYK", (1, 1), (0, 255, 255, 0))
    cmyk.info["icc_profile"] = profile or ADOBE
    assert pixels(straight(cmyk)) == [(255, 0, 0)]


# --- depth -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "dtype", "expected"),
    [
        ([0, 7, 255], np.int32, [0, 7, 255]),
        ([-5, 257, 65535], np.int32, [0, 1, 255]),
        ([0.0, 0.2, 1.0], np.float32, [0, 51, 255]),
        ([0.0, 51.0, 255.0], np.float32, [0, 51, 255]),
        ([0.0, 257.0, 65535.0], np.float32, [0, 1, 255]),
        # What sharpening leaves beyond white, and what a division by zero does.
        ([0.0, 0.2, 1.02], np.float32, [0, 51, 255]),
        ([-0.1, 0.2, 1.9], np.float32, [0, 51, 255]),
        ([0.2, np.inf, -np.inf], np.float32, [51, 255, 0]),
        ([0.2, np.nan, 1.0], np.float32, [51, 0, 255]),
        ([0.0, 51.0, 260.0], np.float32, [0, 51, 255]),
        ([51.0, 255.0, np.inf], np.float32, [51, 255, 255]),
        ([np.nan, np.inf, -np.inf], np.float32, [0, 255, 0]),
    ],
)
def test_gray_that_does_not_say_what_white_is_goes_by_its_largest_value(
    values: list[float], dtype: type, expected: list[int]
) -> None:
    image = Image.fromarray(np.array([values], dtype=dtype))
    assert pixels(straight(stored(image, "TIFF"))) == [(gray,) * 3 for gray in expected]


def png(colours: int, depth: int, row: bytes, transparent: bytes, width: int = 2) -> Image.Image:
    """A PNG of one row, one colour of which is transparent; Pillow writes none of these depths."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, 1, depth, colours, 0, 0, 0)
    parts = {b"IHDR": header, b"tRNS": transparent, b"IDAT": zlib.compress(b"\0" + row), b"IEND": b""}
    content = b"".join(chunk(kind, part) for kind, part in parts.items())
    return Image.open(io.BytesIO(b"\x89PNG\r\n\x1a\n" + content))


@pytest.mark.parametrize(
    "image",
    [
        png(0, 16, struct.pack(">2H", 1000, 512), struct.pack(">H", 1000)),
        png(2, 16, struct.pack(">6H", 1000, 2000, 300, 512, 512, 512), struct.pack(">3H", 1000, 2000, 300)),
        png(0, 8, bytes([7, 2]), b"\0\7"),
    ],
    ids=["gray of 16 bits", "colours of 16 bits", "gray of 8 bits"],
)
def test_the_transparent_colour_of_a_png_is_transparent_at_every_depth(image: Image.Image) -> None:
    assert from_pil(image)[:, 0].tolist() == [[255, 2]] * 3


@pytest.mark.parametrize(("depth", "row", "light"), [(4, 0x71, 17), (2, 0b11_01_0000, 85), (1, 0b10_000000, 0)])
def test_the_transparent_gray_of_a_png_of_few_bits_is_transparent(depth: int, row: int, light: int) -> None:
    image = png(0, depth, bytes([row]), struct.pack(">H", row >> (8 - depth)))
    assert from_pil(image)[0].tolist() == [[255, light]]


# --- EXIF --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", ["PNG", "WEBP", "JPEG"])
@pytest.mark.parametrize("exif", [b"Exif\0\0no TIFF at all", b"Exif\0\0II*\0\xff\xff\xff\xff", b"\0"])
@pytest.mark.filterwarnings("ignore:.*EXIF")  # Pillow's, when it opens a JPEG
def test_broken_exif_says_nothing_of_the_orientation(format: str, exif: bytes) -> None:
    image = stored(Image.new("RGB", (2, 1), "white"), format, exif=exif)
    assert straight(image).size == (2, 1)


# --- how large ---------------------------------------------------------------------------------------------


def test_a_picture_of_too_many_pixels_is_told_with_the_way_to_allow_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "large.png"
    Image.new("1", (100, 100)).save(path)
    monkeypatch.setenv("CASCADE_MAX_PIXELS", "9999")
    with pytest.raises(CascadeError, match=r"large\.png: has more than 9,999 pixels; to read it anyway, set CASC"):
        read_picture(path)
    with pytest.raises(BadRecordError, match=r"broken picture: .*; CASCADE_MAX_PIXELS allows more"):
        decode(Record(path, (), "a"))
    monkeypatch.setenv("CASCADE_MAX_PIXELS", "10000")
    assert read_picture(path).shape == (1, 3, 100, 100)
    monkeypatch.setenv("CASCADE_MAX_PIXELS", "many")
    with pytest.raises(CascadeError, match=r"CASCADE_MAX_PIXELS: 'many'; expected a number of pixels"):
        read_picture(path)


def test_pillows_own_limit_is_left_as_it_was_and_nothing_is_warned_of_below_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Image.new("1", (100, 100)).save(tmp_path / "a.png")
    before = Image.MAX_IMAGE_PIXELS
    monkeypatch.setenv("CASCADE_MAX_PIXELS", "15000")  # Pillow would warn from half of it on
    read_picture(tmp_path / "a.png")
    assert before == Image.MAX_IMAGE_PIXELS


def test_the_limit_of_one_reader_is_not_that_of_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It belongs to the process, as Python's filters of warnings do: both are changed while a file is opened, alone."""
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    before = (Image.MAX_IMAGE_PIXELS, list(warnings.filters))
    with open_picture(tmp_path / "a.png", limited=False):
        assert (Image.MAX_IMAGE_PIXELS, list(warnings.filters)) == before
    opened: list[bool] = []
    monkeypatch.setattr(Image, "open", lambda *_, **__: opened.append(_OPENING.locked()) or Image.new("RGB", (1, 1)))
    with open_picture(tmp_path / "a.png"):
        assert opened == [True]


def test_only_the_formats_that_are_named_are_read(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "a.bmp")
    with pytest.raises(CascadeError, match="not a readable picture"), picture_errors("a"):
        open_picture(tmp_path / "a.bmp", formats=("PNG",)).__enter__()


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="pipes with names are of POSIX")
def test_a_pipe_in_a_picture_s_place_is_refused_without_waiting(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(CascadeError, match=r"^pipe\.png: not a readable picture: .*a pipe or a device"):
        read_rgb(tmp_path / "pipe.png", "pipe.png")
