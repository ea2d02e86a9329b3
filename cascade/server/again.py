"""The request that draws a picture again, from its line of a manifest or its own metadata."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from cascade.conditions.settings import NONE, VectorCondition
from cascade.conditions.values import DIGEST
from cascade.config.sampling import ProjectionConfig, SamplerConfig, SamplingConfig
from cascade.config.stage import StageConfig
from cascade.config.values import SETTINGS
from cascade.drawing.recipe import Recipe
from cascade.errors import CascadeError
from cascade.text.language import Styles


def asked_of(said: Mapping[str, Any], stages: Sequence[StageConfig], styles: Styles | None = None) -> dict[str, Any]:
    """`Asked.to_json` of a picture, from its line of a manifest or its own metadata.

    stages, styles: of the model; default values of the stages are left out. Raises CascadeError if cascade did not
    draw the picture.
    """
    recipe = Recipe.from_json(said, "picture")
    if any(region.mask for region in recipe.regions):
        raise CascadeError("picture: was drawn with masks of regions, which it does not hold; draw it from the command")
    sampling: dict[str, dict[str, Any]] = {name: {} for name in SETTINGS}
    sampling |= {"guidance_rescale": {}, "projection": {}}
    default = {stage.name: stage.sampling for stage in stages}
    for stage, settings in recipe.stages.items():
        for name in sampling:
            own, usual = getattr(settings, name), getattr(default.get(stage), name, None)
            if own != usual and stage in default:
                sampling[name][stage] = "none" if own is None else _short_form(own, usual)
    resolution = {stage.name: stage.resolution for stage in stages}.get(list(recipe.stages)[-1])
    asked = {
        "prompt": recipe.prompt,
        "negative_prompt": recipe.negative_prompt,
        "default_style": "none" if _was_unstyled(recipe, styles) else None,
        "seed": str(recipe.seed),
        "num_images_per_prompt": said["num_images"],
        "number": recipe.number if said["num_images"] > 1 else None,
        "until": resolution,
        "height": recipe.height,
        "width": recipe.width,
        "prompt_language": recipe.language or None,
        "long_prompts": None if recipe.long_prompts == "cut" else recipe.long_prompts,
        "regions": [{"box": list(region.box), "prompt": region.prompt} for region in recipe.regions if region.box],
        "conditions": _conditions_of(recipe, stages),
        "guidance_of": _weights_of(recipe, default),
        **sampling,
        **_change_of(recipe),
    }
    return {name: value for name, value in asked.items() if value not in (None, "", {}, [])}


def _conditions_of(recipe: Recipe, stages: Sequence[StageConfig]) -> dict[str, Any]:
    """The conditions of a recipe as a request names them: pictures by digest, under which uploads are kept.

    Raises CascadeError for a vector, of which the recipe holds a digest alone.
    """
    vectors = {name for stage in stages for name, c in stage.conditions.items() if isinstance(c, VectorCondition)}
    values: dict[str, Any] = {}
    for name, value in recipe.conditions.items():
        if name in vectors and value is not None:
            raise CascadeError(
                f"picture: was drawn with condition {name}, whose numbers it does not hold; draw it anew"
            )
        values[name] = NONE if value is None else value.removeprefix(DIGEST) if isinstance(value, str) else value
    return values


def _weights_of(recipe: Recipe, default: Mapping[str, SamplingConfig]) -> dict[str, float]:
    """The weights of single conditions that differ from the stages' own."""
    return {
        name: weight
        for stage, settings in recipe.stages.items()
        for name, weight in settings.guidance_of.items()
        if stage in default and default[stage].guidance_of.get(name) != weight
    }


def _was_unstyled(recipe: Recipe, styles: Styles | None) -> bool:
    """Whether the model's default style would change the prompt, which was drawn without it."""
    return styles is not None and not recipe.language and styles.added(recipe.prompt) != recipe.prompt


def _change_of(recipe: Recipe) -> dict[str, Any]:
    """The fields of a request for the edit in a recipe."""
    if recipe.source:
        size = {"until": None, "height": None, "width": None}
        return {**size, "image": recipe.source, "to": max(recipe.height, recipe.width)}
    varied: dict[str, Any] = {}
    if recipe.variation:
        varied["variation"] = [str(recipe.variation_seed), recipe.variation]
        varied["variation_noise"] = None if recipe.variation_noise == "start" else recipe.variation_noise
    if not recipe.image:
        return varied
    return {
        **varied,
        "known": None if recipe.known == "noised" else recipe.known,
        "image": recipe.image,
        "mask": recipe.mask,
        "strength": recipe.strength or 1.0,
        "resampling": None if recipe.resampling == 1 else recipe.resampling,
    }


def _short_form(own: Any, usual: Any) -> Any:
    """A setting in short form: a sampler as its name, unless the name alone would select the stage's own settings."""
    if isinstance(own, ProjectionConfig):
        section = own.model_dump(mode="json", exclude_defaults=True)
        return section if section.keys() - {"parallel"} else own.parallel
    if not isinstance(own, SamplerConfig):
        return own
    return own.model_dump(mode="json") if own.kind != usual.kind else {"kind": own.kind, **own.own}
