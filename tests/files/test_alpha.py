"""Transparent pixels take the colours of their neighbours, and the alpha channel is enlarged separately."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from cascade.pictures.frames import bled, is_opaque, with_alpha

RED, GREEN = (200, 30, 10), (20, 180, 40)


def see_through(*columns: tuple[int, int, int, int], height: int = 3) -> Image.Image:
    """A picture of single-coloured columns."""
    return Image.fromarray(np.array([columns] * height, dtype=np.uint8))


@pytest.mark.parametrize("size", [(1, 1), (7, 5), (64, 64), (33, 200)])
def test_one_colour_fills_everything_that_is_transparent(size: tuple[int, int]) -> None:
    image = Image.new("RGBA", size, (255, 255, 255, 0))
    image.putpixel((0, 0), (*RED, 255))
    assert bled(image).getcolors() == [(size[0] * size[1], RED)]


def test_visible_pixels_keep_their_colours_however_faint() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (9, 12, 4), dtype=np.uint8)
    noise[:, :, 3] = noise[:, :, 3] % 3  # alpha of 0, 1 and 2
    filled = np.asarray(bled(Image.fromarray(noise)))
    visible = noise[:, :, 3] > 0
    assert (filled[visible] == noise[visible][:, :3]).all()


def test_each_side_of_a_gap_continues_the_colour_that_is_nearest() -> None:
    """Four columns from each side, where the squares of a pyramid alone would mix both from the first column on."""
    gap = [(255, 255, 255, 0)] * 8
    filled = bled(see_through((*RED, 255), *gap, (*GREEN, 255)))
    assert [filled.getpixel((column, 1)) for column in range(10)] == [RED] * 5 + [GREEN] * 5


def test_neighbours_count_by_their_alpha() -> None:
    filled = bled(see_through((100, 0, 0, 255), (0, 0, 0, 0), (0, 100, 0, 85)))
    assert filled.getpixel((1, 1)) == (75, 25, 0)


def test_nothing_visible_is_white() -> None:
    assert bled(Image.new("RGBA", (3, 2), (9, 9, 9, 0))).getcolors() == [(6, (255, 255, 255))]


def test_a_channel_of_full_alpha_is_no_transparency() -> None:
    assert is_opaque(Image.new("RGB", (2, 2)))
    assert is_opaque(Image.new("RGBA", (2, 2), (1, 2, 3, 255)))
    assert not is_opaque(see_through((1, 2, 3, 255), (1, 2, 3, 254)))


def test_alpha_is_enlarged_between_its_own_values() -> None:
    """An edge from 0 to 255, enlarged to twice its width: bicubic weights of (-0.5) at a quarter and three quarters."""
    alpha = see_through(*[(0, 0, 0, 0)] * 4, *[(0, 0, 0, 255)] * 4).getchannel("A")
    large = with_alpha(Image.new("RGB", (16, 6), RED), alpha)
    assert large.mode == "RGBA"
    row = [large.getpixel((column, 3)) for column in range(16)]
    assert all(isinstance(pixel, tuple) and pixel[:3] == RED for pixel in row)
    edge = [pixel[3] for pixel in row if isinstance(pixel, tuple)]
    assert edge[:6] == [0] * 6
    assert edge[10:] == [255] * 6
    assert edge[7] + edge[8] == 255
    assert 45 <= edge[7] <= 60
