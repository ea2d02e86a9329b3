"""A training run: its YAML file, its text encoder, and everything its trainer needs."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from cascade.conditioning import NoText, TextEncoderProtocol
from cascade.config.data import FORMAT_VERSION, TextConfig, TextReading, check_format
from cascade.config.stage import MeasuredRange, StageConfig
from cascade.config.training import TrainConfig
from cascade.data.sources import check_places
from cascade.errors import CascadeError
from cascade.files.paths import path_of
from cascade.files.tensors import load_weights
from cascade.models.conditioned import key_of
from cascade.settings import override, parse, read_yaml
from cascade.stage import Stage, build_stage
from cascade.storage.index import BUNDLED, find_stage
from cascade.storage.prior import with_prior
from cascade.storage.stage import load_stage, read_config, read_reading, read_weights, warn_of_other_reading
from cascade.text.cache import EmbeddingCache
from cascade.text.cached import CachedTextEncoder
from cascade.text.t5 import TextEncoder
from cascade.training.memory import check_run

if TYPE_CHECKING:
    from cascade.training.trainer import Trainer


logger = logging.getLogger("cascade.training")


def load_train_config(path: str | Path, assignments: Sequence[str] = ()) -> TrainConfig:
    """A training run's YAML file; its `stage` may be the name of a stage, such as bundled/base, for all its settings.

    Or a section with that name as `from`, next to settings that replace those of the named stage.

    assignments: `section.name=value`, which override it; `stage=MODEL/base` is applied before settings within a stage.

    Unless the file has settings in `text`, text is read as that stage's training did. A run with a checkpoint has both
    in its folder: the named stage need no longer exist.
    """
    path = path_of(path)
    settings = override(read_yaml(path), [text for text in assignments if text.partition("=")[0] == "stage"])
    assignments = [text for text in assignments if text.partition("=")[0] != "stage"]
    check_format(path, settings.get("format", FORMAT_VERSION))
    own: dict[str, Any] = {}
    if isinstance(settings.get("stage"), dict) and "from" in settings["stage"]:
        own = dict(settings["stage"])
        settings["stage"] = str(own.pop("from"))
    if isinstance(settings.get("stage"), str):
        begun, folder = _begun(override(settings | {"stage": {}}, assignments).get("output")), None
        try:
            folder = find_stage(settings["stage"])
            stage = read_config(folder).model_dump(mode="json")
        except CascadeError as error:
            if begun is None:
                raise CascadeError(f"{path}: stage: {error}") from None
            logger.warning("%s: stage: %s; using the run's own copy of its settings", path, error)
            stage = begun["stage"]
        settings = _with_reading(settings | {"stage": stage | own}, begun, folder)
    return parse(TrainConfig, override(settings, assignments), str(path))


def with_measured_range(config: TrainConfig) -> TrainConfig:
    """The settings with a stated range of values: that of the run's earlier part, or else measured over the data."""
    from cascade.data.survey import with_range

    if not isinstance(config.stage.range, MeasuredRange):
        return config
    begun = _begun(config.output)
    if begun is not None and isinstance(begun["stage"].get("range"), list):
        known = {**config.stage.model_dump(mode="json"), "range": begun["stage"]["range"]}
        return config.model_copy(update={"stage": parse(StageConfig, known, "stage")})
    return config.model_copy(update={"stage": with_range(config.stage, config.data)})


def _begun(output: object) -> dict[str, Any] | None:
    """The settings in the folder of a run that has a checkpoint; None for any other folder."""
    from cascade.training.state import checkpoints

    folder = path_of(str(output))
    if not checkpoints(folder):
        return None
    settings = read_yaml(folder / "config.yaml")
    return settings if isinstance(settings.get("stage"), dict) else None


def _with_reading(settings: dict[str, Any], begun: dict[str, Any] | None, folder: Path | None) -> dict[str, Any]:
    """The settings, with text read as in the earlier part of the run, or else as by the stage in `folder`."""
    text = settings.get("text", {})
    if not isinstance(text, dict):
        return settings  # `parse` will report the mistake
    if begun is not None:
        known = begun.get("text") or {}
    else:
        reading = None if folder is None else read_reading(folder)
        known = {} if reading is None else reading.model_dump(mode="json")
    return settings | {"text": {name: known[name] for name in TextReading.model_fields if name in known} | text}


def load_trainer(config: TrainConfig) -> Trainer:
    """A trainer with everything that a run needs, with fresh weights or those of `training.init_from`.

    A run with a checkpoint takes its weights from it: the initial weights need no longer exist.

    Raises CascadeError for a run that cannot reach its end on this machine.
    """
    from cascade.training.accelerator import (
        expected_processes,  # imports accelerate, which drawing does not need
        settled,
        shortage_as_error,
    )

    held_out = config.training.validation
    check_places(
        [*config.data.sources, *(held_out.sources if held_out else ())]
    )  # before a hub is asked for an encoder
    config = with_measured_range(settled(config))
    check_run(config, *expected_processes())
    config = with_prior(config, lambda: load_plain_text_encoder(config.text))
    with shortage_as_error("before the first step", "use a smaller stage.model, or FSDP over several GPUs"):
        return _load_trainer(config)


def _load_trainer(config: TrainConfig) -> Trainer:
    from cascade.training.state import checkpoints
    from cascade.training.trainer import Trainer

    reads = config.stage.model.reads_text
    text = load_text_encoder(config.text) if reads else NoText(config.stage.model.text_dim)
    if config.stage.model.reads_text and config.stage.model.text_dim != text.dim:
        raise CascadeError(
            f"stage.model.text_dim is {config.stage.model.text_dim}, but {config.text.encoder} gives"
            f" embeddings of width {text.dim}; set stage.model.text_dim={text.dim}"
        )
    stage = build_stage(config.stage, seed=config.training.seed)
    distill, start = config.training.distill, config.training.init_from
    teacher = None
    if distill is not None:
        folder = find_stage(distill.teacher)
        teacher = load_stage(folder)
        start = start or (distill.teacher if teacher.config.model == config.stage.model else None)
        warn_of_other_reading(folder, config.text.reading)
    if start is not None and not checkpoints(Path(config.output)):
        source = find_stage(start)
        tensors, origin = read_weights(source)
        load_weights(stage.network, {**_new_conditions(stage, source), **tensors}, origin)
        warn_of_other_reading(source, config.text.reading)
    return Trainer(config, stage, text, teacher)


def _new_conditions(stage: Stage, source: Path) -> dict[str, Tensor]:
    """The fresh weights of conditions that the stage in `source` does not read yet."""
    known = read_config(source).conditions
    new = tuple(f"conditions.{key_of(name)}." for name in stage.config.conditions if name not in known)
    return {name: weight for name, weight in stage.network.state_dict().items() if new and name.startswith(new)}


def load_text_encoder(config: TextConfig) -> TextEncoderProtocol:
    """The frozen encoder of a training run, behind its cache of embeddings if it has one.

    A cache made with the same settings is trusted: T5 is loaded, and compared with it, only for a missing caption.
    """
    if config.cache is None:
        return load_plain_text_encoder(config)
    if (Path(config.cache) / "index.json").exists():
        cache = EmbeddingCache.open(config.cache)
        if cache.settings == encoder_settings(config):
            return CachedTextEncoder(cache, lambda: load_plain_text_encoder(config))
    encoder = load_plain_text_encoder(config)
    return CachedTextEncoder(open_cache(config.cache, encoder), lambda: encoder)


def load_plain_text_encoder(config: TextConfig) -> TextEncoder:
    """The frozen encoder of a training run, without a cache."""
    source = text_encoder_source(config)
    dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16}[config.dtype]
    return TextEncoder.from_pretrained(source, **config.reading.model_dump(), dtype=dtype)


def text_encoder_source(config: TextConfig) -> str | Path:
    """Folder or hub id of the encoder of a training run."""
    return BUNDLED / "text_encoder" if config.encoder == "bundled" else config.encoder


def encoder_settings(config: TextConfig) -> dict[str, object]:
    """The settings that decide the encoder's output; `cascade encode` writes them into the cache."""
    as_before = {"null_text"} if config.null_text == "encoded" else set()  # older caches lack this setting
    return config.model_dump(mode="json", exclude={"cache"} | as_before)


def open_cache(folder: str | Path, encoder: TextEncoder) -> EmbeddingCache:
    """The embeddings of `encoder` in a folder, or a new cache there."""
    return EmbeddingCache(folder, encoder.fingerprint, encoder.dim)
