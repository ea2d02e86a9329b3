"""The arguments of a call, checked: prompts, seeds and sizes, and the sampling settings of each stage."""

from __future__ import annotations

import difflib
import math
import operator
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any, TypeAlias, TypeVar

import numpy as np
import torch

from cascade.conditioning import TextEmbeddings
from cascade.config.sampling import ProjectionConfig, SamplingConfig, complete_sampler
from cascade.config.stage import StageConfig
from cascade.config.values import PRESETS
from cascade.errors import CascadeError, ShortageError, quoted
from cascade.seeds import MAX_SEED, fresh_seed
from cascade.settings import COUNT, SIDE, AtMost, Settings, parse
from cascade.system.device import free_bytes

# --- arguments -------------------------------------------------------------------------------------------------------
# Checks of the pipeline's arguments: prompts, seeds and sizes. Every function here raises CascadeError.

T = TypeVar("T")
PerStage: TypeAlias = T | Mapping[str, T] | None
"""One value for all stages, or {stage name: value}; None or a missing stage: the stage's own default."""


def prompts_of(
    prompt: str | Sequence[str] | None, embeds: TextEmbeddings | None, conditioned: bool = False
) -> list[str]:
    """The prompts as a list; an empty one for each row of embeddings.

    conditioned: whether there are other conditions, with which a prompt may be left out.
    """
    if conditioned and prompt is None and embeds is None:
        return [""]
    if (prompt is None) == (embeds is None):
        raise CascadeError("give either prompt or prompt_embeds")
    if embeds is not None:
        if not isinstance(embeds, TextEmbeddings) or not len(embeds):
            raise CascadeError("prompt_embeds: expected TextEmbeddings(tokens, mask) of at least one prompt")
        return [""] * len(embeds)
    prompts = texts_of("prompt", prompt)
    if not prompts:
        raise CascadeError("prompt: the list is empty; give at least one prompt")
    return prompts


def one_text(name: str, value: Any) -> str:
    """A string, or a list of one."""
    texts = texts_of(name, value)
    if len(texts) != 1:
        raise CascadeError(f"{name}: {len(texts)} texts; expected one")
    return texts[0]


def one_of(name: str, value: Any, possible: Sequence[str]) -> str:
    """A text that is one of `possible`."""
    if value not in possible:
        raise CascadeError(f"{name}: {quoted(value)}; expected one of {', '.join(possible)}")
    return str(value)


def texts_of(name: str, value: Any) -> list[str]:
    """A list of strings, from one string or several."""
    several = isinstance(value, Iterable) and not isinstance(value, (str, bytes, Mapping))
    texts: list[Any] = list(value) if several else [value]
    for text in texts:
        if not isinstance(text, str):
            raise CascadeError(f"{name}: {quoted(text)} is not text; expected a string, or a list of strings")
    return texts


def conditions_of(
    conditions: Mapping[str, Any] | Sequence[Mapping[str, Any]] | None, count: int
) -> list[Mapping[str, Any]]:
    """The given conditions of each of `count` prompts."""
    if conditions is None or isinstance(conditions, Mapping):
        return [conditions or {}] * count
    several: list[Any] = list(conditions) if isinstance(conditions, (list, tuple)) else [None]
    if not all(isinstance(one, Mapping) for one in several):
        raise CascadeError("conditions: expected {name: value}, or a list with one for each prompt")
    if len(several) != count:
        raise CascadeError(f"conditions: {len(several)} for {count} prompts; give one, or one for each prompt")
    return several


def negatives_of(negative_prompt: str | Sequence[str] | None, count: int) -> list[str]:
    """The negative prompt of each of `count` prompts; an empty one stands for the null text."""
    negative = texts_of("negative_prompt", "" if negative_prompt is None else negative_prompt)
    if len(negative) not in (1, count):
        raise CascadeError(f"negative_prompt: {len(negative)} for {count} prompts; give one, or one for each prompt")
    return negative * count if len(negative) == 1 else negative


def seeds_of(seed: int | Sequence[int] | None, count: int) -> list[int]:
    """One seed for each of `count` prompts; random ones if `seed` is None."""
    if seed is None:
        return [fresh_seed() for _ in range(count)]
    value: Any = seed
    several = value.ndim > 0 if isinstance(value, np.ndarray) else isinstance(value, Sequence)
    given: list[Any] = list(value) if several else [value] * count
    if len(given) != count:
        raise CascadeError(f"seed: {len(given)} seeds for {count} prompts; give one, or one for each prompt")
    # Plain integers, because the noise depends on how a seed is written: NumPy's 1 and Python's must give the same.
    seeds = [integer("seed", one) for one in given]
    for number in seeds:
        if not 0 <= number <= MAX_SEED:
            raise CascadeError(f"seed: {number}; expected a whole number in 0..{MAX_SEED}")
    return seeds


def integer(name: str, value: Any) -> int:
    """`value` as an int, if its type is an integer type."""
    try:
        return operator.index(value)
    except TypeError:
        raise CascadeError(f"{name}: {quoted(value)}; expected a whole number") from None


def positive(name: str, value: Any, most: AtMost = COUNT) -> int:
    """A whole number of at least 1."""
    number = at_most(name, value, most)
    if number < 1:
        raise CascadeError(f"{name}: {value}; expected at least 1")
    return number


def at_most(name: str, value: Any, most: AtMost) -> int:
    """A whole number no larger than a bound."""
    try:
        return most(integer(name, value))
    except ValueError as error:
        raise error if isinstance(error, CascadeError) else CascadeError(f"{name}: {error}") from None


def stage_sizes(stages: Sequence[StageConfig], height: int | None, width: int | None) -> list[tuple[int, int]]:
    """(height, width) of each stage such that the last stage has the requested size."""
    last = stages[-1].resolution
    sizes = []
    for stage in stages:
        pair = []
        for name, wanted in (("height", height), ("width", width)):
            pixels, rest = divmod((last if wanted is None else at_most(name, wanted, SIDE)) * stage.resolution, last)
            if rest or pixels % stage.geometry.divisor or pixels < 1:
                step = common_step(stages)
                raise CascadeError(f"{name}: {wanted} is not possible; expected a multiple of {step}")
            pair.append(pixels)
        sizes.append((pair[0], pair[1]))
    return sizes


def check_result(pictures: int, size: tuple[int, int], pixel_bytes: int) -> None:
    """Raises ShortageError when `pictures` pictures of size (height, width) do not fit into memory together."""
    needed, free = pictures * size[0] * size[1] * pixel_bytes, free_bytes(torch.device("cpu"))
    if pictures > 1 and needed > free:  # the stages themselves count the memory of a single picture
        raise ShortageError(
            f"{pictures:,} pictures of {size[0]}x{size[1]} take {needed / 1e9:.1f} GB, but {free / 1e9:.1f} GB are"
            " free; draw fewer at a time, or use `cascade generate`, which writes each picture to a file"
        )


def common_step(stages: Sequence[StageConfig]) -> int:
    """The number of pixels that height and width of the last stage must be multiples of."""
    last = stages[-1].resolution
    steps = [stage.geometry.divisor * last // stage.resolution for stage in stages]
    return math.lcm(*steps)


def check_chain(stages: Sequence[StageConfig], text_dim: int) -> None:
    """Raises CascadeError unless the stages form a cascade: sizes chain, names differ, text widths agree."""
    if not stages:
        raise CascadeError("a cascade needs at least one stage")
    if stages[0].low_resolution is not None:
        raise CascadeError(f"stage {stages[0].name}: the first stage must be a base stage, without low_resolution")
    names = [stage.name for stage in stages]
    if len(set(names)) != len(names):
        raise CascadeError(f"stages {', '.join(names)}: every stage needs a different name")
    for before, after in pairwise(stages):
        if after.pictures != before.pictures:
            raise CascadeError(
                f"stage {after.name} enlarges pictures of {_described(after)}, but stage {before.name} before it draws"
                f" {_described(before)}; set channels, values and range of both alike"
            )
        if after.low_resolution != before.resolution:
            raise CascadeError(
                f"stage {after.name} starts from {after.low_resolution} px, but stage {before.name} before it draws"
                f" {before.resolution} px; choose stages whose sizes chain"
            )
    check_text_widths(stages, text_dim)


def _described(stage: StageConfig) -> str:
    limits = ", ".join(f"{low:g} to {high:g}" for low, high in stage.pictures.limits)
    return f"{stage.pictures}, {limits}"


def check_text_widths(stages: Sequence[StageConfig], text_dim: int) -> None:
    """Raises CascadeError unless every stage that reads text reads this width."""
    for stage in stages:
        if stage.model.reads_text and stage.model.text_dim != text_dim:
            raise CascadeError(
                f"stage {stage.name}: reads text of width {stage.model.text_dim}, the text encoder gives {text_dim};"
                " use the encoder that it was trained with"
            )


# --- sampling --------------------------------------------------------------------------------------------------------
# The sampling settings of each stage: its defaults, a preset, and the caller's own values.


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
