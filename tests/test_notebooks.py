"""The display of drawn pictures in a notebook."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from PIL import Image

from cascade.drawing.output import CascadeOutput


def drawn(count: int, output_type: str = "pil", prompt: str = "a red circle") -> CascadeOutput:
    """`count` pictures of 8 px, number i of shade 20 i."""
    shades = torch.arange(count, dtype=torch.uint8).mul(20).reshape(-1, 1, 1, 1).expand(-1, 3, 8, 8)
    return CascadeOutput.of({8: shades}, output_type, list(range(count)), [prompt] * count)


def shown(output: CascadeOutput) -> Image.Image:
    png = output._repr_png_()
    assert png is not None
    return Image.open(io.BytesIO(png))


def test_one_picture_is_shown_as_it_is() -> None:
    output = drawn(1)
    assert np.array_equal(np.asarray(shown(output)), np.asarray(output.images[0]))


def test_several_pictures_are_shown_side_by_side_in_their_order() -> None:
    sheet = np.asarray(shown(drawn(5)))
    assert sheet.shape == (18, 38, 3)  # four in a row, gaps of two pixels
    assert [int(sheet[4, 4 + 10 * place, 0]) for place in range(4)] == [0, 20, 40, 60]
    assert int(sheet[14, 4, 0]) == 80


def test_a_notebook_reads_what_each_picture_was_drawn_from() -> None:
    page = drawn(2, prompt="<b> & 'c'")._repr_html_()
    assert page is not None
    assert page.startswith('<img src="data:image/png;base64,iVBORw0KGgo')
    assert "<li>&lt;b&gt; &amp; &#x27;c&#x27; <small>seed 0</small></li>" in page
    assert "seed 1" in page


@pytest.mark.parametrize("output_type", ["np", "pt"])
def test_numbers_are_shown_as_numbers(output_type: str) -> None:
    output = drawn(2, output_type)
    assert output._repr_png_() is None
    assert output._repr_html_() is None
