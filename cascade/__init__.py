"""A pixel-space text-to-image cascade: T5 text, a 64 px base diffusion model, two super-resolution stages.

from cascade import CascadePipeline
CascadePipeline.from_pretrained()("a red apple", seed=7).images[0].save("apple.png")
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cascade._version import __version__
    from cascade.batch.request import generate_files
    from cascade.conditioning import Conditioning, TextEmbeddings
    from cascade.config.stage import StageConfig
    from cascade.config.training import TrainConfig
    from cascade.drawing.output import CascadeOutput
    from cascade.errors import CascadeError, DownloadError, ShortageError, StorageError
    from cascade.pipeline import CascadePipeline
    from cascade.stage import Stage
    from cascade.storage.saving import Card
    from cascade.storage.training import load_train_config
    from cascade.text.t5 import TextEncoder

__all__ = [
    "Card",
    "CascadeError",
    "CascadeOutput",
    "CascadePipeline",
    "Conditioning",
    "DownloadError",
    "ShortageError",
    "Stage",
    "StageConfig",
    "StorageError",
    "TextEmbeddings",
    "TextEncoder",
    "TrainConfig",
    "__version__",
    "generate_files",
    "load_train_config",
]

_MODULES = {
    "__version__": "_version",
    "Card": "storage.saving",
    "CascadeError": "errors",
    "CascadeOutput": "drawing.output",
    "CascadePipeline": "pipeline",
    "Conditioning": "conditioning",
    "DownloadError": "errors",
    "ShortageError": "errors",
    "Stage": "stage",
    "StageConfig": "config.stage",
    "StorageError": "errors",
    "TextEmbeddings": "conditioning",
    "TextEncoder": "text.t5",
    "TrainConfig": "config.training",
    "generate_files": "batch.request",
    "load_train_config": "storage.training",
}


def __getattr__(name: str) -> Any:
    """Import a public name at its first use, so that `cascade --version` needs no torch."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
