"""True pictures by id and size, from prepared files and from the data set's own; and drawings that lie in a folder."""

from __future__ import annotations

import io
import json
from pathlib import Path

import measure_drawings
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from cascade.drawing.output import CascadeOutput
from cascade.errors import CascadeError
from cascade.evaluation import art_look
from cascade.evaluation.art_data import shelf
from cascade.evaluation.report import Request, draw_stages, prompt_seeds
from cascade.evaluation.tower import load_tower


def encoded(number: int, size: int) -> dict[str, object]:
    """A picture of its own: fine squares in two colours, whose area mean at half the size is exact."""
    pixels = torch.full((size, size, 3), 255, dtype=torch.uint8)
    pixels[size // 4 : size // 2, size // 4 : size // 4 * 3] = torch.tensor([number % 200, 40, 90], dtype=torch.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels.numpy()).save(buffer, "PNG")
    return {"bytes": buffer.getvalue(), "path": None}


def write(path: Path, style: str, numbers: range, size: int, stored: int | None = None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [
        {
            "image": encoded(number, size),
            "id": f"{style}-{number:x}",
            "style": style,
            "caption_styled": f"thing {number}, {style} style",
            **({"width": stored, "height": stored} if stored else {}),
        }
        for number in numbers
    ]
    pq.write_table(pa.Table.from_pylist(rows), path)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Prepared copies in one known style, originals of some of it, and two further styles at 64 px alone."""
    folder = tmp_path / "data"
    write(folder / "train-64-noto.parquet", "noto", range(12), 64)
    write(folder / "emoji" / "test.parquet", "noto", range(8, 16), 128, 128)
    for style in ("blob", "togo"):
        write(folder / "more" / f"train-{style}.parquet", style, range(10), 256, 256)
    return folder


def test_a_shelf_holds_every_picture_of_its_size_or_more_once(data: Path):
    assert set(shelf(data, 64).of("noto")) == {f"noto-{number:x}" for number in range(16)}
    assert set(shelf(data, 128).of("noto")) == {f"noto-{number:x}" for number in range(8, 16)}
    assert set(shelf(data, 256).entries) == {
        f"{style}-{number:x}" for style in ("blob", "togo") for number in range(10)
    }
    assert not shelf(data, 1024).entries
    assert shelf(data, 64).entries["noto-8"].path.name == "train-64-noto.parquet"  # prepared copies come first


def test_larger_pictures_come_as_their_area_mean(data: Path):
    (small,) = shelf(data, 64).pictures(["blob-3"])
    assert small.shape == (3, 64, 64)
    assert small[:, 20, 20].tolist() == [3, 40, 90]
    assert shelf(data, 64).pictures([]).shape == (0, 3, 64, 64)


def test_further_styles_are_asked_for_by_their_captions_and_judged_without_the_reader_of_styles(data: Path):
    asked = art_look.further(data, 4, 0)
    assert [one.style for one in asked] == ["blob"] * 4 + ["togo"] * 4
    assert asked[0].prompt == f"thing {int(asked[0].id.removeprefix('blob-'), 16)}, blob style"
    assert art_look.further(data, 4, 0) == asked != art_look.further(data, 4, 1)
    drawn = shelf(data, 256).pictures([one.id for one in asked])
    figures = {figure.name: figure for figure in art_look.figures(asked, drawn, data, load_tower(), 0, ", further")}
    for name in (
        "flat pixels at 256 px, further",
        "edge width at 256 px: togo",
        "patch distance, 64 px at 256 px: blob",
    ):
        assert figures[name].value == figures[name].reference, name
    assert not [name for name in figures if "style obeyed" in name]


def test_a_damaged_picture_is_named(data: Path):
    path = data / "train-64-noto.parquet"
    rows = pq.read_table(path).to_pylist()
    rows[2]["image"] = {"bytes": b"no picture", "path": None}
    pq.write_table(pa.Table.from_pylist(rows), path)
    with pytest.raises(CascadeError, match=r"train-64-noto\.parquet: noto-2: not a readable picture"):
        shelf(data, 64).pictures(["noto-2"])


class Counting:
    """A pipeline that paints each prompt's length and seed, and notes how far it was asked to go."""

    def __init__(self) -> None:
        self.calls: list[tuple[list[str], int]] = []

    def __call__(self, prompts: list[str], seed: list[int], until: int, **_options: object) -> CascadeOutput:
        self.calls.append((prompts, until))
        stages = {
            size: [
                Image.new("RGB", (size, size), (len(prompt), own % 256, size % 256))
                for prompt, own in zip(prompts, seed, strict=True)
            ]
            for size in (8, 16, 32)
            if size <= until
        }
        return CascadeOutput(stages[until], stages, list(seed), prompts)


def test_the_first_prompts_are_drawn_the_largest_and_all_in_order_with_the_seeds_of_draw():
    pipeline, prompts = Counting(), ["a", "bb", "ccc", "dddd", "eeeee"]
    drawn = draw_stages(pipeline, prompts, Request(seed=3), {8: 5, 16: 3, 32: 1})  # type: ignore[arg-type]
    assert pipeline.calls == [(["a"], 32), (["bb", "ccc"], 16), (["dddd", "eeeee"], 8)]
    seeds = prompt_seeds(prompts, 3)
    for size, count in ((8, 5), (16, 3), (32, 1)):
        colours = [picture.getpixel((0, 0)) for picture in drawn[size]]
        assert colours == [(index + 1, seeds[index] % 256, size) for index in range(count)]


def test_a_folder_of_drawings_is_measured_at_every_size_with_true_pictures(data: Path, tmp_path: Path):
    folder = tmp_path / "drawn"
    folder.mkdir()
    names, lines = [f"noto-{number:x}" for number in range(8, 14)], []
    for name in [*names, "unknown-1"]:
        known = name if name != "unknown-1" else names[0]
        for size in (64, 128):
            (pixels,) = shelf(data, size).pictures([known])
            Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(folder / f"{name}-{size}.png")
        stages = {"64": f"{name}-64.png", "128": f"{name}-128.png"}
        lines.append(json.dumps({"id": name, "file": f"{name}-128.png", "stages": stages}))
    (folder / "manifest.jsonl").write_text("\n".join(lines))
    figures = {figure.name: figure for figure in measure_drawings.measure_folder(folder, data, 0)}
    for name in ("flat pixels at 64 px", "flat pixels at 128 px", "edge width at 128 px"):
        assert figures[name].value == figures[name].reference
        assert figures[name].count == len(names)


def test_a_folder_without_a_manifest_or_without_known_ids_is_one_line(data: Path, tmp_path: Path):
    with pytest.raises(CascadeError, match=r"no manifest\.jsonl; draw with"):
        measure_drawings.measure_folder(tmp_path, data, 0)
    Image.new("RGB", (64, 64)).save(tmp_path / "one.png")
    (tmp_path / "manifest.jsonl").write_text(json.dumps({"id": "other", "file": "one.png"}))
    with pytest.raises(CascadeError, match="no drawing has the id of a true picture"):
        measure_drawings.measure_folder(tmp_path, data, 0)
