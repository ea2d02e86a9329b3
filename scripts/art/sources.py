"""Layout of the public sources: the concepts, their Unicode annotations, and their drawings."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import click

from art.captions import STRAIGHT_QUOTES, STYLES, caption_of

SKIN_TONES = frozenset(f"1f3f{digit}" for digit in "bcdef")
HAIR = frozenset(("1f9b0", "1f9b1", "1f9b2", "1f9b3"))
LISTS = Path(__file__).parent
FLUENT_FOLDERS = {"Flat": "fluent_flat", "Color": "fluent_color", "3D": "fluent_3d", "High Contrast": "fluent_mono"}
CLDR_FILES = {
    "annotations": "cldr-annotations-full/annotations/en/annotations.json",
    "annotationsDerived": "cldr-annotations-derived-full/annotationsDerived/en/annotations.json",
}


class SourceError(click.ClickException):
    """A source without a file of its published layout: one line for the user, exit status 2."""

    exit_code = 2


@dataclass(frozen=True)
class Annotation:
    """CLDR's annotation of an emoji: its short name, and its keywords in CLDR's order."""

    name: str
    keywords: tuple[str, ...]


@dataclass(frozen=True)
class Concept:
    """One emoji, in any style."""

    codepoints: str
    name: str
    keywords: tuple[str, ...]
    group: str
    subgroup: str
    skin_tone_support: bool
    split: str

    @property
    def caption(self) -> str:
        return caption_of(self.name)


def key_of(codepoints: str, separator: str) -> str:
    """A concept's key: hex code points without leading zeros, joined by `-`, without U+FE0F."""
    points = (f"{int(point, 16):x}" for point in codepoints.split(separator))
    return "-".join(point for point in points if point != "fe0f")


def key_in_name(stem: str) -> str | None:
    """The key in a file's name; None for the working files that the folders also contain."""
    return key_of(stem, "-") if re.fullmatch(r"[0-9a-f]+(-[0-9a-f]+)*", stem) else None


def read_annotations(cldr: Path) -> dict[str, Annotation]:
    """Annotations by key from a checkout of unicode-org/cldr-json; the name itself is no keyword."""
    found = {}
    for root, name in CLDR_FILES.items():
        path = next((folder / name for folder in (cldr / "cldr-json", cldr) if (folder / name).is_file()), None)
        if path is None:
            raise SourceError(f"{cldr}: no cldr-json/{name}; give a checkout of unicode-org/cldr-json")
        for glyph, entry in _annotations_in(path, root).items():
            texts = [text.translate(STRAIGHT_QUOTES) for text in (*entry.get("tts", ()), *entry.get("default", ()))]
            if "tts" in entry:
                key = key_of("-".join(f"{ord(letter):x}" for letter in glyph), "-")
                found[key] = Annotation(texts[0], tuple(word for word in texts[1:] if word != texts[0]))
    return found


def _annotations_in(path: Path, root: str) -> dict[str, dict[str, list[str]]]:
    try:
        entries: dict[str, dict[str, list[str]]] = json.loads(path.read_text(encoding="utf-8"))[root]["annotations"]
    except (ValueError, KeyError):
        raise SourceError(f"{path}: no {root}.annotations in it; give a checkout of unicode-org/cldr-json") from None
    return entries


def read_lines(path: Path) -> Iterator[list[str]]:
    """The words of each line of one of our lists; `#` begins a comment."""
    for line in path.read_text(encoding="utf-8").splitlines():
        if line and not line.startswith("#"):
            yield line.split()


def left_out() -> set[tuple[str, str]]:
    """(code points, style) of pictures that are in the sources and not in the data set."""
    return {(points, style) for points, *styles in read_lines(LISTS / "left_out.txt") for style in styles or STYLES}


def read_concepts(emoji_test: Path, annotations: dict[str, Annotation]) -> list[Concept]:
    """The emoji of Unicode's emoji-test.txt that CLDR names, in its order; without variants in skin tone or hair."""
    splits = {points: split for split, points, *_ in read_lines(LISTS / "splits.txt")}
    places: dict[str, tuple[str, str]] = {}
    toned = set()
    heading = {"group": "", "subgroup": ""}
    for line in emoji_test.read_text(encoding="utf-8").splitlines():
        title, colon, value = line.removeprefix("# ").partition(": ")
        if line.startswith("#") and colon and title in heading:
            heading[title] = value.strip()
        points, semicolon, status = line.partition(";")
        if not semicolon or not status.strip().startswith("fully-qualified"):
            continue
        parts = key_of(points.strip(), " ").split("-")
        if SKIN_TONES.intersection(parts):
            toned.add("-".join(part for part in parts if part not in SKIN_TONES))
        elif not HAIR.intersection(parts):
            places["-".join(parts)] = (heading["group"], heading["subgroup"])
    if not places:
        raise SourceError(f"{emoji_test}: no line with `; fully-qualified`; give Unicode's emoji-test.txt")
    return [
        Concept(
            key, annotations[key].name, annotations[key].keywords, *place, key in toned, splits.get(key, "train")
        )
        for key, place in places.items()
        if key in annotations
    ]  # fmt: skip


def find_drawings(noto: Path, twemoji: Path, fluent: Path) -> dict[tuple[str, str], Path]:
    """(code points, style) -> file, for every drawing of the three sources."""
    found = {("noto", key): path for key, path in _noto(noto)}
    found |= {("twemoji", key): path for key, path in _twemoji(twemoji)}
    found |= {(style, key): path for style, key, path in _fluent(fluent)}
    for style in STYLES:
        if not any(drawn == style for drawn, _ in found):
            raise SourceError(
                f"no drawing in style {style}; does the folder follow the layout that docs/data.md shows?"
            )
    return {(key, style): path for (style, key), path in found.items()}


def _noto(root: Path) -> Iterator[tuple[str, Path]]:
    # Waved flags last: where both folders draw one, the waved one is in the data set.
    for folder in ("svg", "third_party/region-flags/waved-svg"):
        for path in sorted((root / folder).glob("emoji_u*.svg")):
            if key := key_in_name(path.stem.removeprefix("emoji_u").replace("_", "-")):
                yield key, path


def _twemoji(root: Path) -> Iterator[tuple[str, Path]]:
    for path in sorted((root / "assets" / "svg").glob("*.svg")):
        if key := key_in_name(path.stem):
            yield key, path


def _fluent(root: Path) -> Iterator[tuple[str, str, Path]]:
    """Microsoft's own layout, a folder an emoji with metadata.json, or the one by code points: 1f44b_flat.svg."""
    assets = root / "assets"
    for metadata in sorted(assets.glob("*/metadata.json")):
        key = key_of(json.loads(metadata.read_text(encoding="utf-8"))["unicode"], " ")
        for folder, style in FLUENT_FOLDERS.items():
            files = sorted([*metadata.parent.glob(f"{folder}/*.*"), *metadata.parent.glob(f"Default/{folder}/*.*")])
            if files:
                yield style, key, files[0]
    by_ending = {folder.lower().replace(" ", "-"): style for folder, style in FLUENT_FOLDERS.items()}
    for path in sorted(assets.glob("*_*.*")):
        points, _, ending = path.stem.partition("_")
        # Every drawing is there twice: under its code points, and under the emoji itself.
        if ending in by_ending and (named := key_in_name(points)):
            yield by_ending[ending], named, path
