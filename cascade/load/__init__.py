"""From files to objects: a folder or hub id becomes a stage, a pipeline, a text encoder or a training run."""

from cascade.device import choose_device, choose_dtype
from cascade.load.index import BUNDLED, ModelIndex, find_model, find_stage, read_index
from cascade.load.pipeline import LoadOptions, assemble, load_encoder, load_pipeline
from cascade.load.reading import read_reading
from cascade.load.stage import load_stage, read_config, read_weights
from cascade.load.training import (
    encoder_settings,
    load_plain_text_encoder,
    load_text_encoder,
    load_train_config,
    load_trainer,
    open_cache,
    text_encoder_source,
)

__all__ = [
    "BUNDLED",
    "LoadOptions",
    "ModelIndex",
    "assemble",
    "choose_device",
    "choose_dtype",
    "encoder_settings",
    "find_model",
    "find_stage",
    "load_encoder",
    "load_pipeline",
    "load_plain_text_encoder",
    "load_stage",
    "load_text_encoder",
    "load_train_config",
    "load_trainer",
    "open_cache",
    "read_config",
    "read_index",
    "read_reading",
    "read_weights",
    "text_encoder_source",
]
