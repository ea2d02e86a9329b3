"""Captions as views have them: templates, a trigger, tags that move."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path

import pytest
from PIL import Image

from cascade.config.data import DataConfig, FolderSource, WordingConfig
from cascade.config.stage import StageConfig
from cascade.data.loader import Views, captions_of
from cascade.data.records import caption_of_name, worded, wordings
from cascade.errors import CascadeError
from cascade.settings import parse

STAGE = StageConfig(name="base", resolution=16)


def test_without_changes_a_caption_stays_and_no_random_number_is_drawn() -> None:
    rng = random.Random(0)
    state = rng.getstate()
    assert worded("a cat, sitting", WordingConfig(), rng) == "a cat, sitting"
    assert rng.getstate() == state


def test_shuffled_tags_are_all_there_and_the_first_ones_stay_in_place() -> None:
    wording = WordingConfig(shuffle_tags=True, keep_tags=2)
    seen = {worded("a, b, c, d, e", wording, random.Random(seed)) for seed in range(200)}
    assert {tuple(sorted(one.split(", "))) for one in seen} == {("a", "b", "c", "d", "e")}
    assert {tuple(one.split(", ")[:2]) for one in seen} == {("a", "b")}
    assert len(seen) == 6  # every order of c, d, e


def test_each_tag_is_left_out_at_the_given_rate_and_kept_ones_never() -> None:
    wording = WordingConfig(tag_dropout=0.3, keep_tags=1)
    counts = Counter(tag for seed in range(2000) for tag in worded("a, b, c", wording, random.Random(seed)).split(", "))
    assert counts["a"] == 2000
    for tag in ("b", "c"):
        assert counts[tag] / 2000 == pytest.approx(0.7, abs=0.04)  # four standard deviations


def test_a_caption_never_becomes_empty() -> None:
    assert worded("a", WordingConfig(tag_dropout=1.0, keep_tags=0), random.Random(0)) == "a"


def test_templates_and_the_trigger_surround_the_caption_and_all_wordings_are_listed() -> None:
    wording = WordingConfig(templates=("a photo of {}", "{}, drawn"), trigger="zblorp")
    listed = set(wordings("a cat", wording))
    assert listed == {"zblorp, a photo of a cat", "zblorp, a cat, drawn"}
    assert {worded("a cat", wording, random.Random(seed)) for seed in range(20)} == listed


@pytest.mark.parametrize(
    ("path", "part", "expected"),
    [
        ("x/red-apple_03.png", "file", "red apple"),
        ("x/a cat (2).jpg", "file", "a cat"),
        ("tall_trees/IMG_1.png", "folder", "tall trees"),
        ("x/123.png", "file", ""),
    ],
)
def test_a_name_becomes_words_without_its_number(path: str, part: str, expected: str) -> None:
    assert caption_of_name(Path(path), part) == expected


def pictures(folder: Path, count: int) -> Path:
    folder.mkdir()
    for number in range(count):
        Image.new("RGB", (16, 16)).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(folder.name)
    return folder


def test_repeats_show_each_picture_equally_often_whatever_the_sizes_of_the_sources(tmp_path: Path) -> None:
    sources = tuple(
        FolderSource(path=str(pictures(tmp_path / name, count)), repeats=repeats)
        for name, count, repeats in (("few", 2, 3.0), ("many", 6, 1.0))
    )
    views = Views(DataConfig(sources=sources, caption_dropout=0.0), STAGE, 0)
    assert Counter(views[number].caption for number in range(1000)) == {"few": 500, "many": 500}  # 2 x 3 and 6 x 1


def test_repeats_of_some_sources_and_weights_of_others_are_refused() -> None:
    data = {"sources": [{"kind": "folder", "path": "a", "repeats": 2.0}, {"kind": "scenes"}]}
    with pytest.raises(CascadeError, match="repeats needs to be set for every source or for none"):
        parse(DataConfig, data, "data")


def test_a_template_without_a_place_for_the_caption_is_refused() -> None:
    with pytest.raises(CascadeError, match="templates"):
        parse(WordingConfig, {"templates": ["a photo"]}, "wording")


def test_encoding_beforehand_lists_every_wording(tmp_path: Path) -> None:
    wording = WordingConfig(templates=("a {}", "the {}"))
    source = FolderSource(path=str(pictures(tmp_path / "cat", 1)), wording=wording)
    assert sorted(captions_of([source])) == ["a cat", "the cat"]
