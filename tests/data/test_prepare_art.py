"""The command that makes the emoji data set: pictures, words, splits, from small trees with the sources' layout."""

import io
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import prepare_art
import prepare_data
import pyarrow.parquet as pq
import pytest
from art.captions import STYLES
from art.sources import LISTS, find_drawings, left_out, read_lines
from click.testing import CliRunner, Result
from PIL import Image
from tiny_art import write, write_sources

from cascade.config.data import ParquetSource
from cascade.data.sources import open_records

COLUMNS = [
    *(
        "image",
        "id",
        "caption",
        "caption_styled",
        "captions",
        "style",
        "source",
        "name",
        "keywords",
        "group",
        "subgroup",
    ),
    *("codepoints", "skin_tone_support", "width", "height", "lossless", "credit", "split"),
]


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("sources")
    write_sources(root)
    return root


def run(sources: Path, out: Path, **other: Path) -> Result:
    folders = {name: other.get(name, sources / name) for name in ("noto", "twemoji", "fluent", "cldr")}
    options = [word for name, folder in folders.items() for word in (f"--{name}", str(folder))]
    emoji_test = str(other.get("emoji_test", sources / "emoji-test.txt"))
    return CliRunner().invoke(
        prepare_art.main, [*options, "--emoji-test", emoji_test, "--out", str(out), "--workers", "1"]
    )


@pytest.fixture(scope="module")
def out(sources: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("art")
    result = run(sources, folder)
    assert result.exit_code == 0, result.output
    return folder


def rows_of(out: Path) -> dict[str, dict[str, Any]]:
    """Every row of a data set, by id."""
    return {row["id"]: row for path in (out / "emoji").glob("*.parquet") for row in pq.read_table(path).to_pylist()}


def opened(row: dict[str, Any]) -> Image.Image:
    return Image.open(io.BytesIO(row["image"]["bytes"]))


def inked_box(row: dict[str, Any]) -> tuple[int, int, int, int]:
    """Left, top, right, bottom of what is not white; the half grey leaves out the noise of lossy encodings."""
    inked = np.asarray(opened(row).convert("RGB")).min(axis=2) < 128
    rows, columns = np.flatnonzero(inked.any(axis=1)), np.flatnonzero(inked.any(axis=0))
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def test_every_picture_has_the_columns_that_the_documents_list(out: Path) -> None:
    for path in (out / "emoji").glob("*.parquet"):
        assert pq.read_schema(path).names == COLUMNS


def test_our_own_reader_opens_the_result(out: Path) -> None:
    source = ParquetSource(files=(str(out / "emoji" / "train-noto.parquet"),), caption_column="caption")
    records = open_records(source)
    assert {records[index].captions for index in range(3)} == {("red apple",), ("waving hand",), ("flag of Japan",)}


def test_each_style_is_drawn_at_its_size_in_the_middle_of_white(out: Path) -> None:
    rows = rows_of(out)
    assert inked_box(rows["noto-1f34e"]) == (32, 32, 992, 992)
    assert inked_box(rows["twemoji-1f34e"]) == (64, 64, 960, 960)
    assert inked_box(rows["fluent_flat-1f34e"]) == (0, 0, 1024, 1024)
    assert inked_box(rows["fluent_3d-1f34e"]) == (64, 64, 192, 192)
    # A drawing that is not square keeps its shape.
    assert inked_box(rows["noto-1f1ef-1f1f5"]) == (32, 272, 992, 752)


def test_pictures_are_encoded_as_stated(out: Path) -> None:
    rows = rows_of(out)
    expected = dict.fromkeys(STYLES, ("WEBP", 1024, True))
    expected |= {"fluent_color": ("WEBP", 1024, False), "fluent_3d": ("JPEG", 256, False)}
    for style, (encoding, size, lossless) in expected.items():
        row = rows[f"{style}-1f44b"]
        image = opened(row)
        assert (image.format, image.mode, image.size, row["width"], row["height"], row["lossless"]) == (
            (encoding, "RGB", (size, size), size, size, lossless)
        ), style
    corner = opened(rows["noto-1f44b"]).getpixel((0, 0))
    middle = opened(rows["noto-1f44b"]).getpixel((512, 512))
    assert (corner, middle) == ((255, 255, 255), (255, 0, 0))


def test_the_set_holds_each_wanted_picture_once_and_no_other(out: Path) -> None:
    wanted = {f"{style}-{key}" for style in STYLES for key in ("1f34e", "1f44b", "26b0")}
    skull = {f"{style}-2620" for style in STYLES if ("2620", style) not in left_out()}
    assert "twemoji-2620" in skull
    assert "noto-2620" not in skull
    assert set(rows_of(out)) == wanted | skull | {"noto-1f1ef-1f1f5"}


def test_held_out_concepts_are_in_their_split_in_every_style(out: Path) -> None:
    for row in rows_of(out).values():
        assert row["split"] == ("validation" if row["codepoints"] == "26b0" else "train")
    assert len(pq.read_table(out / "emoji" / "validation.parquet")) == len(STYLES)


def test_words_come_from_unicode_and_its_annotations(out: Path) -> None:
    rows = rows_of(out)
    skull = rows["twemoji-2620"]
    assert skull["keywords"] == ["bone", "pirate's"]  # the name itself is none, and quotes are straight
    assert (skull["group"], skull["subgroup"]) == ("Smileys & Emotion", "face-negative")
    assert rows["noto-1f44b"]["skin_tone_support"] is True
    assert skull["skin_tone_support"] is False
    assert rows["noto-1f1ef-1f1f5"]["name"] == "flag: Japan"
    assert rows["fluent_3d-1f34e"]["caption_styled"] == "red apple, fluent 3d style"
    assert rows["fluent_3d-1f34e"]["source"] == "fluent"


def test_captions_of_held_out_concepts_stay_out_of_the_vocabulary_but_for_names_and_keywords(out: Path) -> None:
    lines = (out / "captions.txt").read_text(encoding="utf-8").splitlines()
    assert len(lines) == len(set(lines))
    assert {"a noto emoji of a red apple", "green apple", "death, vampire"} <= set(lines)
    assert [line for line in lines if "coffin" in line] == ["coffin"]


def test_both_layouts_of_fluent_give_the_same_drawings(sources: Path) -> None:
    found = [
        find_drawings(sources / "noto", sources / "twemoji", sources / fluent) for fluent in ("fluent", "by_codepoints")
    ]
    contents = [{place: path.read_bytes() for place, path in drawings.items()} for drawings in found]
    assert contents[0] == contents[1]
    assert ("1f44b", "fluent_mono") in contents[0]


def test_a_finished_file_is_kept_and_a_lost_one_comes_back_the_same(out: Path, sources: Path, tmp_path: Path) -> None:
    again = tmp_path / "again"
    shutil.copytree(out, again)
    lost = again / "emoji" / "train-noto.parquet"
    before = lost.read_bytes()
    lost.unlink()
    result = run(sources, again)
    assert result.output.count("already there") == 6
    assert lost.read_bytes() == before


def test_licences_and_credits_lie_beside_the_data(out: Path) -> None:
    names = {path.name for path in (out / "LICENSES").iterdir()}
    assert names == {
        "ATTRIBUTION.txt",
        "Unicode-3.0.txt",
        "fluent-emoji-MIT.txt",
        "noto-emoji-Apache-2.0.txt",
        "noto-flags.txt",
        "twemoji-CC-BY-4.0.txt",
    }
    text = (out / "LICENSES" / "ATTRIBUTION.txt").read_text(encoding="utf-8")
    assert all(owner in text for owner in ("Google", "Twitter", "Microsoft", "Unicode"))


def test_what_is_missing_is_named_and_the_rest_is_there(sources: Path, tmp_path: Path) -> None:
    broken = tmp_path / "noto"
    shutil.copytree(sources / "noto", broken)
    write(broken / "svg" / "emoji_u1f34e.svg", "<svg>torn")
    (broken / "LICENSE").unlink()
    apple = tmp_path / "emoji-test.txt"
    write(apple, "# group: Food & Drink\n# subgroup: food-fruit\n1F34E ; fully-qualified # E0.6 red apple\n")
    result = run(sources, tmp_path / "out", noto=broken, emoji_test=apple)
    assert result.exit_code == 1
    assert f"missing: {broken / 'svg' / 'emoji_u1f34e.svg'}: " in result.output
    assert "missing: LICENSES/noto-emoji-Apache-2.0.txt" in result.output
    assert set(rows_of(tmp_path / "out")) == {f"{style}-1f34e" for style in STYLES if style != "noto"}


@pytest.mark.parametrize(
    ("source", "complaint"),
    [("cldr", "annotations.json"), ("twemoji", "no drawing in style twemoji"), ("emoji_test", "fully-qualified")],
)
def test_a_folder_that_is_not_the_source_is_refused_in_one_line(
    sources: Path, tmp_path: Path, source: str, complaint: str
) -> None:
    wrong = tmp_path / "wrong"
    if source == "emoji_test":
        write(wrong, "nothing of the kind\n")
    else:
        wrong.mkdir()
    result = run(sources, tmp_path / "out", **{source: wrong})
    assert result.exit_code == 2
    assert len(result.output.splitlines()) == 1
    assert complaint in result.output
    assert not (tmp_path / "out").exists()


def test_a_file_of_annotations_that_is_none_is_refused_in_one_line(sources: Path, tmp_path: Path) -> None:
    torn = tmp_path / "cldr"
    write(torn / "cldr-annotations-full/annotations/en/annotations.json", "{}")
    result = run(sources, tmp_path / "out", cldr=torn)
    assert (result.exit_code, len(result.output.splitlines())) == (2, 1)
    assert "no annotations.annotations in it" in result.output


def test_the_next_script_of_the_chain_reads_the_result(out: Path, tmp_path: Path) -> None:
    (tmp_path / "emoji").mkdir()
    shutil.copy(out / "emoji" / "train-noto.parquet", tmp_path / "emoji")
    result = CliRunner().invoke(prepare_data.main, ["--data", str(tmp_path), "--out", str(tmp_path)])
    assert result.exit_code == 0, result.output
    assert len(pq.read_table(tmp_path / "train-64-noto.parquet")) == 3
    assert len(pq.read_table(tmp_path / "tiles-1024-train-noto.parquet")) == 12


def test_the_lists_hold_what_the_documents_say() -> None:
    splits = {points: split for split, points, *_ in read_lines(LISTS / "splits.txt")}
    assert Counter(splits.values()) == {"validation": 35, "test": 51}
    left = [(points, styles) for points, *styles in read_lines(LISTS / "left_out.txt")]
    whole = {points for points, styles in left if not styles}
    assert (len(whole), len(left)) == (140, 140 + 202)
    assert not whole & set(splits)
