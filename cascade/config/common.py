"""What several sections of the settings share: numbers with bounds, names, the version of the files."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

FORMAT_VERSION = 1
"""Version of every file that is written from these settings; `cascade.load` reads this one."""

AugSpread = Literal["std", "time"]
"""In what the noise on a smaller picture is uniform in training; see `training.step.aug_levels`."""
PositiveInt = Annotated[int, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
