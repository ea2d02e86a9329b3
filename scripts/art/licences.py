"""Authors and licences of the sources, written next to the data, which may only be passed on with them."""

from __future__ import annotations

import shutil
from pathlib import Path

ATTRIBUTION = """\
noto pictures: googlefonts/noto-emoji. Copyright 2013 Google, Inc. Drawings of svg/ under the Apache License 2.0; the
flags of third_party/region-flags are in the public domain or otherwise exempt from copyright.
Changes: rasterised from SVG at 960 px on a white background of 1024 px.

twemoji pictures: jdecked/twemoji. Twemoji graphics copyright 2020 Twitter, Inc and other contributors, licensed under
CC BY 4.0: https://creativecommons.org/licenses/by/4.0/
Changes: rasterised from SVG at 896 px on a white background of 1024 px.

fluent_* pictures: microsoft/fluentui-emoji. Copyright (c) Microsoft Corporation. MIT License.
Changes: rasterised from SVG at 1024 px on a white background; the 3D pictures encoded again as JPEG.

Names, keywords, groups: Unicode CLDR and Unicode emoji data. Copyright 1991-2025 Unicode, Inc. Unicode License v3.
The captions were written by program from those names and keywords.

Flags, brands and people's likenesses may carry rights of their own.
"""
# File name next to the data, and the places of the text in each source (the first existing one is used).
TEXTS: dict[str, dict[str, tuple[str, ...]]] = {
    "noto": {
        "noto-emoji-Apache-2.0.txt": ("svg/LICENSE", "LICENSE"),
        "noto-flags.txt": ("third_party/region-flags/LICENSE",),
    },
    "twemoji": {"twemoji-CC-BY-4.0.txt": ("LICENSE-GRAPHICS", "LICENSE-GRAPHICS.txt")},
    "fluent": {"fluent-emoji-MIT.txt": ("LICENSE", "LICENSE.md")},
    "cldr": {"Unicode-3.0.txt": ("LICENSE", "cldr-json/cldr-annotations-full/LICENSE")},
}


def write_licences(sources: dict[str, Path], out: Path) -> list[str]:
    """Write LICENSES/ with ATTRIBUTION.txt and the sources' texts; returns the texts that no source folder holds."""
    folder = out / "LICENSES"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "ATTRIBUTION.txt").write_text(ATTRIBUTION, encoding="utf-8")
    missing = []
    for source, texts in TEXTS.items():
        for name, places in texts.items():
            text = next((sources[source] / place for place in places if (sources[source] / place).is_file()), None)
            if text is None:
                missing.append(f"LICENSES/{name} ({source}: no {' and no '.join(places)})")
            else:
                shutil.copyfile(text, folder / name)
    return missing
