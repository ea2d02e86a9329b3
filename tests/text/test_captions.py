"""Captions are cleaned like DeepFloyd IF's, word for word as in diffusers where both apply; the default style."""

from __future__ import annotations

import pytest

from cascade.errors import CascadeError
from cascade.text.language import Styles, clean_caption, prepare_caption

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


STYLES = Styles(("noto style", "flat vector icon"), "noto style")


@pytest.mark.parametrize(
    ("prompt", "drawn"),
    [
        ("a cat", "a cat, noto style"),
        ("a cat, ", "a cat, noto style"),
        ("a cat, Noto Style", "a cat, Noto Style"),
        ("flat vector icon of a cat", "flat vector icon of a cat"),
        ("flat vector icons", "flat vector icons, noto style"),  # whole words only
        ("", ""),
        ("  ", "  "),
    ],
)
def test_the_default_style_is_added_to_prompts_without_style_words(prompt: str, drawn: str) -> None:
    assert STYLES.added(prompt) == drawn
    assert STYLES.added(drawn) == drawn
    assert STYLES.choose("none").added(prompt) == prompt
    assert Styles(STYLES.words).added(prompt) == prompt


def test_another_default_style_of_a_call_leaves_prompts_with_the_models_style_words_alone() -> None:
    blob = STYLES.choose(" blob style ")
    assert blob.added("a cat") == "a cat, blob style"
    assert blob.added("a cat, noto style") == "a cat, noto style"
    assert STYLES.choose(None) is STYLES


@pytest.mark.parametrize("wrong", ["", " ", 3, True])
def test_a_default_style_without_words_is_refused(wrong: object) -> None:
    with pytest.raises(CascadeError, match=r"default_style: .*; expected style words such as noto style, or none"):
        STYLES.choose(wrong)  # type: ignore[arg-type]
