"""Low-rank adapters to add to stages: where they are, and how strongly each counts."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from cascade.errors import CascadeError
from cascade.files.paths import path_of
from cascade.quoting import quoted

WEIGHTS = "adapter_model.safetensors"
AdapterLike = str | Path | Sequence[str | Path]
"""`FOLDER`, `FOLDER:SCALE`, or several of them."""


@dataclass(frozen=True)
class Adapter:
    """An adapter's folder, and the factor on its difference: 1 as trained, 0 nothing, negative the opposite."""

    folder: Path
    scale: float = 1.0

    @property
    def digest(self) -> str:
        """16 hexadecimal digits of its weights' SHA-256. Raises CascadeError if there are none."""
        path = self.folder / WEIGHTS
        try:
            with path.open("rb") as file:
                return hashlib.file_digest(file, "sha256").hexdigest()[:16]
        except OSError:
            raise CascadeError(f"{self.folder}: no adapter here; give a folder with adapter_config.json") from None


def read_adapter(text: str | Path) -> Adapter:
    """`FOLDER`, `FOLDER/adapter_model.safetensors` or a training run, with `:SCALE` at its end or not."""
    place, colon, scale = str(text).rpartition(":")
    factor = _number(scale) if colon else None
    path = path_of(str(text) if factor is None else place)
    if path.name == WEIGHTS:
        path = path.parent
    if (path / "config.yaml").is_file():
        path = path / "adapter"
    return Adapter(path, 1.0 if factor is None else factor)


def _number(text: str) -> float | None:
    """A finite number; None for other text, such as the rest of a Windows path."""
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def read_adapters(adapters: Mapping[str, AdapterLike], stages: Sequence[str]) -> dict[str, tuple[Adapter, ...]]:
    """The adapters of each stage by name. Raises CascadeError for an adapter of an unknown stage."""
    for name in adapters:
        if name not in stages:
            raise CascadeError(f"adapters: {quoted(name)} is not a stage of this model; it has {', '.join(stages)}")
    found = {}
    for name, several in adapters.items():
        listed = [several] if isinstance(several, str | Path) else several
        found[name] = tuple(map(read_adapter, listed))
    return found


def adapters_for(options: Sequence[str], stages: Sequence[str]) -> dict[str, list[str]]:
    """Options `[STAGE=]FOLDER[:SCALE]` by stage; the first stage, which draws the subject, where none is named."""
    found: dict[str, list[str]] = {}
    for option in options:
        stage, equals, rest = option.partition("=")
        named = bool(equals) and stage in stages
        found.setdefault(stage if named else stages[0], []).append(rest if named else option)
    return found
