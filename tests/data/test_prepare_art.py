"""The command that makes the emoji data set: pictures, words, splits, from small trees laid out as the sources are."""

import io
import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import prepare_art
import prepare_data
import pyarrow.parquet as pq
import pytest
from art.captions import STYLES, caption_of, captions_of, noun_phrase
from art.sources import LISTS, find_drawings, left_out, read_lines
from click.testing import CliRunner, Result
from PIL import Image

from cascade.config import ParquetSource
from cascade.data.dataset import open_records

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
# The coffin is in our validation split; the green apple is left out; Noto's skull is, Twemoji's is not.
EMOJI_TEST = """\
# group: Smileys & Emotion
# subgroup: face-negative
2620 FE0F ; fully-qualified # E1.0 skull and crossbones
2620 ; unqualified # E1.0 skull and crossbones
# group: People & Body
# subgroup: hand-fingers-open
1F44B ; fully-qualified # E0.6 waving hand
1F44B 1F3FB ; fully-qualified # E1.0 waving hand: light skin tone
# subgroup: person
1F468 200D 1F9B0 ; fully-qualified # E11.0 man: red hair
# group: Food & Drink
# subgroup: food-fruit
1F34E ; fully-qualified # E0.6 red apple
1F34F ; fully-qualified # E0.6 green apple
# group: Objects
# subgroup: other-object
26B0 FE0F ; fully-qualified # E1.0 coffin
# group: Flags
# subgroup: country-flag
1F1EF 1F1F5 ; fully-qualified # E0.6 flag: Japan
"""
ANNOTATIONS = {
    "☠": {"default": ["bone", "skull and crossbones", "pirate’s"], "tts": ["skull and crossbones"]},
    "👋": {"default": ["hello", "wave"], "tts": ["waving hand"]},
    "🍎": {"default": ["fruit"], "tts": ["red apple"]},
    "🍏": {"default": ["fruit"], "tts": ["green apple"]},
    "⚰": {"default": ["death", "vampire"], "tts": ["coffin"]},
    "👨‍🦰": {"default": ["man"], "tts": ["man: red hair"]},
}
NAMES = {
    "2620": "Skull and crossbones",
    "1f44b": "Waving hand",
    "1f34e": "Red apple",
    "1f34f": "Green apple",
    "26b0": "Coffin",
}


def write(path: Path, content: str | bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)


def svg(width: int, height: int, color: str = "red") -> str:
    """A drawing that fills its box to the edge."""
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}">'
        f'<rect width="{width}" height="{height}" fill="{color}"/></svg>'
    )


def png() -> bytes:
    """A transparent picture with an opaque middle, as the 3D ones are."""
    image = Image.new("RGBA", (256, 256), (0, 0, 0, 0))
    image.paste((0, 0, 255, 255), (64, 64, 192, 192))
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def write_fluent(root: Path, by_codepoints: bool) -> None:
    for key, name in NAMES.items():
        # An emoji with skin tones has a folder for each.
        home = root / "assets" / name / ("Default" if key == "1f44b" else "")
        drawings = {"3D": png(), "Color": svg(32, 32), "Flat": svg(32, 32), "High Contrast": svg(32, 32, "black")}
        for folder, drawing in drawings.items():
            suffix = "png" if folder == "3D" else "svg"
            ending = folder.lower().replace(" ", "-")
            path = root / "assets" / f"{key}_{ending}.{suffix}" if by_codepoints else home / folder / f"x.{suffix}"
            write(path, drawing)
        if by_codepoints:
            write(root / "assets" / f"{chr(int(key, 16))}_flat.svg", svg(32, 32))
        else:
            write(root / "assets" / name / "metadata.json", json.dumps({"unicode": key}))
    write(root / "LICENSE", "MIT")


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The five sources, in small."""
    root = tmp_path_factory.mktemp("sources")
    for key in NAMES:
        write(root / "noto" / "svg" / f"emoji_u{key}.svg", svg(128, 128))
        write(root / "twemoji" / "assets" / "svg" / f"{key}.svg", svg(36, 36))
    write(root / "noto" / "svg" / "accordion.svg", "a working file without code points")
    write(root / "noto" / "svg" / "emoji_u1f44b_1f3fb.svg", svg(128, 128))
    write(root / "noto" / "third_party/region-flags/waved-svg/emoji_u1f1ef_1f1f5.svg", svg(100, 50))
    write(root / "noto" / "LICENSE", "Apache")
    write(root / "noto" / "third_party/region-flags/LICENSE", "public domain")
    write(root / "twemoji" / "LICENSE-GRAPHICS", "CC BY")
    write_fluent(root / "fluent", by_codepoints=False)
    write_fluent(root / "by_codepoints", by_codepoints=True)
    cldr = root / "cldr" / "cldr-json"
    write(
        cldr / "cldr-annotations-full/annotations/en/annotations.json",
        json.dumps({"annotations": {"annotations": ANNOTATIONS}}),
    )
    write(
        cldr / "cldr-annotations-derived-full/annotationsDerived/en/annotations.json",
        json.dumps({"annotationsDerived": {"annotations": {"🇯🇵": {"default": ["flag"], "tts": ["flag: Japan"]}}}}),
    )
    write(root / "cldr" / "LICENSE", "Unicode")
    write(root / "emoji-test.txt", EMOJI_TEST)
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
    assert complaint in result.output
    assert not (tmp_path / "out").exists()


def test_the_next_script_of_the_chain_reads_the_result(out: Path, tmp_path: Path) -> None:
    (tmp_path / "emoji").mkdir()
    shutil.copy(out / "emoji" / "train-noto.parquet", tmp_path / "emoji")
    result = CliRunner().invoke(prepare_data.main, ["--data", str(tmp_path), "--out", str(tmp_path)])
    assert result.exit_code == 0, result.output
    assert len(pq.read_table(tmp_path / "train-64-noto.parquet")) == 3
    assert len(pq.read_table(tmp_path / "tiles-1024-train-noto.parquet")) == 12


@pytest.mark.parametrize(
    ("name", "subgroup", "phrase"),
    [
        ("red apple", "food-fruit", "a red apple"),
        ("owl", "animal-bird", "an owl"),
        ("unicorn", "animal-mammal", "a unicorn"),
        ("one o'clock", "time", "a one o'clock"),
        ("hourglass done", "time", "an hourglass done"),
        ("grapes", "food-fruit", "grapes"),
        ("bus", "transport-ground", "a bus"),
        ("compass", "place-map", "a compass"),
        ("glasses", "clothing", "glasses"),
        ("soap", "household", "soap"),
        ("Leo", "zodiac", "Leo"),
        ("no entry", "warning", "no entry"),
        ("smiling face with sunglasses", "face-glasses", "a smiling face with sunglasses"),
        ("keycap: 5", "keycap", "keycap 5"),
        ("flag: Japan", "country-flag", "the flag of Japan"),
        ("Statue of Liberty", "place-building", "the Statue of Liberty"),
        ("woman: beard", "person", "a woman with a beard"),
        ("person: blond hair", "person", "a person with blond hair"),
        ("family: man, woman, boy", "family", "a family of a man, a woman and a boy"),
        ("kiss: woman, man", "family", "a kiss between a woman and a man"),
        ("couple with heart: man, man", "family", "a couple with a heart, a man and a man"),
        ("woman walking: facing right", "person-activity", "a woman walking, facing right"),
    ],
)
def test_a_name_becomes_the_words_that_people_would_say(name: str, subgroup: str, phrase: str) -> None:
    assert noun_phrase(caption_of(name), subgroup) == phrase


def test_captions_follow_the_templates() -> None:
    def first(values: Any) -> Any:
        return values[0]

    rng = random.Random(0)
    rng.choice = first  # type: ignore[method-assign]
    rng.sample = lambda words, count: words[:count]  # type: ignore[method-assign]
    assert captions_of("owl", "animal-bird", ["bird", "wise", "night", "hoot", "eye"], STYLES["twemoji"], rng) == [
        "owl",
        "owl, twemoji style",
        "owl, simple flat sticker",
        "a twemoji of an owl",
        "a simple flat sticker of an owl",
        "a twemoji of an owl on a white background",
        "an owl in twemoji style",
        "owl, bird, wise, twemoji style",
        "bird, wise, night, hoot",
        "bird, wise, night, twemoji style",
    ]
    assert len(captions_of("owl", "animal-bird", ["bird"], STYLES["twemoji"], rng)) == 7


def test_the_lists_hold_what_the_documents_say(sized: Callable[[str], int]) -> None:
    assert (sized("validation"), sized("test")) == (35, 51)
    held_out = {points for _, points, *_ in read_lines(LISTS / "splits.txt")}
    assert len(held_out) == 86
    whole = {points for points, *styles in read_lines(LISTS / "left_out.txt") if not styles}
    assert not held_out & whole


@pytest.fixture
def sized() -> Callable[[str], int]:
    lines = list(read_lines(LISTS / "splits.txt"))
    return lambda split: sum(line[0] == split for line in lines)
