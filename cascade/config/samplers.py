"""The settings of samplers: a section for each, made of what its function in `cascade.diffusion.samplers` takes."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeAlias, Union, get_args, get_type_hints

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
from cascade.settings import Settings

DEFAULT_SAMPLER = "ddim"


class SamplerConfig(Settings):
    """A sampler by its name, `kind`, and its own settings. Written as the name alone where they are the defaults."""

    kind: str

    @property
    def own(self) -> dict[str, Any]:
        """The sampler's own settings, by the names of its function's parameters."""
        return {name: getattr(self, name) for name in type(self).model_fields if name != "kind"}

    def __reduce__(self) -> tuple[Any, ...]:
        """A section's class stands in no module, so that pickle looks it up by the sampler's name."""
        return _section_of, (self.kind, self.own)

    @model_validator(mode="before")
    @classmethod
    def _named(cls, value: Any) -> Any:
        return {"kind": value} if isinstance(value, str) else value

    @model_serializer(mode="wrap")
    def _shortest(self, write: SerializerFunctionWrapHandler) -> dict[str, Any] | str:
        return self.kind if self == type(self)(kind=self.kind) else write(self)


def section(kind: str, sampler: Sampler) -> type[SamplerConfig]:
    """The section of a sampler: a setting for each parameter that its function takes by name alone."""
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
    """A parameter's type without, and its default with, what its `Option` says of it."""
    plain, option = get_args(hint)
    assert isinstance(option, Option), f"{hint} has no Option that says what it means"
    return plain, Field(default, description=option.meaning, ge=option.least, le=option.greatest)


SECTIONS: Mapping[str, type[SamplerConfig]] = {kind: section(kind, sampler) for kind, sampler in SAMPLERS.items()}
"""The sections of all samplers, by name."""


def _section_of(kind: str, own: Mapping[str, Any]) -> SamplerConfig:
    return SECTIONS[kind](kind=kind, **own)


def _kind_of(value: Any) -> str | None:
    """The name of a sampler: the value itself, or that of a section, None where a section has none."""
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
"""Settings that stood beside `sampler` before samplers had sections, and the sampler that each belongs to."""


def with_sampler_section(values: Mapping[str, Any]) -> dict[str, Any]:
    """Plain sampling settings of any version in today's form, where each setting of a sampler is in its section.

    What belongs to another sampler than the one in use is left out.
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
    """The sampler that a caller asks for, as plain data; where that is its name alone, `own` is meant if it has it.

    own: the stage's sampler, with the settings that were chosen for it.
    """
    return own.model_dump(mode="json") if asked == own.kind else asked
