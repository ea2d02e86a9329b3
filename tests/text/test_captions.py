"""Captions are cleaned like DeepFloyd IF's: word for word as in diffusers, where both apply."""

from __future__ import annotations

import pytest

from cascade.text.captions import clean_caption, prepare_caption

NASTY = [
    "A photo of a red fox, 4k!",
    "<b>Bold</b> &amp; <i>shy</i> cat",
    "www.shop.ru best price #12345",
    "a dog — running – fast",
    "“Quoted” text's ‘here’",
    "IMG_20190203.jpg cat",
    "猫 and dog 漢字",
    "192.168.0.1 server rack",
    "a_b-c_d-e_f",
    "@user hello world",
    "cup\\nof\\ntea",
    "page 12 of the book",
    "1024x768 wallpaper",
    "free shipping on shoes",
    "shipping containers",
    "click for more cats",
    "hello ... world . end",
    "  'a quoted cat'  ",
    "<person> eating &lt;cake&gt;",
    "100% wool sweater",
    "cat (cute) [tabby]",
    "abc123def456 part",
    "12:30 at noon 12:45 ",
    '""double"" quotes',
    "don&#39;t stop &quot;it&quot;",
    "new.york city,big apple",
    "a+b%20c",
    "an animated gif",
    "title : subtitle",
    "a (b) & c * d | e / f",
    "",
]


@pytest.mark.parametrize("caption", NASTY)
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # diffusers' own
def test_cleaning_equals_that_of_diffusers(caption: str) -> None:
    pytest.importorskip("ftfy")
    pytest.importorskip("bs4")
    from diffusers import IFPipeline

    assert clean_caption(caption) == IFPipeline._clean_caption(IFPipeline, caption)


@pytest.mark.parametrize(
    ("caption", "cleaned"),
    [
        ("<b>Bold</b> &amp; <i>Shy</i> cat", "bold shy cat"),
        ("IMG_20190203.jpg of a Cat, AB1234", "of a cat"),
        ("see https://example.com/a.jpg now", "see now"),  # diffusers leaves a lonely full stop
        ("100% wool", "100% wool"),
    ],
)
def test_what_is_no_description_is_removed(caption: str, cleaned: str) -> None:
    assert prepare_caption(caption, "deepfloyd") == cleaned


def test_captions_may_be_left_as_they_are_or_lowered() -> None:
    assert prepare_caption(" A <b> ", "as_is") == " A <b> "
    assert prepare_caption(" A <b> ", "lower") == "a <b>"
