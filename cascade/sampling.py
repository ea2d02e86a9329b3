"""The sampling settings of each stage: its defaults, a preset, and the caller's own values."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from cascade.config.samplers import complete_sampler
from cascade.config.sampling import ProjectionConfig, SamplingConfig
from cascade.config.stage import StageConfig
from cascade.errors import CascadeError
from cascade.quoting import quoted
from cascade.settings import Settings, parse
from cascade.values import PRESETS


def resolve_sampling(
    stages: Sequence[StageConfig], preset: str | None, overrides: Mapping[str, Any]
) -> dict[str, SamplingConfig]:
    """Settings by stage name. overrides: {setting: value, {stage: value} or None}.

    Raises CascadeError for an unknown preset or stage, and for a value that the setting does not allow.
    """
    if preset is not None and preset not in PRESETS:
        raise CascadeError(f"preset: {quoted(preset)}; expected one of {', '.join(PRESETS)}")
    if preset not in (None, "default") and not any(preset in stage.presets for stage in stages):
        raise CascadeError(
            f"preset: no stage of this cascade defines {quoted(preset)}; leave it out, or give steps instead"
        )
    names = [stage.name for stage in stages]
    weights = overrides.get("guidance_of")
    if weights is not None and not isinstance(weights, Mapping):
        raise CascadeError(f"guidance_of: {quoted(weights)}; expected conditions and weights, such as {{'text': 3}}")
    guided = dict.fromkeys(name for stage in stages for name in stage.guided)
    check_stages("guidance_of", weights or (), list(guided), "condition")
    for setting, value in overrides.items():
        if _by_stage(setting, value):
            check_stages(setting, value, names)
    return {stage.name: _resolve(stage, preset, overrides) for stage in stages}


def _resolve(stage: StageConfig, preset: str | None, overrides: Mapping[str, Any]) -> SamplingConfig:
    values = stage.sampling.model_dump(mode="json")
    if preset in stage.presets:
        changes = stage.presets[preset].model_dump(mode="json", exclude_none=True)
        values |= ({"timesteps": None} if "steps" in changes else {}) | changes
    for setting, value in overrides.items():
        own = _plain(value.get(stage.name) if _by_stage(setting, value) else value)
        if setting == "guidance_of" and isinstance(own, Mapping):
            own = {name: weight for name, weight in own.items() if name in stage.guided} or None
        if own is not None and not (setting == "aug_level" and stage.low_resolution is None):
            if setting == "steps":
                values["timesteps"] = None  # a number of steps replaces a list
            values[setting] = None if isinstance(own, str) and own == "none" else own
    values["sampler"] = complete_sampler(values["sampler"], stage.sampling.sampler)
    settings = parse(SamplingConfig, values, f"stage {stage.name}")
    try:
        stage.check_sampler(settings.sampler)
    except ValueError as error:
        raise CascadeError(f"stage {stage.name}: {error}") from None
    total = getattr(stage.schedule, "steps", None)
    if total and settings.timesteps is None and settings.spacing in ("leading", "trailing") and settings.steps > total:
        raise CascadeError(f"stage {stage.name}: steps: {settings.steps}; its schedule has only {total}")
    return settings


def _by_stage(setting: str, value: Any) -> bool:
    """Whether `value` is {stage: value}. A section is a mapping too: {kind: ddim, eta: 0.5}, {parallel: 0}."""
    if not isinstance(value, Mapping) or setting == "guidance_of":
        return False
    own = {"sampler": {"kind"}, "projection": ProjectionConfig.model_fields.keys()}.get(setting, set())
    return not own & value.keys()


def _plain(value: Any) -> Any:
    """A setting as plain JSON data: a section as a mapping, a number of NumPy or torch as Python's."""
    if isinstance(value, Settings):
        return value.model_dump(mode="json")
    return value.item() if getattr(value, "ndim", None) == 0 else value


def check_stages(setting: str, given: Iterable[object], names: Sequence[str], what: str = "stage") -> None:
    """Raises CascadeError for a stage (or other kind of thing, `what`) that is not one of `names`."""
    for name in given:
        _check_name(setting, name, names, what)


def _check_name(setting: str, name: object, names: Sequence[str], what: str) -> None:
    if name not in names:
        close = difflib.get_close_matches(str(name), names, n=1)
        hint = f"; did you mean {close[0]}?" if close else ""
        where = "this cascade has" if what == "stage" else "there are"
        raise CascadeError(f"{setting}: no {what} is called {quoted(name)}; {where} {', '.join(names)}{hint}")
