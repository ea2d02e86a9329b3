"""A folder or hub id -> a pipeline; trained stages -> a pipeline."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import get_args

import torch

from cascade.config.data import Captions
from cascade.drawing.slots import StageSlot
from cascade.errors import CascadeError, quoted
from cascade.pipeline import CascadePipeline
from cascade.resources.number_format import settled_dtype
from cascade.stage import Stage
from cascade.storage.index import BUNDLED, find_stage, read_index
from cascade.storage.stage import (
    Adapter,
    AdapterLike,
    check_reading,
    fits,
    load_stage,
    read_adapters,
    read_config,
    shared_reading,
    slot_of,
)
from cascade.system.device import choose_device
from cascade.text.t5 import TextEncoder
from cascade.text.t5_files import text_weights

logger = logging.getLogger("cascade.load")


@dataclass(frozen=True)
class LoadOptions:
    """Arguments of `CascadePipeline.from_pretrained`."""

    super_resolution: str | Path | Sequence[str | Path] | None = None
    device: str | torch.device | None = None
    dtype: torch.dtype | str | None = None
    low_memory: bool = False
    captions: Captions | None = None
    text_8bit: bool = False
    adapters: Mapping[str, AdapterLike] | None = None


def load_pipeline(model: str | Path | None = None, options: LoadOptions | None = None) -> CascadePipeline:
    """See `CascadePipeline.from_pretrained`. Raises CascadeError naming the file that is missing or wrong."""
    options = options or LoadOptions()
    captions, low_memory, text_8bit = options.captions, options.low_memory, options.text_8bit
    super_resolution = options.super_resolution
    if captions is not None and captions not in get_args(Captions):
        raise CascadeError(f"captions: {quoted(captions)}; expected one of {', '.join(get_args(Captions))}")
    index = read_index(model)
    stage_folders = list(index.stages)
    if super_resolution is not None:
        others = [find_stage(source) for source in _several(super_resolution)]
        check_reading(index.reading, others)
        stage_folders = stage_folders[:1] + others
    target = choose_device(options.device)
    number_format = settled_dtype(options.dtype, target, map(read_config, stage_folders))
    text_format = torch.bfloat16 if index.halves_text and number_format != torch.float32 else torch.float32
    load_text = partial(
        TextEncoder.from_pretrained,
        index.text_encoder,
        max_length=index.max_text_length,
        padded=index.text_padded,
        captions=captions or index.captions,
        null_text=index.null_text,
        device=target,
        dtype=text_format,
        eight_bit=text_8bit,
        streamed=low_memory and not text_8bit and not fits(text_weights(index.text_encoder), text_format, target),
    )
    enlargers = None if super_resolution is not None else index.enlargers
    folders = list(dict.fromkeys([*stage_folders, *(enlargers or ())]))
    slots = {
        folder: slot_of(folder, target, number_format, low_memory, several)
        for folder, several in _with_adapters(folders, options.adapters or {})
    }
    # Other authors' weights, converted or not, have their own licence, which a user should read.
    level = logging.WARNING if any(slot.config.model.has_foreign_weights for slot in slots.values()) else logging.DEBUG
    logger.log(level, "%s: the weights' licence is %s", index.name, index.license)
    pipeline = CascadePipeline(
        load_text(),
        [slots[folder] for folder in stage_folders],
        name=index.name,
        license=index.license,
        enlargers=None if enlargers is None else [slots[folder] for folder in enlargers],
        reload_text_encoder=load_text if low_memory else None,
    )
    pipeline.device, pipeline.dtype, pipeline.styles = target, number_format, index.styles
    return pipeline


def with_adapters_scaled(
    pipeline: CascadePipeline, model: str | Path | None, adapters: Mapping[str, AdapterLike]
) -> Callable[[float], list[StageSlot]]:
    """A function of a factor: the stages of `pipeline`, with the scales of their adapters times this factor.

    Stages without adapters are the pipeline's own. Of the others, the one that was used last stays in memory.
    """
    found = read_adapters(adapters, [slot.config.name for slot in pipeline.slots])
    adapt = with_adapters(pipeline, model)

    def scaled(factor: float) -> list[StageSlot]:
        return adapt(
            {
                name: tuple(replace(one, scale=round(one.scale * factor, 9)) for one in several)
                for name, several in found.items()
            }
        )

    return scaled


def with_adapters(
    pipeline: CascadePipeline, model: str | Path | None
) -> Callable[[Mapping[str, tuple[Adapter, ...]]], list[StageSlot]]:
    """A function of adapters by the name of their stage: the stages of `pipeline` with these in place of their own.

    Stages without adapters are the pipeline's own. Of the others, the one that was used last stays in memory.
    """
    folders = read_index(model).stages
    newest = [_Newest() for _ in folders]

    def slot(place: int, several: tuple[Adapter, ...]) -> StageSlot:
        if not several:
            return pipeline.slots[place]
        scales = {one.digest: one.scale for one in several}
        load = partial(load_stage, folders[place], pipeline.device, pipeline.dtype, several)
        key = tuple(scales.items())
        return StageSlot(read_config(folders[place]), lambda: newest[place].load(key, load), adapters=scales)

    return lambda adapters: [
        slot(place, adapters.get(own.config.name, ())) for place, own in enumerate(pipeline.slots[: len(folders)])
    ]


class _Newest:
    """One stage in memory, released before another one is loaded."""

    def __init__(self) -> None:
        self._key: object = None
        self._stage: Stage | None = None

    def load(self, key: object, load: Callable[[], Stage]) -> Stage:
        if self._stage is None or key != self._key:
            self._stage = None
            self._stage, self._key = load(), key
        return self._stage


def assemble(
    text_encoder: str | Path,
    stages: Iterable[str | Path],
    *,
    name: str,
    license: str,
    max_length: int | None = None,
    adapters: Mapping[str, AdapterLike] | None = None,
) -> CascadePipeline:
    """A pipeline of a text encoder and trained stages; it reads texts as the stages' training did.

    Raises CascadeError when stages do not chain, or read text differently. max_length: maximum tokens of a prompt, if
    different from training. adapters: folders of low-rank adapters by the name of the stage that they are added to.
    """
    source = BUNDLED / "text_encoder" if str(text_encoder) == "bundled" else text_encoder
    folders = _with_adapters([find_stage(stage) for stage in stages], adapters or {})
    encoder = load_encoder(source, [folder for folder, _ in folders], max_length)
    loaded = [load_stage(folder, adapters=several) for folder, several in folders]
    return CascadePipeline(encoder, loaded, name=name, license=license)


def load_encoder(source: str | Path, stages: Iterable[Path], max_length: int | None = None) -> TextEncoder:
    """A text encoder that reads texts as the training of these stage folders did; see `assemble`."""
    return TextEncoder.from_pretrained(source, **shared_reading(stages, max_length).model_dump())


def _several(folders: str | Path | Sequence[str | Path]) -> Sequence[str | Path]:
    if isinstance(folders, (str, Path)):
        return [folders]
    if not isinstance(folders, Sequence):
        raise CascadeError(f"super_resolution: {quoted(folders)}; expected a folder, or several")
    return folders


def _with_adapters(
    folders: Sequence[Path], adapters: Mapping[str, AdapterLike]
) -> list[tuple[Path, tuple[Adapter, ...]]]:
    """Stage folders, each with its adapters. Raises CascadeError for an adapter of an unknown stage."""
    names = [read_config(folder).name for folder in folders] if adapters else [""] * len(folders)
    found = read_adapters(adapters, names)
    return [(folder, found.get(name, ())) for folder, name in zip(folders, names, strict=True)]
