"""Small versions of the emoji data set's public sources: a few drawings and words in the repositories' layout."""

import io
import json
from pathlib import Path

from PIL import Image

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


def write_sources(root: Path) -> None:
    """The five sources below root; `by_codepoints` is Fluent in its other layout."""
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
