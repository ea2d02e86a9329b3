"""A recipe: everything that decides the bytes of a picture, apart from the model and the machine that draw it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any, Self

from pydantic import Field

from cascade.config.samplers import with_sampler_section
from cascade.config.sampling import SamplingConfig
from cascade.settings import Settings, parse

_SIZE = ("height", "width")
_GROUPED = (*_SIZE, "stages")
"""Fields that JSON holds in a section of their own, `settings`, where the machine's settings join them."""


class Recipe(Settings):
    """Everything that decides a picture: two pictures of one model with equal recipes are equal.

    The line of a manifest, the text inside a picture, the name of a half-drawn picture and the comparison at a restart
    are all made from it, so a new ingredient is a new field here, with the default that pictures without it have.
    """

    prompt: str
    """What the picture shows."""
    negative_prompt: str
    """What takes the null text's place in guidance; empty: the null text."""
    seed: int
    """Of the prompt; all noise follows from it, the number and the stage."""
    number: int
    """Among the pictures of the prompt, from 0."""
    height: int
    """Of the picture, in pixels."""
    width: int
    """Of the picture, in pixels."""
    stages: dict[str, SamplingConfig]
    """How each stage draws, by name, in order."""
    source: str = ""
    """SHA-256 of the picture that the first stage begins with, where it is not a base stage that begins with noise."""
    image: str = ""
    """SHA-256 of the picture that is changed; see `cascade.drawing.edit`."""
    mask: str = ""
    """SHA-256 of the mask of what is drawn anew in it."""
    strength: dict[str, float] = Field(default={})
    """By stage, how much noise the picture is given there to start from; 1 where a stage is missing."""
    resampling: int = 1
    """How often each step is taken where a mask keeps a part; see `sample_repaint`."""
    variation: float = 0.0
    """How far the noise that each stage starts from lies on the way to that of `variation_seed`, in [0, 1]."""
    variation_seed: int = 0
    """Counts for nothing where `variation` is 0."""

    def to_json(self) -> dict[str, Any]:
        """Plain values; ingredients at their default are left out, so that older pictures keep their text."""
        values = self.model_dump(mode="json")
        for name, field in type(self).model_fields.items():
            if not field.is_required() and getattr(self, name) == field.default:
                del values[name]
        grouped = {name: values.pop(name) for name in _GROUPED}
        return {**values, "settings": grouped}

    @classmethod
    def from_json(cls, data: Mapping[str, Any], origin: str) -> Self:
        """The recipe in a line of a manifest, or in whatever else holds `to_json`; other keys are ignored.

        origin: file, for messages. Raises CascadeError with a line for each value that is missing or wrong.
        """
        return parse(cls, cls._flat(data), origin)

    @classmethod
    def digest_of(cls, data: Mapping[str, Any]) -> str:
        """`digest` of the recipe that `data` holds, without a check of its values. Raises KeyError, TypeError."""
        flat = cls._flat(data)
        for name, field in cls.model_fields.items():
            if field.is_required():
                flat[name]
        return hashlib.sha256(json.dumps(flat, sort_keys=True).encode()).hexdigest()[:32]

    def digest(self) -> str:
        """32 hexadecimal digits that differ where recipes differ."""
        return self.digest_of(self.to_json())

    @classmethod
    def _flat(cls, data: Mapping[str, Any]) -> dict[str, Any]:
        """Our fields of `data`, those of its section `settings` among them."""
        settings = data.get("settings")
        both = {**data, **(settings if isinstance(settings, Mapping) else {})}
        flat = {name: both[name] for name in cls.model_fields if name in both}
        if isinstance(flat.get("stages"), Mapping):  # of any version, in today's form
            flat["stages"] = {
                name: with_sampler_section(values) if isinstance(values, Mapping) else values
                for name, values in flat["stages"].items()
            }
        return flat
