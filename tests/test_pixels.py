"""Formats of pictures: stored values and [-1, 1] are each other's inverse, and transparency leaves no fringe."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from cascade.data.transforms import jitter, resize, square
from cascade.pictures.format import RGB, RGBA, PictureFormat, as_stored, mirrored
from cascade.pictures.images import downsample, to_float, to_uint8

GRAY16 = PictureFormat.of("gray", "uint16")
BANDS = PictureFormat.of(("blue", "green", "red", "nir"), "uint16", ((0, 4000), (0, 4000), (100, 5000), (0, 9000)))
METRES = PictureFormat.of(("height",), "float32", ((-100.0, 900.0),))


def test_rgb_is_what_the_package_always_did() -> None:
    pixels = torch.randint(0, 256, (2, 3, 9, 7), dtype=torch.uint8)
    x = 1.2 * torch.randn(2, 3, 9, 7)
    assert torch.equal(RGB.to_float(pixels), to_float(pixels))
    assert torch.equal(RGB.from_float(x), to_uint8(x))
    assert RGB.fill == (255.0, 255.0, 255.0)


@pytest.mark.parametrize("form", [RGB, GRAY16, PictureFormat.of("gray"), PictureFormat.of("rgb", "uint16")])
def test_every_whole_value_comes_back(form: PictureFormat) -> None:
    most = int(form.limits[0][1])
    stored = torch.arange(most + 1).repeat(form.channels, 1)[..., None].to(form.dtype)
    x = form.to_float(stored)
    assert x.min() == -1
    assert x.max() == 1
    assert torch.equal(form.from_float(x), stored)


def test_every_colour_and_alpha_comes_back_and_what_is_invisible_is_black() -> None:
    colour, alpha = torch.meshgrid(torch.arange(256), torch.arange(256), indexing="ij")
    stored = torch.stack((colour, colour.flip(0), colour, alpha)).to(torch.uint8)
    back = RGBA.from_float(RGBA.to_float(stored))
    assert torch.equal(back[:, alpha > 0], stored[:, alpha > 0])
    assert not back[:, alpha == 0].any()


def test_each_band_has_its_range_and_values_beyond_are_clipped() -> None:
    stored = torch.tensor([[0, 4000], [2000, 9999], [100, 5000], [4500, 65535]]).to(torch.uint16)[..., None]
    expected = torch.tensor([[-1.0, 1.0], [0.0, 1.0], [-1.0, 1.0], [0.0, 1.0]])[..., None]
    torch.testing.assert_close(BANDS.to_float(stored), expected, atol=1e-6, rtol=0)
    assert BANDS.from_float(expected)[:, 1, 0].tolist() == [4000, 4000, 5000, 9000]


def test_float_values_stay_float() -> None:
    stored = torch.tensor([[[-100.0, 400.0, 900.0, 2000.0]]])
    assert METRES.to_float(stored).flatten().tolist() == [-1, 0, 1, 1]
    assert METRES.from_float(torch.zeros(1, 1, 1)).dtype == torch.float32
    assert METRES.from_float(torch.zeros(1, 1, 1)).item() == 400


def soft_disc(side: int, colour: tuple[int, int, int], hidden: int) -> Tensor:
    """A disc with a soft edge, (4, side, side); hidden: the colour stored where nothing is visible."""
    places = (torch.arange(side) + 0.5) / side - 0.5
    distance = (places[:, None].square() + places.square()).sqrt()
    alpha = ((0.35 - distance) * side / 2 + 0.5).clamp(0, 1)
    pixels = torch.tensor([*colour, 0.0])[:, None, None].repeat(1, side, side)
    pixels[:3, alpha == 0] = float(hidden)
    pixels[3] = alpha * 255
    return pixels.round().to(torch.uint8)


def laid(pixels: Tensor, background: tuple[int, int, int]) -> Tensor:
    """The picture over a colour, (3, H, W) in 0..255, in float: what an eye sees."""
    alpha = pixels[3:].double() / 255
    return pixels[:3].double() * alpha + torch.tensor(background, dtype=torch.float64)[:, None, None] * (1 - alpha)


BACKGROUNDS = {"black": (0, 0, 0), "white": (255, 255, 255), "red": (255, 0, 0)}


@pytest.mark.parametrize("background", BACKGROUNDS.values(), ids=BACKGROUNDS)
@pytest.mark.parametrize("hidden", [0, 255])
@pytest.mark.parametrize("size", [16, 24], ids=["mean", "straddling"])
def test_reducing_a_transparent_shape_leaves_no_fringe(
    background: tuple[int, int, int], hidden: int, size: int
) -> None:
    """Reduced and then laid over a colour, it is what is laid over the colour and then reduced, to 2/255."""
    shape = soft_disc(64, (40, 160, 250), hidden)
    truth = downsample(laid(shape, background).float()[None], size)[0]
    assert (laid(resize(shape, size, RGBA), background) - truth).abs().max() <= 2


@pytest.mark.parametrize("background", BACKGROUNDS.values(), ids=BACKGROUNDS)
@pytest.mark.parametrize("hidden", [0, 255])
def test_enlarging_a_transparent_shape_leaves_no_fringe(background: tuple[int, int, int], hidden: int) -> None:
    """Every pixel of the enlarged shape lies between the background and the shape's colour, to 2/255."""
    colour = (40, 160, 250)
    seen = laid(resize(soft_disc(32, colour, hidden), 150, RGBA), background)
    ends = torch.tensor([colour, background], dtype=torch.float64)[..., None, None]
    assert (seen >= ends.amin(0) - 2).all()
    assert (seen <= ends.amax(0) + 2).all()


def test_the_fringe_test_finds_a_fringe() -> None:
    """Averaging colours that are not multiplied by alpha, the usual mistake, is far beyond 2/255."""
    shape = soft_disc(64, (40, 160, 250), 255)
    wrong = downsample(shape.float()[None], 16)[0].round()
    truth = downsample(laid(shape, (0, 0, 0)).float()[None], 16)[0]
    assert (laid(wrong, (0, 0, 0)) - truth).abs().max() > 10


def test_padding_is_transparent_white_or_the_lowest_value() -> None:
    wide = {form: torch.full((form.channels, 2, 4), 7).to(form.dtype) for form in (RGBA, RGB, BANDS, GRAY16)}
    corners = {form: square(picture, "pad", form)[:, 0, 0].tolist() for form, picture in wide.items()}
    assert corners == {RGBA: [0] * 4, RGB: [255] * 3, BANDS: [0, 0, 100, 0], GRAY16: [65535]}


def test_jitter_moves_transparent_pictures_without_a_fringe() -> None:
    import random

    shape = soft_disc(32, (40, 160, 250), 255)
    moved = jitter(shape, 0.2, random.Random(3), RGBA)
    seen = moved[3] > 8
    assert moved.dtype == torch.uint8
    assert (moved[:3, seen].float() - torch.tensor([40.0, 160, 250])[:, None]).abs().max() <= 16  # 1/2 at alpha 8/255


def test_hidden_colours_change_nothing() -> None:
    """So the loss cannot see them, and weighs an error of colour by alpha: x holds colour times alpha."""
    one, other = soft_disc(32, (40, 160, 250), 0), soft_disc(32, (40, 160, 250), 255)
    assert torch.equal(RGBA.to_float(one), RGBA.to_float(other))
    wrong = one.clone()
    wrong[0] += 51  # a fifth of the range
    error = (RGBA.to_float(wrong) - RGBA.to_float(one))[0]
    torch.testing.assert_close(error, 2 * 0.2 * one[3].float() / 255, atol=1e-6, rtol=0)


def test_arrays_in_either_order_and_of_other_kinds() -> None:
    values = np.arange(4 * 5 * 6, dtype=np.uint16).reshape(5, 6, 4)
    assert torch.equal(as_stored(values, BANDS), as_stored(values.transpose(2, 0, 1), BANDS))
    assert as_stored(values[..., 0].astype(">u2"), GRAY16)[0, 1].tolist() == values[1, :, 0].tolist()
    assert as_stored(np.ones((3, 3), np.int16), METRES).dtype == torch.float32
    for wrong in (values[..., :3], values.astype(np.uint8), values[..., 0]):
        with pytest.raises(ValueError, match=r"expected 4 channels \(blue, green, red, nir\) of uint16"):
            as_stored(wrong, BANDS)
    with pytest.raises(ValueError, match="not finite"):
        as_stored(np.full((2, 2), np.nan, np.float32), METRES)


@pytest.mark.parametrize("form", [RGB, GRAY16, METRES])
def test_mirroring_any_type(form: PictureFormat) -> None:
    picture = torch.arange(form.channels * 6).reshape(form.channels, 2, 3).to(form.dtype)
    assert mirrored(picture)[0, 0].tolist() == [2, 1, 0]


def test_a_sheet_shows_transparency_on_a_checkerboard() -> None:
    from cascade.pictures.images import contact_sheet

    sheet = contact_sheet([Image.new("RGBA", (64, 64), (0, 0, 0, 0))], 1)
    assert sorted({colour for _, colour in sheet.getcolors()}) == [(204, 204, 204), (255, 255, 255)]
