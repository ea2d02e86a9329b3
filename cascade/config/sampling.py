"""Settings for drawing: sampler, steps, guidance, thresholding; and the presets that change them."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from itertools import pairwise
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self, TypeAlias, Union, get_args, get_type_hints

from pydantic import (
    Discriminator,
    Field,
    SerializerFunctionWrapHandler,
    Tag,
    create_model,
    model_serializer,
    model_validator,
)

from cascade.diffusion.samplers import SAMPLERS, Option, Sampler
from cascade.diffusion.schedules import NamedSteps, Spacing
from cascade.settings import ROUNDS, SAMPLING_STEPS, Settings

# --- samplers --------------------------------------------------------------------------------------------------------
# The settings of samplers: one section each, made from the parameters of functions in `cascade.diffusion.samplers`.

DEFAULT_SAMPLER = "ddim"


class SamplerConfig(Settings):
    """A sampler by its name, `kind`, and its own settings. Written as the name alone if they are the defaults."""

    kind: str

    @property
    def own(self) -> dict[str, Any]:
        """The sampler's own settings, by the names of its function's parameters."""
        return {name: getattr(self, name) for name in type(self).model_fields if name != "kind"}

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle by the sampler's name, because the section's class is in no module."""
        return _section_of, (self.kind, self.own)

    @model_validator(mode="before")
    @classmethod
    def _named(cls, value: Any) -> Any:
        return {"kind": value} if isinstance(value, str) else value

    @model_serializer(mode="wrap")
    def _shortest(self, write: SerializerFunctionWrapHandler) -> dict[str, Any] | str:
        return self.kind if self == type(self)(kind=self.kind) else write(self)


def section(kind: str, sampler: Sampler) -> type[SamplerConfig]:
    """The section of a sampler: one setting for each keyword-only parameter of its function."""
    hints = get_type_hints(sampler, include_extras=True)
    parameters = inspect.signature(sampler).parameters.values()
    own = {each.name: (hints[each.name], each.default) for each in parameters if each.kind is each.KEYWORD_ONLY}
    title = inspect.getdoc(sampler) or ""
    return create_model(
        f"SamplerConfig_{kind}",
        __base__=SamplerConfig,
        __doc__=" ".join(title.partition("\n\n")[0].split()),
        __module__=__name__,
        kind=(Literal[kind], kind),
        **{name: _setting(hint, default) for name, (hint, default) in own.items()},  # type: ignore[call-overload]
    )


def _setting(hint: Any, default: Any) -> tuple[Any, Any]:
    """A parameter's type without its `Option`, and its default with the `Option`'s meaning and bounds."""
    plain, option = get_args(hint)
    assert isinstance(option, Option), f"{hint} has no Option that describes it"
    return plain, Field(default, description=option.meaning, ge=option.least, le=option.greatest)


SECTIONS: Mapping[str, type[SamplerConfig]] = {kind: section(kind, sampler) for kind, sampler in SAMPLERS.items()}
"""The sections of all samplers, by name."""


def _section_of(kind: str, own: Mapping[str, Any]) -> SamplerConfig:
    return SECTIONS[kind](kind=kind, **own)


def _kind_of(value: Any) -> str | None:
    """The name of a sampler: the value itself, or the `kind` of a section, None if it has none."""
    if isinstance(value, dict):
        return value.get("kind")
    return str(getattr(value, "kind", value))


if TYPE_CHECKING:
    AnySampler: TypeAlias = SamplerConfig
else:
    AnySampler = Annotated[
        Union[tuple(Annotated[each, Tag(kind)] for kind, each in SECTIONS.items())],  # noqa: UP007
        Discriminator(_kind_of),
    ]

_FORMERLY_FLAT = {"eta": "ddim", "variance": "ddpm"}
"""Settings next to `sampler` in old files, before samplers had sections, and the sampler that each belongs to."""


def with_sampler_section(values: Mapping[str, Any]) -> dict[str, Any]:
    """Plain sampling settings of any version in the current form, with each sampler setting in its section.

    Settings of a sampler that is not in use are left out.
    """
    kind = values.get("sampler", DEFAULT_SAMPLER)
    flat = {name: value for name, value in values.items() if name in _FORMERLY_FLAT}
    if not flat or not isinstance(kind, str):
        return dict(values)
    own = {name: value for name, value in flat.items() if _FORMERLY_FLAT[name] == kind}
    changed = {name: value for name, value in own.items() if SECTIONS[kind].model_fields[name].default != value}
    rest = {name: value for name, value in values.items() if name not in flat}
    return {**rest, "sampler": {"kind": kind, **changed} if changed else kind}


def complete_sampler(asked: Any, own: SamplerConfig) -> Any:
    """A caller's sampler as plain data; a name alone means `own` if that is the same sampler.

    own: the stage's sampler, with its settings.
    """
    return own.model_dump(mode="json") if asked == own.kind else asked


# --- sampling --------------------------------------------------------------------------------------------------------

StepCount = Annotated[int, Field(gt=0), SAMPLING_STEPS.validator]


class ProjectionConfig(Settings):
    """Adaptive projected guidance (Sadat et al. 2024), which avoids the burnt colours of strong guidance."""

    parallel: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Factor on the part of the update along the guided picture, which saturates colours; 1 keeps it."""
    momentum: Annotated[float, Field(gt=-1, lt=1)] = 0.0
    """Weight of earlier updates; negative: each step corrects the one before."""
    radius: Annotated[float, Field(gt=0)] | None = None
    """Largest root mean square of the update, before the weight. None: no limit."""


class SamplingConfig(Settings):
    """Settings for drawing, which the caller may override."""

    sampler: AnySampler = SECTIONS[DEFAULT_SAMPLER](kind=DEFAULT_SAMPLER)
    """A name, or a section with the sampler's own settings: {kind: ddim, eta: 0.5}. `ddpm` is algorithm 18.2; the
    others reach the same quality in fewer steps."""
    steps: StepCount = 50
    """Number of sampling steps (Heun calls the network twice in each but the last)."""
    spacing: Spacing = "t"
    """Steps are spread evenly in the schedule's time or in log SNR; `leading` and `trailing`: evenly over the steps of
    a discrete schedule, including its first or its last."""
    timesteps: tuple[Annotated[int, Field(ge=0)], ...] | NamedSteps | None = None
    """Discrete schedules: the list of steps, numbered from 0, high noise first, or the name of one of DeepFloyd IF's
    lists; replaces `steps` and `spacing`."""
    guidance: Annotated[float, Field(ge=0)] = 1.0
    """Weight of classifier-free guidance, 1 = none."""
    guidance_of: dict[str, Annotated[float, Field(ge=0)]] = Field(default_factory=dict)
    """Weights of single conditions, `text` among them; the others act together, with the weight `guidance` (Brooks et
    al. 2023, eq. 3, in the order of the stage's conditions, text last). Empty: all act together."""
    guidance_interval: tuple[float, float] | None = None
    """Log SNR range in which guidance acts (Kynkaanniemi et al. 2024). None: everywhere."""
    guidance_rescale: Annotated[float, Field(ge=0, le=1)] = 0.0
    """How far guidance's increase of contrast is undone, picture by picture (Lin et al. 2023)."""
    guidance_schedule: tuple[tuple[float, float], ...] | None = None
    """Points (log SNR, factor on guidance - 1), with straight lines in between. None: the factor is 1."""
    projection: ProjectionConfig | None = None
    """Adaptive projected guidance. None: off."""
    autoguidance: Annotated[float, Field(ge=0)] = 1.0
    """Weight of guidance away from a weaker version of the stage, if there is one, in place of `guidance` (Karras et
    al. 2024). 1: off."""
    threshold: Annotated[float, Field(gt=0, lt=1)] | Literal["clip"] | None = "clip"
    """Dynamic thresholding at a quantile such as 0.995 (Imagen), static `clip` to [-1, 1], or none."""
    threshold_maximum: Annotated[float, Field(ge=1)] | None = None
    """Dynamic thresholding divides by no more than this. None: no cap."""
    aug_level: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Super-resolution: standard deviation of the noise on the smaller picture."""
    consistency: Annotated[int, Field(ge=0), ROUNDS.validator] = 0
    """Super-resolution: rounds of back-projection after the last step: the difference between the smaller picture and
    the result's area mean is enlarged and added (Irani & Peleg 1991)."""
    flatten: Annotated[float, Field(ge=0, le=2)] = 0.0
    """After the last step, neighbours whose colours differ by less than about this, in [-1, 1], are averaged: it
    removes the grain of a small network in flat art, and keeps edges. Not for photographs. 0: off."""

    @model_validator(mode="before")
    @classmethod
    def _in_sections(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        # pydantic no longer treats a validator's result as JSON, and its strict tuples then reject lists.
        plain = {name: _as_tuples(value) for name, value in values.items()}
        return with_sampler_section(plain)

    @model_serializer(mode="wrap")
    def _without_defaults(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Without settings that are newer than some pictures and off, so that those pictures' recipes stay the same."""
        values: dict[str, Any] = write(self)
        newer: dict[str, Any] = {"guidance_rescale": 0.0, "guidance_schedule": None, "projection": None}
        newer |= {"autoguidance": 1.0, "guidance_of": {}}
        return {name: value for name, value in values.items() if name not in newer or value != newer[name]}

    @model_validator(mode="after")
    def _scheduled(self) -> Self:
        points = self.guidance_schedule
        if points is not None and (not points or any(b[0] <= a[0] for a, b in pairwise(points))):
            raise ValueError("guidance_schedule: expected points in increasing order of log SNR")
        if self.guidance_of and (points is not None or self.projection is not None or self.guidance_rescale):
            raise ValueError("guidance_of excludes guidance_schedule, guidance_rescale and projection; remove one")
        if points is not None and self.projection is not None:
            raise ValueError("guidance_schedule and projection exclude each other; remove one")
        return self

    @model_validator(mode="after")
    def _descending(self) -> Self:
        if isinstance(self.timesteps, tuple) and (
            not self.timesteps or any(after >= before for before, after in pairwise(self.timesteps))
        ):
            raise ValueError("timesteps must decrease, from high noise to low, such as [999, 500, 0]")
        return self

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.guidance_interval is not None and self.guidance_interval[0] >= self.guidance_interval[1]:
            low, high = self.guidance_interval
            raise ValueError(f"guidance_interval [{low:g}, {high:g}] is empty; give the smaller log SNR first")
        return self


def _as_tuples(value: Any) -> Any:
    return tuple(map(_as_tuples, value)) if isinstance(value, list) else value


class PresetConfig(Settings):
    """The changes that a named preset makes to `sampling`."""

    sampler: AnySampler | None = None
    """See sampling.sampler."""
    steps: StepCount | None = None
    """See sampling.steps."""
    guidance: Annotated[float, Field(ge=0)] | None = None
    """See sampling.guidance."""
    aug_level: Annotated[float, Field(ge=0, lt=1)] | None = None
    """See sampling.aug_level."""
