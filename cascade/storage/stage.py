"""A stage folder -> its settings, weights and adapters, the stage itself, and how its training read text."""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

import torch
from torch import Tensor

from cascade.config.data import TextConfig, TextReading
from cascade.config.stage import StageConfig, read_stage_config, read_stage_reading
from cascade.drawing.slots import StageSlot
from cascade.errors import CascadeError, quoted
from cascade.files.atomic import read_json
from cascade.files.paths import path_of
from cascade.files.tensors import load_tensors, load_weights, stored_bytes, stream
from cascade.files.text import open_regular
from cascade.models.convolution import Convolution
from cascade.settings import parse, read_yaml
from cascade.stage import Stage, build_stage
from cascade.storage import diffusers
from cascade.storage import diffusers as deepfloyd
from cascade.storage.index import reading_of_index
from cascade.system import device as machine

# --- adapters --------------------------------------------------------------------------------------------------------
# Low-rank adapters to add to stages: where they are, and how strongly each counts.

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
            with open_regular(path) as file:
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


# --- stage -----------------------------------------------------------------------------------------------------------
# A stage folder -> its settings, its weights, and the stage itself.


def read_config(folder: str | Path) -> StageConfig:
    """The settings of a stage folder: cascade's, or DeepFloyd IF's in diffusers' layout."""
    return deepfloyd.read_stage(folder) if deepfloyd.is_diffusers(folder) else read_stage_config(folder)


def read_weights(folder: str | Path) -> tuple[dict[str, Tensor], Path]:
    """The network's weights in a stage folder, and the file or folder that holds them."""
    folder = Path(folder)
    if deepfloyd.is_diffusers(folder):
        return deepfloyd.read_weights(folder), folder / "unet"
    path = folder / "model.safetensors"
    return load_tensors(path), path


def load_stage(
    folder: str | Path,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    adapters: Sequence[Adapter] = (),
) -> Stage:
    """A stage from its folder (stage.json and model.safetensors, or diffusers' layout), ready to draw.

    The network is built on the meta device, then filled, so that the weights exist once. adapters: low-rank adapters
    to add to them.
    """
    folder = path_of(folder)
    stage = build_stage(read_config(folder), device="meta")
    load_weights(stage.network, *read_weights(folder))
    for adapter in adapters:
        from cascade.training.weights import merge_adapter  # imports peft, an extra

        merge_adapter(stage.network, adapter.folder, adapter.scale)
    stage.network.eval().requires_grad_(False)
    return stage.to(device, dtype)


def slot_of(
    folder: Path, device: torch.device, dtype: torch.dtype, low_memory: bool, adapters: Sequence[Adapter]
) -> StageSlot:
    """The slot of a stage in a pipeline: loaded now, or (low_memory) for its turn."""
    if low_memory:
        slot = StageSlot(read_config(folder), lambda: _load_sparing(folder, device, dtype, adapters))
    else:
        slot = StageSlot.holding(load_stage(folder, device, dtype, adapters))
    return replace(slot, adapters={adapter.digest: adapter.scale for adapter in adapters})


def _load_sparing(folder: Path, device: torch.device, dtype: torch.dtype, adapters: Sequence[Adapter]) -> Stage:
    """Load without the transformed kernels that would be faster; stream from disk what does not fit.

    An adapter is added to weights in memory, so with an adapter nothing is streamed.
    """
    diffusers = deepfloyd.is_diffusers(folder)
    files = deepfloyd.weight_files(folder) if diffusers else [folder / "model.safetensors"]
    if not adapters and not fits(files, dtype, device):
        stage = build_stage(read_config(folder), device="meta")
        stage.network.eval().requires_grad_(False).to(dtype)
        stream(stage.network, files, device)
    else:
        stage = load_stage(folder, device, dtype, adapters)
    for module in stage.network.modules():
        if isinstance(module, Convolution):
            module.spare_memory = True
    return stage


def fits(files: Sequence[Path], dtype: torch.dtype, device: torch.device) -> bool:
    """Whether the weights leave a fifth of a device's free memory for the rest."""
    return stored_bytes(files, dtype) < 0.8 * machine.free_bytes(device)


# --- reading ---------------------------------------------------------------------------------------------------------
# How the training of a stage read its text, from its folder or its neighbours; agreement between stages.

logger = logging.getLogger("cascade.load")


def read_reading(folder: str | Path) -> TextReading | None:
    """How the stage's training read text. None: not recorded.

    Folders of earlier versions do not record it; then the run or the model that contains them does.
    """
    folder = Path(folder)
    if diffusers.is_diffusers(folder):
        return diffusers.READING
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
        return diffusers.READING if self.pads else TextReading()


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
