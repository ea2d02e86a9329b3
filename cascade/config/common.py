"""Types that several sections of the settings share: bounded numbers, names, the version of the files."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from cascade.files.paths import expanded

FORMAT_VERSION = 1
"""Version of every file written from these settings; `cascade.load` reads this version."""

AugSpread = Literal["std", "time"]
"""The quantity in which the noise on a smaller picture is uniform in training; see `training.step.aug_levels`."""
Fraction = Annotated[float, Field(ge=0, le=1)]


def _path(text: str) -> str:
    if not text:
        raise ValueError("is empty; name a file or folder")
    return expanded(text)


PathText = Annotated[str, AfterValidator(_path)]
"""A path, or the name of something on the hub: not empty; a leading `~` is the home folder."""
