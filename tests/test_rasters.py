"""Picture files of any channels and values are read as they are, written unchanged, and refused in one line."""

from __future__ import annotations

import io
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image

from cascade.data.records import BadRecordError, Record
from cascade.data.transforms import decode
from cascade.errors import CascadeError
from cascade.pictures.format import RGB, RGBA, PictureFormat
from cascade.pictures.rasters import as_pil, file_formats, read_given, read_stored, shown, size_of, write_array

GRAY = PictureFormat.of("gray")
GRAY16 = PictureFormat.of("gray", "uint16")
BANDS = PictureFormat.of(("blue", "green", "red", "nir"), "uint16")
HEIGHT = PictureFormat.of(("height",), "float32", ((-100.0, 900.0),))
FORMS = [RGB, RGBA, GRAY, GRAY16, BANDS, HEIGHT, PictureFormat.of("rgba", "uint16"), PictureFormat.of("rgb", "uint16")]


def some_picture(form: PictureFormat) -> torch.Tensor:
    rng = torch.Generator().manual_seed(0)
    return form.from_float(2 * torch.rand(form.channels, 5, 7, generator=rng) - 1)


def encoded(form: PictureFormat, file_format: str) -> bytes:
    buffer, picture = io.BytesIO(), some_picture(form)
    if file_format in ("tiff", "npy"):
        write_array(buffer, picture, form, file_format, "a text")
    else:
        as_pil(picture, form).save(buffer, file_format)
    return buffer.getvalue()


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_what_is_written_is_read_again_in_every_lossless_format(form: PictureFormat, tmp_path: Path) -> None:
    for file_format in set(file_formats(form)) - {"jpeg", "webp"}:
        path = tmp_path / f"a.{file_format}"
        path.write_bytes(encoded(form, file_format))
        for source in (path, path.read_bytes()):
            if form == RGB and source == path and file_format == "npy":
                continue  # pictures of 8-bit rgb are read as ever: .npy is none of their files
            assert torch.equal(read_stored(source, form), some_picture(form)), file_format
        assert size_of(path) == (7, 5)


@pytest.mark.parametrize("compression", [None, "zlib"])
@pytest.mark.parametrize("planes", ["contig", "separate"])
def test_tiff_bands_in_either_order_and_byte_order(tmp_path: Path, planes: str, compression: str | None) -> None:
    stored = some_picture(BANDS)
    values = stored.numpy() if planes == "separate" else stored.permute(1, 2, 0).numpy()
    path = tmp_path / "a.tif"
    tifffile.imwrite(
        path, values, photometric="minisblack", planarconfig=planes, compression=compression, byteorder=">"
    )
    assert torch.equal(read_stored(path, BANDS), stored)


def test_a_tiff_with_colours_multiplied_by_alpha_is_divided_by_it(tmp_path: Path) -> None:
    straight = torch.tensor([200, 100, 50, 128], dtype=torch.uint8).reshape(4, 1, 1).repeat(1, 3, 3)
    multiplied = RGBA.linear(straight).round().to(torch.uint8).permute(1, 2, 0).numpy()
    tifffile.imwrite(tmp_path / "a.tif", multiplied, photometric="rgb", extrasamples=["assocalpha"])
    assert (read_stored(tmp_path / "a.tif", RGBA).int() - straight.int()).abs().max() <= 1


WRONG: list[tuple[PictureFormat, PictureFormat, str, str]] = [
    (GRAY, RGB, "png", "has 3 channels of uint8; expected 1 channel (gray) of uint8"),
    (GRAY, GRAY16, "png", "has 1 channel of uint16; expected 1 channel (gray) of uint8"),
    (GRAY16, GRAY, "png", "has 1 channel of uint8; expected 1 channel (gray) of uint16"),
    (BANDS, RGB, "png", "has 3 channels of uint8; expected 4 channels (blue, green, red, nir) of uint16"),
    (BANDS, GRAY16, "tiff", "has 1 channel of uint16; expected 4 channels (blue, green, red, nir) of uint16"),
    (BANDS, HEIGHT, "npy", "has 1 channel of float32; expected 4 channels (blue, green, red, nir) of uint16"),
    (GRAY, BANDS, "tiff", "has 4 channels of uint16; expected 1 channel (gray) of uint8"),
    (RGBA, GRAY16, "png", "has 1 channel of uint16; expected 4 channels (red, green, blue, alpha) of uint8"),
]


@pytest.mark.parametrize(("wanted", "given", "file_format", "message"), WRONG)
def test_other_channels_or_values_are_one_line_with_file_found_and_expected(
    tmp_path: Path, wanted: PictureFormat, given: PictureFormat, file_format: str, message: str
) -> None:
    path = tmp_path / f"a.{file_format}"
    path.write_bytes(encoded(given, file_format))
    with pytest.raises(BadRecordError) as bad:
        decode(Record(path, ("a",), str(path)), wanted)
    assert str(bad.value) == f"{path}: {message}"
    with pytest.raises(CascadeError) as error:
        read_given(str(path), wanted, "image")
    assert str(error.value) == f"{path}: {message}"


def test_rgb_takes_every_picture_and_rgba_takes_opaque_ones() -> None:
    gray = Image.new("L", (2, 2), 80)
    assert read_stored(gray, RGB).unique().tolist() == [80]
    assert read_stored(gray, RGBA)[:, 0, 0].tolist() == [80, 80, 80, 255]
    sprite = Image.new("P", (2, 2))
    sprite.putpalette([255, 0, 0, 0, 255, 0])
    sprite.info["transparency"] = 0
    assert read_stored(sprite, RGBA)[:, 0, 0].tolist() == [255, 0, 0, 0]


@pytest.mark.parametrize("file_format", ["tiff", "npy"])
def test_damaged_files_are_bad_records(file_format: str) -> None:
    """Every cut of the file: an error of one line, or (npy never) the whole picture."""
    content = encoded(BANDS, file_format)
    for end in range(0, len(content), 7):
        try:
            picture = decode(Record(content[:end], ("a",), "it"), BANDS)
        except BadRecordError:
            continue
        assert file_format == "tiff"
        assert picture.shape == (4, 5, 7)


@pytest.mark.parametrize("kind", ["tiff", "npy", "dicom"])
def test_a_file_with_wrong_bytes_is_read_or_is_one_line(kind: str) -> None:
    """Errors of many types come out of the decoders: zlib's, pydicom's own, tokenize.TokenError."""
    content = dicom() if kind == "dicom" else encoded(BANDS, kind)
    rng = np.random.default_rng(0)
    for _ in range(150):
        damaged = np.frombuffer(content, np.uint8).copy()
        damaged[rng.integers(0, len(damaged), 3)] = rng.integers(0, 256, 3)
        try:
            with warnings.catch_warnings(action="ignore"):  # pydicom warns of values that it reads nevertheless
                read_given(damaged.tobytes(), GRAY16 if kind == "dicom" else BANDS, "it")
        except CascadeError as error:
            message = str(error)
        else:
            continue
        assert message.startswith("it: ")
        assert "\n" not in message


def test_a_tiff_of_more_strips_than_bytes_is_refused_before_any_is_decoded() -> None:
    """Its rows are said to be 60,000 and its strips a row high, with an entry for one strip."""
    content = bytearray(encoded(BANDS, "tiff"))
    with tifffile.TiffFile(io.BytesIO(content)) as file:
        tags = file.pages[0].tags
        rows, strip = tags["ImageLength"], tags["RowsPerStrip"]
    for tag, value in ((rows, 60_000), (strip, 1)):
        content[tag.valueoffset : tag.valueoffset + 2] = value.to_bytes(2, "little")
    with pytest.raises(CascadeError, match=r"it: .*60,000 strips or tiles, more than its bytes"):
        read_given(bytes(content), BANDS, "it")


def test_a_header_that_promises_more_than_the_file_takes_no_memory(tmp_path: Path) -> None:
    with (tmp_path / "a.npy").open("wb") as file:
        np.lib.format.write_array_header_1_0(
            file, {"descr": "<u2", "fortran_order": False, "shape": (1 << 20, 1 << 20, 4)}
        )
    with pytest.raises(BadRecordError, match="differs from the one in its header"):
        decode(Record(tmp_path / "a.npy", ("a",), "it"), BANDS)
    objects = io.BytesIO()
    np.save(objects, np.array([{}]), allow_pickle=True)
    with pytest.raises(BadRecordError, match="Python objects"):
        decode(Record(objects.getvalue(), ("a",), "it"), BANDS)


def test_arrays_of_tables_as_nested_lists() -> None:
    stored = some_picture(BANDS)
    rows = stored.permute(1, 2, 0).int().tolist()
    assert torch.equal(decode(Record(rows, ("a",), "it"), BANDS), stored)
    with pytest.raises(BadRecordError, match="has values from 0 to 70000"):
        decode(Record([[0, 70000]], ("a",), "it"), GRAY16)


def test_what_is_shown_is_8_bits_on_a_checkerboard() -> None:
    white, black = torch.full((1, 1, 1), 65535).to(torch.uint16), torch.zeros(1, 1, 1).to(torch.uint16)
    assert shown(white, GRAY16).getpixel((0, 0)) == (255, 255, 255)
    assert shown(black, GRAY16).getpixel((0, 0)) == (0, 0, 0)
    bands = torch.tensor([10, 20, 30, 40]).reshape(4, 1, 1).to(torch.uint16) * 257
    assert shown(bands, BANDS).getpixel((0, 0)) == (30, 20, 10)
    nothing = torch.zeros(4, 64, 64, dtype=torch.uint8)
    assert {colour for _, colour in shown(nothing, RGBA).getcolors()} == {(204, 204, 204), (255, 255, 255)}
    assert shown(nothing, RGBA, "white").getcolors() == [(64 * 64, (255, 255, 255))]
    assert shown(nothing, RGBA, "none").mode == "RGBA"


def test_no_pil_picture_of_four_bands() -> None:
    with pytest.raises(CascadeError, match="cannot hold 4 channels"):
        as_pil(some_picture(BANDS), BANDS)


def test_a_missing_decoder_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "imagecodecs", None)
    deep = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR\0\0\0\x02\0\0\0\x02\x10\x02\0\0\0" + bytes(8)
    with pytest.raises(BadRecordError, match=r"needs imagecodecs: pip install 'cascade-diffusion\[tiff"):
        decode(Record(deep, ("a",), "it"), PictureFormat.of("rgb", "uint16"))
    monkeypatch.setitem(sys.modules, "pydicom", None)
    with pytest.raises(BadRecordError, match="DICOM needs pydicom"):
        decode(Record(bytes(128) + b"DICM", ("a",), "it"), GRAY16)


def dicom(**changes: Any) -> bytes:
    """A computed tomography slice of 2 x 2 px, values 0, 1000, 1040, 3000, in Hounsfield units 1024 less."""
    pydicom = pytest.importorskip("pydicom")
    from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian

    meta = pydicom.dataset.FileMetaDataset()
    meta.TransferSyntaxUID, meta.MediaStorageSOPClassUID = ExplicitVRLittleEndian, CTImageStorage
    meta.MediaStorageSOPInstanceUID = "1.2.3"
    data = pydicom.dataset.FileDataset("", {}, file_meta=meta, preamble=bytes(128))
    data.SOPClassUID, data.SOPInstanceUID, data.Modality = CTImageStorage, "1.2.3", "CT"
    data.Rows = data.Columns = 2
    data.SamplesPerPixel, data.PhotometricInterpretation = 1, "MONOCHROME2"
    data.BitsAllocated, data.BitsStored, data.HighBit, data.PixelRepresentation = 16, 12, 11, 0
    data.RescaleSlope, data.RescaleIntercept = 1, -1024
    data.PixelData = np.array([[0, 1000], [1040, 3000]], np.uint16).tobytes()
    for name, value in changes.items():
        setattr(data, name, value)
    buffer = io.BytesIO()
    data.save_as(buffer, enforce_file_format=True)
    return buffer.getvalue()


def test_dicom_is_rescaled_and_windowed() -> None:
    units = PictureFormat.of(("hounsfield",), "float32", ((-1024.0, 3071.0),))
    assert read_stored(dicom(), units).flatten().tolist() == [-1024, -24, 16, 1976]
    assert read_stored(dicom(), GRAY16).flatten().tolist() == [0, 1000, 1040, 3000]
    # C.11.2.1.2: of the window 40 wide around -4.5, the values -24 and 15 are its ends.
    window = {"WindowCenter": -4, "WindowWidth": 40}
    assert read_stored(dicom(**window), GRAY).flatten().tolist() == [0, 0, 255, 255]
    inverted = dicom(PhotometricInterpretation="MONOCHROME1", **window)
    assert read_stored(inverted, GRAY).flatten().tolist() == [255, 255, 0, 0]
    with pytest.raises(ValueError, match="no window; expected 1 channel"):
        read_stored(dicom(), GRAY)
