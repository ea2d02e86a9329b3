"""A training run: its YAML file, its text encoder, and everything its trainer needs."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from cascade.build import build_stage
from cascade.checkpoint import check_format, load_weights
from cascade.config import FORMAT_VERSION, TextConfig, TrainConfig
from cascade.errors import CascadeError
from cascade.load.index import BUNDLED, find_stage
from cascade.load.stage import read_config, read_weights
from cascade.preflight import check_run
from cascade.settings import override, parse, read_yaml
from cascade.text.cache import EmbeddingCache
from cascade.text.cached import CachedTextEncoder
from cascade.text.embeddings import TextEncoderProtocol
from cascade.text.t5 import TextEncoder

if TYPE_CHECKING:
    from cascade.training.trainer import Trainer

logger = logging.getLogger("cascade.training")


def load_train_config(path: str | Path, assignments: Sequence[str] = ()) -> TrainConfig:
    """A training run's YAML file, in which `stage` may name a stage, such as bundled/base, for all of its settings.

    A run with a checkpoint keeps them in its folder: the stage that was named need no longer exist.
    """
    settings = read_yaml(path)
    check_format(path, settings.get("format", FORMAT_VERSION))
    if isinstance(settings.get("stage"), str):
        try:
            stage = read_config(find_stage(settings["stage"])).model_dump(mode="json")
        except CascadeError as error:
            begun = _stage_of_run(override(settings | {"stage": {}}, assignments).get("output"))
            if begun is None:
                raise CascadeError(f"{path}: stage: {error}") from None
            logger.warning("%s: stage: %s; the run's own settings of it are used", path, error)
            stage = begun
        settings = settings | {"stage": stage}
    return parse(TrainConfig, override(settings, assignments), str(path))


def _stage_of_run(output: object) -> dict[str, Any] | None:
    """The stage's settings in the folder of a run that has a checkpoint; None for any other folder."""
    from cascade.training.state import checkpoints

    folder = Path(str(output))
    if not checkpoints(folder):
        return None
    stage = read_yaml(folder / "config.yaml").get("stage")
    return stage if isinstance(stage, dict) else None


def load_trainer(config: TrainConfig) -> Trainer:
    """Everything that a training run needs, with fresh weights or those of `training.init_from`.

    A run with a checkpoint has its weights there: what it began from need no longer exist.

    Raises CascadeError for a run that cannot reach its end on this machine.
    """
    from cascade.training.accelerator import expected_processes  # accelerate, which drawing does not need
    from cascade.training.guards import shortage_told

    check_run(config, *expected_processes())
    with shortage_told("before the first step", "use a smaller stage.model, or FSDP over several GPUs"):
        return _load_trainer(config)


def _load_trainer(config: TrainConfig) -> Trainer:
    from cascade.training.state import checkpoints
    from cascade.training.trainer import Trainer

    text = load_text_encoder(config.text)
    if config.stage.model.reads_text and config.stage.model.text_dim != text.dim:
        raise CascadeError(
            f"stage.model.text_dim is {config.stage.model.text_dim}, but {config.text.encoder} gives"
            f" embeddings of width {text.dim}; set stage.model.text_dim={text.dim}"
        )
    stage = build_stage(config.stage, seed=config.training.seed)
    if config.training.init_from is not None and not checkpoints(Path(config.output)):
        load_weights(stage.network, *read_weights(find_stage(config.training.init_from)))
    return Trainer(config, stage, text)


def load_text_encoder(config: TextConfig) -> TextEncoderProtocol:
    """The frozen encoder of a training run, behind its cache of embeddings if it has one.

    A cache that the same settings made is trusted: T5 is loaded, and compared with it, only for a missing caption.
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
    return TextEncoder.from_pretrained(
        source, max_length=config.max_length, padded=config.padded, captions=config.captions, dtype=dtype
    )


def text_encoder_source(config: TextConfig) -> str | Path:
    """Folder or hub id of the encoder of a training run."""
    return BUNDLED / "text_encoder" if config.encoder == "bundled" else config.encoder


def encoder_settings(config: TextConfig) -> dict[str, object]:
    """The settings that decide what the encoder gives; `cascade encode` writes them into the cache."""
    return config.model_dump(mode="json", exclude={"cache"})


def open_cache(folder: str | Path, encoder: TextEncoder) -> EmbeddingCache:
    """The embeddings of `encoder` in a folder, or a new cache there."""
    return EmbeddingCache(folder, encoder.fingerprint, encoder.dim)
