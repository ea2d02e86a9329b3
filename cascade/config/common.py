"""What several sections of the settings share: numbers with bounds, names, the version of the files."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

FORMAT_VERSION = 1
"""Version of every file that is written from these settings; `cascade.load` reads this one."""

PositiveInt = Annotated[int, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
