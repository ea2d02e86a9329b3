"""The art suite: showing the true pictures reaches the ceiling, and showing training pictures is detected."""

from __future__ import annotations

import io
import random
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from cascade.data.scenes import draw, random_scene
from cascade.drawing.output import CascadeOutput
from cascade.errors import CascadeError
from cascade.evaluation.art import choose, measured_sizes, run, unmeasured
from cascade.evaluation.art_data import read_art
from cascade.evaluation.report import Report, Request, judge_sha256, write_report
from cascade.evaluation.tower import STYLES, load_tower
from cascade.pictures.images import to_pil

UNSEEN, TRAINING = 12, 20


def row(number: int, style: str, split: str) -> dict[str, object]:
    buffer = io.BytesIO()
    draw(random_scene(random.Random(number)), 64).save(buffer, "PNG")
    words, name = style.replace("_", " "), f"{split} thing {number}"
    return {
        "image": {"bytes": buffer.getvalue(), "path": None},
        "id": f"{style}-{number:x}",
        "caption": name,
        "captions": [name, f"{name}, {words} style", "keyword, other"],
        "style": style,
        "group": "Flags" if number % 10 == 9 else "Objects",
    }


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prepared files of 20 training, 6 validation and 6 test subjects; every tenth is a flag."""
    folder = tmp_path_factory.mktemp("data")
    for split, first, last in (("train", 0, 20), ("validation", 100, 106), ("test", 106, 112)):
        rows = [row(number, style, split) for number in range(first, last) for style in STYLES[:3]]
        pq.write_table(pa.Table.from_pylist(rows), folder / f"{split}-64.parquet")
    return folder


class Shower:
    """A pipeline that shows a given picture for each prompt."""

    def __init__(self, pictures: dict[str, Image.Image]) -> None:
        self.pictures = pictures
        config = type("Config", (), {"resolution": 64, "name": "base"})
        self.slots = [type("Slot", (), {"config": config})]

    def __call__(self, prompts: list[str], **_options: object) -> CascadeOutput:
        pictures = [self.pictures[prompt] for prompt in prompts]
        return CascadeOutput(pictures, {64: pictures}, [0] * len(prompts), prompts)


def measured(data: Path, *, copying: bool = False) -> Report:
    training, held_out = read_art(data, "train"), read_art(data, "validation", "test")
    unseen, seen = choose(training, held_out, 0, None)
    shown = {item.prompt: to_pil(held_out.pixels[item.true][None])[0] for item in unseen}
    shown |= {item.prompt: to_pil(training.pixels[item.true][None])[0] for item in seen}
    if copying:
        shown |= {item.prompt: to_pil(training.pixels[[index]])[0] for index, item in enumerate(unseen)}
    return run(Shower(shown), Request(data=data))  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def true_report(data: Path) -> Report:
    """The report of a pipeline that shows the true pictures."""
    return measured(data)


def test_true_pictures_reach_the_ceiling_of_every_figure(true_report: Report):
    figures = {figure.name: figure for figure in true_report.figures}
    for figure in figures.values():
        aside = "blurred" in figure.name or "true picture among" in figure.name  # of other pictures
        if figure.reference is not None and not aside:
            assert figure.value == pytest.approx(figure.reference), figure.name
    assert {"precision", "recall", "kernel distance", "sliced Wasserstein distance", "style obeyed"} <= figures.keys()
    assert figures["near-copies in pixels, unseen subjects"].value == 0
    assert figures["near-copies in pixels, training subjects"].value == 1


def test_a_size_without_true_pictures_is_not_drawn_and_a_size_that_no_stage_has_is_refused(data: Path):
    shower = Shower({})
    larger = type("Slot", (), {"config": type("Config", (), {"resolution": 256, "name": "sr256"})})
    shower.slots = [*shower.slots, larger]
    assert measured_sizes(shower, Request(data=data)) == [64]  # type: ignore[arg-type]
    assert "No true pictures of 256 px" in unmeasured(shower, Request(data=data))[0]  # type: ignore[arg-type]
    assert unmeasured(shower, Request(data=data, until=64)) == []  # type: ignore[arg-type]
    with pytest.raises(CascadeError, match="--until 128: no stage draws that size; choose from 64, 256"):
        measured_sizes(shower, Request(data=data, until=128))  # type: ignore[arg-type]


def test_pictures_of_the_training_split_are_near_copies(data: Path):
    figures = {figure.name: figure for figure in measured(data, copying=True).figures}
    for what in ("pixels", "features"):
        figure = figures[f"near-copies in {what}, unseen subjects"]
        assert figure.value == 1
        assert figure.reference is not None
        assert figure.reference < 1


def test_the_same_pictures_give_the_same_report_to_the_byte(data: Path, true_report: Report, tmp_path: Path):
    run_of = {"model": {"name": "shown", "sha256": "0" * 64}, "versions": {}, "seed": 0}
    for name, report in (("once", true_report), ("twice", measured(data))):
        write_report(report, run_of, tmp_path / name)
    for name in ("report.json", "report.md", "contact.png"):
        assert (tmp_path / "once" / name).read_bytes() == (tmp_path / "twice" / name).read_bytes()


@pytest.mark.slow
def test_the_report_names_its_judge_by_its_weights(data: Path, monkeypatch: pytest.MonkeyPatch):
    (bundled,) = measured(data).settings["judges_sha256"].values()
    other = load_tower()
    next(other.parameters()).data += 1
    monkeypatch.setattr("cascade.evaluation.art.load_tower", lambda: other)
    assert measured(data).settings["judges_sha256"] == {"tower": judge_sha256(other)}
    assert bundled != judge_sha256(other)


def test_a_subject_of_three_styles_is_asked_for_in_two_of_them(data: Path):
    unseen, _ = choose(read_art(data, "train"), read_art(data, "validation", "test"), 0, None)
    assert len({item.prompt for item in unseen}) == len(unseen) == 2 * (UNSEEN - 1)


def test_flags_are_left_out_and_every_other_unseen_subject_is_asked_for(data: Path):
    training, held_out = read_art(data, "train"), read_art(data, "validation", "test")
    unseen, seen = choose(training, held_out, 0, None)
    assert len({item.concept for item in unseen}) == UNSEEN - 1
    assert len({item.concept for item in seen}) == TRAINING - 2
    for item in unseen:
        assert held_out.concepts[item.true] == item.concept
        assert held_out.styles[item.true] == item.style
        assert item.prompt == f"{item.concept.name}, {item.style.replace('_', ' ')} style"
    assert choose(training, held_out, 0, None) == (unseen, seen)
    assert choose(training, held_out, 1, None)[0] != unseen
    assert [len(part) for part in choose(training, held_out, 0, 5)] == [3, 2]


def test_words_of_a_concept_hold_no_style(data: Path):
    (concept, *_) = read_art(data, "validation").distinct()
    assert concept.words == "validation thing 100, keyword, other"


def test_without_data_the_error_says_how_to_get_it(tmp_path: Path):
    with pytest.raises(CascadeError, match=r"--suite art: needs true pictures.*prepare_data\.py"):
        run(Shower({}), Request())  # type: ignore[arg-type]
    with pytest.raises(CascadeError, match=r"no train-64\*\.parquet;"):
        run(Shower({}), Request(data=tmp_path))  # type: ignore[arg-type]


def test_damaged_data_is_named(tmp_path: Path):
    path = tmp_path / "train-64.parquet"
    path.write_bytes(b"no parquet")
    with pytest.raises(CascadeError, match=r"train-64\.parquet: damaged, or not Parquet"):
        read_art(tmp_path, "train")
    bad = {**row(0, "noto", "train"), "image": {"bytes": b"no picture", "path": None}}
    pq.write_table(pa.Table.from_pylist([bad]), path)
    with pytest.raises(CascadeError, match=r"train-64\.parquet: noto-0: not a readable picture"):
        read_art(tmp_path, "train")
    pq.write_table(pa.table({"id": ["noto-0"]}), path)
    with pytest.raises(CascadeError, match="has no column caption"):
        read_art(tmp_path, "train")
