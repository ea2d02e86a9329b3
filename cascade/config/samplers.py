"""The settings of samplers: one section each, made from the parameters of functions in `cascade.diffusion.samplers`."""

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
