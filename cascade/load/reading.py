"""How the training of a stage read its text, from its folder or its neighbours; agreement between stages."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from cascade import deepfloyd
from cascade.checkpoint import read_json, read_stage_reading
from cascade.config.data import TextConfig, TextReading
from cascade.errors import CascadeError
from cascade.load.index import reading_of_index
from cascade.load.stage import read_config
from cascade.settings import parse, read_yaml

logger = logging.getLogger("cascade.load")


def read_reading(folder: str | Path) -> TextReading | None:
    """How the stage's training read text. None: not recorded.

    Folders of earlier versions do not record it; then the run or the model that contains them does.
    """
    folder = Path(folder)
    if deepfloyd.is_diffusers(folder):
        return deepfloyd.READING
    run, model = folder.parent / "config.yaml", folder.parent / "cascade.json"
    found = read_stage_reading(folder)
    if found is None and folder.name == "stage" and run.is_file():
        return parse(TextConfig, read_yaml(run).get("text") or {}, f"{run}: text").reading
    if found is None and model.is_file():
        return reading_of_index(read_json(model), model)
    return found


def shared_reading(folders: Iterable[Path], max_length: int | None = None) -> TextReading:
    """How a cascade of these stages must read text: as the training of all of them did.

    max_length: the requested length; it may differ from theirs unless they read padding. Raises CascadeError when
    stages differ in a way that no cascade can reconcile.
    """
    stages = [_Reader.of(folder) for folder in folders]
    known = [stage for stage in stages if stage.reading]
    for other in known[1:]:
        _check_same(known[0], other, lengths=max_length is None)
    reading = known[0].reading if known else None
    for stage in stages:
        if stage.reads and stage.reading is None:
            reading = reading or stage.guessed()
            logger.warning("%s does not record how its text was read; assuming %s", stage.name, _as_text(reading))
    reading = reading or TextReading()
    if max_length is None or max_length == reading.max_length:
        return reading
    if reading.padded:
        raise CascadeError(
            f"max_length {max_length}: these stages read all {reading.max_length} tokens, including padding; leave"
            " --max-text-length out"
        )
    return reading.model_copy(update={"max_length": max_length})


def check_reading(model: TextReading, folders: Iterable[Path]) -> None:
    """Raises CascadeError for stages whose training read text differently from `model`, the cascade's reading.

    If only the length differs, and text is not padded, a warning suffices: only long prompts differ.
    """
    for stage in map(_Reader.of, folders):
        _check_same(_Reader("the model", reading=model), stage, lengths=False)
        _warn(stage, model)


def warn_of_other_reading(folder: Path, reading: TextReading) -> None:
    """Warn about weights that were trained on text read differently from `reading`."""
    _warn(_Reader.of(folder), reading)


@dataclass(frozen=True)
class _Reader:
    """A stage, and how its text was read. None: it reads no text, or nothing is recorded."""

    name: str
    reading: TextReading | None
    reads: bool = True
    pads: bool = False
    """Whether its network is of a kind that always reads padding."""

    @classmethod
    def of(cls, folder: Path) -> Self:
        model = read_config(folder).model
        reading = read_reading(folder) if model.reads_text else None
        return cls(f"stage {folder}", reading, model.reads_text, model.reads_padding)

    def guessed(self) -> TextReading:
        return deepfloyd.READING if self.pads else TextReading()


def _warn(stage: _Reader, now: TextReading) -> None:
    differing = _differing(stage.reading, now) if stage.reading else []
    if stage.reading and differing:
        before, after = _as_text(stage.reading, differing), _as_text(now, differing)
        logger.warning("the text of %s was read with %s; now it is read with %s", stage.name, before, after)


def _check_same(one: _Reader, other: _Reader, lengths: bool) -> None:
    """Raises CascadeError if the two differ. lengths: whether the length of unpadded text counts."""
    if one.reading is None or other.reading is None:
        return
    differing = _differing(one.reading, other.reading)
    if not lengths and not one.reading.padded and not other.reading.padded:
        differing = [name for name in differing if name != "max_length"]
    if not differing:
        return
    way_out = "train one of them with the other's `text` settings"
    if differing == ["max_length"] and not one.reading.padded:
        way_out = "choose the length with --max-text-length (max_length)"
    raise CascadeError(
        f"the text of {one.name} is read with {_as_text(one.reading, differing)}, that of {other.name} with"
        f" {_as_text(other.reading, differing)}; a cascade reads its text once, for all stages: {way_out}"
    )


def _differing(one: TextReading, other: TextReading) -> list[str]:
    return [name for name in TextReading.model_fields if getattr(one, name) != getattr(other, name)]


def _as_text(reading: TextReading, names: Iterable[str] = tuple(TextReading.model_fields)) -> str:
    values = reading.model_dump(mode="json")
    return ", ".join(f"{name}={str(values[name]).lower()}" for name in names)
