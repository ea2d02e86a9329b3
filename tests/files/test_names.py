"""File names that are valid on every operating system."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from cascade.files.paths import alike, portable

DEVICES = ("con", "prn", "aux", "nul", "com1", "lpt9")


@given(st.text(max_size=40))
def test_any_text_becomes_a_name_that_every_system_takes(text: str) -> None:
    name = portable(text)
    assert name
    assert not set(name) & set('<>:"/\\|?*')
    assert min(name) >= " "
    assert not name.endswith((".", " "))
    assert name.partition(".")[0].lower() not in DEVICES
    assert portable(name) == name


def test_a_name_that_is_taken_everywhere_stays() -> None:
    for name in ("a photo", "été (1)", "写真", "console", "v1.2"):
        assert portable(name) == name


def test_what_a_system_does_not_take_is_replaced() -> None:
    cases = {"12:30": "12_30", "what?": "what_", "AUX": "_AUX", "nul.old": "_nul.old", "end.": "end", "...": "_"}
    assert {name: portable(name) for name in cases} == cases


def test_names_that_differ_in_case_or_in_how_accents_are_coded_are_alike() -> None:
    assert alike("Photo.PNG") == alike("photo.png")
    assert alike("caf\u00e9") == alike("CAFE\u0301")
    assert alike("photo") != alike("photos")
