"""A recipe: everything that decides a picture's bytes, apart from the model and the machine that draw it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any, Literal, Self

from pydantic import Field

from cascade.config.sampling import SamplingConfig, with_sampler_section
from cascade.settings import Settings, parse

_SIZE = ("height", "width")
_GROUPED = (*_SIZE, "stages")
"""Fields that JSON groups in a section `settings`, together with the machine's settings."""


LONG_PROMPTS = ("cut", "chunk")
"""What happens to a prompt beyond the encoder's limit."""


class Region(Settings):
    """A part of the picture with its own prompt."""

    prompt: str
    """Description of this part."""
    box: tuple[float, float, float, float] | None = None
    """Left, top, right and bottom edge, as shares of the picture's width and height."""
    mask: str = ""
    """Instead of a box, SHA-256 of a mask; white is the region."""


class Recipe(Settings):
    """Everything that decides a picture: two pictures of one model with equal recipes are equal.

    A manifest's line, the metadata inside a picture, the name of a half-drawn picture and the comparison at a restart
    are all made from it. A new ingredient is a new field here; its default is what pictures without it were drawn with.
    """

    prompt: str
    """Description of the picture."""
    negative_prompt: str
    """Text that replaces the null text in guidance; empty: the null text."""
    seed: int
    """The prompt's seed; all noise follows from it, the number and the stage."""
    number: int
    """Number among the pictures of the prompt, from 0."""
    height: int
    """Height of the picture, in pixels."""
    width: int
    """Width of the picture, in pixels."""
    stages: dict[str, SamplingConfig]
    """Sampling settings of each stage, by name, in order."""
    source: str = ""
    """SHA-256 of the picture that the first stage enlarges; empty for a base stage, which starts from noise."""
    image: str = ""
    """SHA-256 of the picture to change; see `cascade.drawing.edit`."""
    mask: str = ""
    """SHA-256 of the mask of its redrawn part."""
    strength: dict[str, float] = Field(default={})
    """By stage, how much noise is added to the picture to start from; 1 for a stage that is not listed."""
    resampling: int = 1
    """Repetitions of each step where a mask keeps a part; see `sample_repaint`."""
    known: Literal["noised", "clean"] = "noised"
    """How the network sees pixels outside a mask: at the noise level of each step, or clean, as DeepFloyd IF's
    inpainting pipelines in diffusers show them."""
    variation: float = 0.0
    """How far each stage's initial noise lies on the way to that of `variation_seed`, in [0, 1]."""
    variation_seed: int = 0
    """Not used if `variation` is 0."""
    variation_noise: Literal["start", "all"] = "start"
    """Whether `variation` moves the initial noise alone, or all: that on smaller pictures and of each step too."""
    language: bool = False
    """Whether the prompts are in the prompt language; see `cascade.text.language`."""
    long_prompts: Literal["cut", "chunk"] = "cut"
    """A prompt beyond the encoder's limit is cut there, or read in windows whose embeddings are joined."""
    regions: tuple[Region, ...] = ()
    """Parts of the picture with their own prompts; a later one lies above."""

    conditions: dict[str, str | float | None] = Field(default={})
    """Conditions other than text by name: labels and numbers, the SHA-256 of vectors and pictures; null for none."""
    adapters: dict[str, dict[str, float]] = Field(default={})
    """By stage, the scale of each low-rank adapter, which is named by 16 digits of the SHA-256 of its weights."""

    def to_json(self) -> dict[str, Any]:
        """Plain values without those at their default, so that the metadata of older pictures stays the same."""
        values = self.model_dump(mode="json")
        for name, field in type(self).model_fields.items():
            if not field.is_required() and getattr(self, name) == field.default:
                del values[name]
        grouped = {name: values.pop(name) for name in _GROUPED}
        return {**values, "settings": grouped}

    @classmethod
    def from_json(cls, data: Mapping[str, Any], origin: str) -> Self:
        """The recipe in a manifest's line, or another mapping with the entries of `to_json`; other keys are ignored.

        origin: file, for messages. Raises CascadeError with one line per value that is missing or wrong.
        """
        return parse(cls, cls._flat(data), origin)

    @classmethod
    def digest_of(cls, data: Mapping[str, Any]) -> str:
        """`digest` of the recipe in `data`, without checking its values. Raises KeyError, TypeError."""
        flat = cls._flat(data)
        for name, field in cls.model_fields.items():
            if field.is_required():
                flat[name]
        return hashlib.sha256(json.dumps(flat, sort_keys=True).encode()).hexdigest()[:32]

    def digest(self) -> str:
        """32 hexadecimal digits; different recipes have different ones."""
        return self.digest_of(self.to_json())

    @classmethod
    def _flat(cls, data: Mapping[str, Any]) -> dict[str, Any]:
        """The recipe's fields in `data`, including those in its section `settings`."""
        settings = data.get("settings")
        both = {**data, **(settings if isinstance(settings, Mapping) else {})}
        flat = {name: both[name] for name in cls.model_fields if name in both}
        if isinstance(flat.get("stages"), Mapping):  # may be of an older version: converted to the current form
            flat["stages"] = {
                name: with_sampler_section(values) if isinstance(values, Mapping) else values
                for name, values in flat["stages"].items()
            }
        return flat
