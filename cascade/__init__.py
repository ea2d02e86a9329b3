"""A pixel-space text-to-image cascade: T5 text, a 64 px base diffusion model, two super-resolution stages.

from cascade import CascadePipeline
CascadePipeline.from_pretrained()("a red apple", seed=7).images[0].save("apple.png")
"""

from cascade._version import __version__
from cascade.conditioning import Conditioning
from cascade.config import StageConfig, TrainConfig
from cascade.errors import CascadeError
from cascade.load import load_train_config
from cascade.output import CascadeOutput
from cascade.pipeline import CascadePipeline
from cascade.stage import Stage
from cascade.text.embeddings import TextEmbeddings
from cascade.text.t5 import TextEncoder

__all__ = [
    "CascadeError",
    "CascadeOutput",
    "CascadePipeline",
    "Conditioning",
    "Stage",
    "StageConfig",
    "TextEmbeddings",
    "TextEncoder",
    "TrainConfig",
    "__version__",
    "load_train_config",
]
