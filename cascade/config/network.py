"""The networks that a stage can have; each has its settings in the same file."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Discriminator, Tag

from cascade.models.if_unet import IFUNetConfig
from cascade.models.transformer import TransformerConfig
from cascade.models.unet import UNetConfig


def _kind_of_model(value: Any) -> Any:
    """Read a model without `kind` as the U-Net, because older files have no `kind`."""
    return value.get("kind", "unet") if isinstance(value, dict) else getattr(value, "kind", "unet")


ModelConfig = Annotated[
    Annotated[UNetConfig, Tag("unet")]
    | Annotated[IFUNetConfig, Tag("if_unet")]
    | Annotated[TransformerConfig, Tag("transformer")],
    Discriminator(_kind_of_model),
]
