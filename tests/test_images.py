"""Conversion and resizing of pictures, against answers known beforehand."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from cascade.pictures.images import contact_sheet, downsample, flatten, from_pil, to_float, to_pil, to_uint8, upsample


def random_picture(*shape: int) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(0)) * 2 - 1


def test_every_byte_survives_the_way_to_float_and_back() -> None:
    every = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_uint8(to_float(every)), every)
    assert to_float(every).aminmax() == (-1.0, 1.0)


def test_to_uint8_rounds_half_to_even_and_clamps() -> None:
    # (x + 1) * 127.5 is exactly 127.5 at 0, and 128 is its even neighbour.
    assert to_uint8(torch.tensor([0.0, -3.0, 3.0])).tolist() == [128, 0, 255]


def test_pil_and_back_is_the_same_picture() -> None:
    picture = torch.randint(0, 256, (2, 3, 5, 7), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    images = to_pil(to_float(picture))
    assert [image.size for image in images] == [(7, 5), (7, 5)]
    assert torch.equal(torch.stack([from_pil(image) for image in images]), picture)
    assert [image.tobytes() for image in to_pil(picture)] == [image.tobytes() for image in images]


def test_transparency_lies_over_white() -> None:
    half = Image.new("RGBA", (1, 1), (0, 0, 0, 128))
    assert from_pil(half).flatten().tolist() == [127, 127, 127]
    assert from_pil(Image.new("LA", (1, 1), (0, 0))).flatten().tolist() == [255, 255, 255]


def test_exif_orientation_is_followed() -> None:
    image = Image.new("RGB", (2, 1))
    image.putpixel((0, 0), (255, 0, 0))
    image.getexif()[0x0112] = 6  # turned by 90 degrees: what was left is on top
    upright = from_pil(image)
    assert upright.shape == (3, 2, 1)
    assert upright[0, 0, 0] == 255


def test_sixteen_bit_gray_keeps_its_upper_byte() -> None:
    image = Image.fromarray(np.array([[0, 257, 65535]], dtype=np.uint16))
    assert from_pil(image)[0].tolist() == [[0, 1, 255]]


def test_downsample_is_the_area_mean() -> None:
    picture = torch.tensor([[1.0, 2.0, 3.0]]).view(1, 1, 1, 3)
    # 3 -> 2: each result covers one and a half pixels.
    expected = torch.tensor([[(1 + 2 / 2) / 1.5, (2 / 2 + 3) / 1.5]]).view(1, 1, 1, 2)
    torch.testing.assert_close(downsample(picture, (1, 2)), expected)


def test_downsample_agrees_with_torch_where_sizes_divide() -> None:
    picture = random_picture(2, 3, 12, 8)
    torch.testing.assert_close(downsample(picture, (4, 4)), F.interpolate(picture, size=(4, 4), mode="area"))


@pytest.mark.parametrize("size", [(5, 7), (11, 3), 6])
def test_downsample_keeps_the_mean(size: int | tuple[int, int]) -> None:
    picture = random_picture(1, 3, 17, 13)
    torch.testing.assert_close(downsample(picture, size).mean(), picture.mean())


def test_downsample_commutes_with_aligned_crops() -> None:
    picture = random_picture(1, 3, 64, 48)
    crop = picture[..., 8:40, 4:36]
    torch.testing.assert_close(downsample(crop, 8), downsample(picture, (16, 12))[..., 2:10, 1:9])


def test_downsample_refuses_to_enlarge() -> None:
    with pytest.raises(ValueError, match="8x8 is larger than the picture, 4x16"):
        downsample(torch.zeros(1, 3, 4, 16), 8)


def test_upsample_by_an_odd_factor_keeps_the_pixels_it_falls_on() -> None:
    picture = random_picture(2, 3, 4, 6)
    enlarged = upsample(picture, (12, 30))
    assert enlarged.shape == (2, 3, 12, 30)
    torch.testing.assert_close(enlarged[..., 1::3, 2::5], picture)


def test_contact_sheet_places_pictures_row_by_row() -> None:
    colours = ["red", "lime", "blue"]
    sheet = contact_sheet([Image.new("RGB", (8, 8), colour) for colour in colours], columns=2)
    assert sheet.size == (18, 18)
    assert [sheet.getpixel(point) for point in ((4, 4), (14, 4), (4, 14), (14, 14))] == [
        (255, 0, 0),
        (0, 255, 0),
        (0, 0, 255),
        (255, 255, 255),
    ]


def test_contact_sheet_writes_labels_beneath_and_fits_other_aspects() -> None:
    sheet = contact_sheet([Image.new("RGB", (100, 50))], columns=1, labels=["漢 a label " * 9], cell=60)
    assert sheet.width == 60
    below = np.asarray(sheet.convert("L"))[60:]
    assert below.min() < 128 < below.mean()


def test_contact_sheet_wants_a_label_for_every_picture() -> None:
    with pytest.raises(ValueError, match="1 labels for 2 pictures"):
        contact_sheet([Image.new("RGB", (2, 2))] * 2, columns=2, labels=["one"])


def test_flattening_removes_grain_and_keeps_an_edge() -> None:
    clean = torch.full((1, 3, 32, 32), -0.5)
    clean[..., 16:] = 0.5
    grain = 0.03 * torch.randn(clean.shape, generator=torch.Generator().manual_seed(0))
    found = flatten(clean + grain, 0.15)
    inside = (found - clean)[..., 4:-4, :]
    # The means of 25 neighbours, and of those: white noise falls to a tenth of its deviation or so.
    assert float(inside.std()) < 0.03 / 5
    step = found[..., 16] - found[..., 15]
    assert abs(float(step.mean()) - 1) < 0.01
    assert torch.equal(flatten(clean, 0.15).round(decimals=5), clean)


def test_flattening_keeps_a_slow_gradient_and_with_no_tolerance_everything() -> None:
    ramp = torch.linspace(-1, 1, 256).expand(1, 3, 8, 256)
    assert (flatten(ramp, 0.15) - ramp)[..., 8:-8].abs().max() < 1e-3
    assert flatten(ramp, 0.0) is ramp
