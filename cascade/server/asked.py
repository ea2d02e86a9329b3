"""What somebody asks to have drawn: the arguments of a call as JSON, checked; and back from what a picture says."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Annotated, Any, Literal, TypeAlias, TypeVar

from pydantic import BeforeValidator, Field

from cascade.batch.plan import DrawOptions, Planner
from cascade.batch.plan import Job as Plan
from cascade.config.samplers import SamplerConfig
from cascade.config.stage import StageConfig
from cascade.drawing.changes import Changes
from cascade.drawing.recipe import Recipe
from cascade.errors import CascadeError
from cascade.pipeline import CascadePipeline
from cascade.prompts.record import PromptRecord
from cascade.sampling import resolve_sampling
from cascade.seeds import MAX_SEED, fresh_seed
from cascade.server.enlarged import EnlargedJob
from cascade.server.sources import Sources
from cascade.settings import Settings
from cascade.upscaling import read_picture
from cascade.values import SETTINGS

T = TypeVar("T")
LONGEST_PROMPT = 4000
"""Characters; an encoder reads far fewer."""
MOST_PICTURES = 64
"""Of one prompt in one go."""
MOST_PIXELS = 4 << 20
"""Of one picture: 2048 x 2048."""
MOST_PIXELS_ENLARGED = 16 << 20
"""Of the largest picture that a stage draws while it enlarges another one: 4096 x 4096."""
MOST_ROUNDS = 20
"""Of resampling: each multiplies the time of a picture."""


def _number(value: object) -> object:
    """JavaScript rounds whole numbers above 2^53, so a seed may come as text."""
    return int(value) if isinstance(value, str) and value.isdecimal() else value


PerStage: TypeAlias = T | dict[str, T] | None
Seed: TypeAlias = Annotated[int, BeforeValidator(_number), Field(ge=0, le=MAX_SEED)]
Text: TypeAlias = Annotated[str, Field(max_length=LONGEST_PROMPT)]
Name: TypeAlias = Annotated[str, Field(max_length=64)]
Share: TypeAlias = Annotated[float, Field(ge=0, le=1)]
Side: TypeAlias = Literal["left", "top", "right", "bottom"]
_OF_A_CHANGE = ("mask", "strength", "extend", "variation", "until", "height", "width", "number")


class Asked(Settings):
    """One prompt to draw; names and meanings as in `CascadePipeline.__call__`."""

    prompt: Text
    """What the pictures show."""
    negative_prompt: Text = ""
    """What they should not be like."""
    seed: Seed | None = None
    """Same seed, same pictures; a number, or its digits as text. None: drawn and reported."""
    num_images_per_prompt: int = Field(default=1, ge=1, le=MOST_PICTURES)
    """How many pictures."""
    number: int | None = Field(default=None, ge=0, lt=MOST_PICTURES)
    """Only this one of them, from 0."""
    until: int | None = None
    """Stop after the stage of this size, in pixels."""
    height: int | None = Field(default=None, ge=1)
    """Of the pictures, in pixels."""
    width: int | None = Field(default=None, ge=1)
    """Of the pictures, in pixels."""
    steps: PerStage[Annotated[int, Field(ge=1, le=1000)]] = None
    """Sampling steps: a value, or one for each stage by name."""
    guidance: PerStage[float] = None
    """Weight of the prompt, 1 = none."""
    sampler: PerStage[str | dict[str, Any]] = None
    """A sampler's name, or a section with its settings, {"kind": "ddim", "eta": 0.5}."""
    aug_level: PerStage[float] = None
    """Noise on the smaller picture, 0 to 1."""
    threshold: PerStage[float | str] = None
    """A quantile, "clip" or "none"."""
    preset: str | None = None
    """fast, default or best."""
    image: Name | None = None
    """A picture to change: the name of an upload, or the id of a picture in the gallery."""
    mask: Name | None = None
    """White where the picture is drawn again; every other pixel keeps its bits. Named as `image` is."""
    strength: PerStage[Share] = None
    """0 returns the picture, 1 ignores it."""
    extend: dict[Side, Annotated[int, Field(ge=0, le=4096)]] | None = None
    """Pixels to add at each side of the picture."""
    resampling: int = Field(default=1, ge=1, le=MOST_ROUNDS)
    """How often each step is taken where a mask keeps a part."""
    variation: Annotated[tuple[Seed, Share], Field(strict=False)] | None = None
    """Another seed, and how far the starting noise moves towards that seed's noise."""
    to: int | None = Field(default=None, ge=1, le=1 << 16)
    """Enlarge `image` until its longer side has so many pixels, in place of drawing."""

    trace: bool = False
    """Keep what each stage computes at every step, in place of the picture."""

    def settled(self) -> Asked:
        """The same with a seed."""
        return self if self.seed is not None else self.model_copy(update={"seed": fresh_seed()})

    def options(self) -> DrawOptions:
        """The same as a run has it; with a seed."""
        assert self.seed is not None, "settled() comes first"
        return DrawOptions(
            run_seed=self.seed,
            num_images=self.num_images_per_prompt,
            negative_prompt=self.negative_prompt,
            until=self.until,
            height=self.height,
            width=self.width,
            sampling={name: getattr(self, name) for name in SETTINGS},
            preset=self.preset,
        )

    def plan(self, pipeline: CascadePipeline, index: int, sources: Sources) -> Plan:
        """The same with everything settled. index: see `PromptRecord`. Raises CascadeError for what cannot be drawn."""
        options = self.options()
        if self.number is not None and self.number >= self.num_images_per_prompt:
            raise CascadeError(f"number: {self.number}; expected less than num_images_per_prompt")
        if self.trace and (self.image is not None or len(self.numbers) > 1):
            raise CascadeError("trace: is of one picture that is drawn from a prompt alone")
        record = PromptRecord(index, self.prompt, options.run_seed, origin="studio")
        if self.to is not None:
            return self._enlarging(pipeline, record, sources)
        plan = Planner(pipeline, replace(options, changes=self._changes(sources))).job(record)
        height, width = plan.sizes[-1]
        if height * width > MOST_PIXELS:
            raise CascadeError(f"height and width: {height}x{width}; expected at most {MOST_PIXELS:,} pixels in all")
        return plan

    def _changes(self, sources: Sources) -> Changes:
        """The pictures themselves in place of their names."""
        return Changes(
            None if self.image is None else sources.picture(self.image),
            None if self.mask is None else sources.mask(self.mask),
            self.strength,
            None if self.extend is None else {str(side): pixels for side, pixels in self.extend.items()},
            self.resampling,
            self.variation,
        )

    def _enlarging(self, pipeline: CascadePipeline, record: PromptRecord, sources: Sources) -> EnlargedJob:
        given = [name for name in _OF_A_CHANGE if getattr(self, name) is not None]
        if given or self.num_images_per_prompt > 1 or self.negative_prompt:
            name = given[0] if given else "num_images_per_prompt and negative_prompt"
            raise CascadeError(f"{name}: has no meaning with `to`, which enlarges a picture as it is")
        if self.image is None:
            raise CascadeError("to: there is no picture to enlarge; name one as image")
        slots = pipeline.enlargers
        sampling = {name: getattr(self, name) for name in SETTINGS}
        settings = resolve_sampling([slot.config for slot in slots], self.preset, sampling)
        picture = read_picture(sources.picture(self.image))[0]
        task = pipeline.upscale_task(picture, self.prompt, record.seed, settings, self.to)
        height, width = task.passes[-1].size
        if height * width > MOST_PIXELS_ENLARGED:
            raise CascadeError(f"to: {width}x{height} would be drawn; expected at most {MOST_PIXELS_ENLARGED:,} pixels")
        ways = [drawing.slot for drawing in task.passes], [drawing.size for drawing in task.passes]
        return EnlargedJob(record, "", 1, *ways, settings, task=task)

    @property
    def numbers(self) -> Sequence[int]:
        """Of the pictures that are to be drawn."""
        return range(self.num_images_per_prompt) if self.number is None else [self.number]

    def to_json(self) -> dict[str, Any]:
        """What was asked for, without what was left open; the seed as text."""
        values = self.model_dump(mode="json", exclude_defaults=True)
        if self.variation is not None:
            values["variation"] = [str(self.variation[0]), self.variation[1]]
        return {**values, "prompt": self.prompt} | ({} if self.seed is None else {"seed": str(self.seed)})


def asked_of(said: Mapping[str, Any], stages: Sequence[StageConfig]) -> dict[str, Any]:
    """`Asked.to_json` of a picture, from its line of a manifest or what stands inside it.

    stages: of the model; values that are their defaults are left out. Raises CascadeError for no picture of ours.
    """
    recipe = Recipe.from_json(said, "picture")
    sampling: dict[str, dict[str, Any]] = {name: {} for name in SETTINGS}
    default = {stage.name: stage.sampling for stage in stages}
    for stage, settings in recipe.stages.items():
        for name in SETTINGS:
            own, usual = getattr(settings, name), getattr(default.get(stage), name, None)
            if own != usual and stage in default:
                sampling[name][stage] = "none" if own is None else _told(own, usual)
    resolution = {stage.name: stage.resolution for stage in stages}.get(list(recipe.stages)[-1])
    asked = {
        "prompt": recipe.prompt,
        "negative_prompt": recipe.negative_prompt,
        "seed": str(recipe.seed),
        "num_images_per_prompt": said["num_images"],
        "number": recipe.number if said["num_images"] > 1 else None,
        "until": resolution,
        "height": recipe.height,
        "width": recipe.width,
        **sampling,
        **_change_of(recipe),
    }
    return {name: value for name, value in asked.items() if value not in (None, "", {})}


def _change_of(recipe: Recipe) -> dict[str, Any]:
    """What a recipe records of another picture, as one asks for it."""
    if recipe.source:
        size = {"until": None, "height": None, "width": None}
        return {**size, "image": recipe.source, "to": max(recipe.height, recipe.width)}
    varied = [str(recipe.variation_seed), recipe.variation] if recipe.variation else None
    if not recipe.image:
        return {"variation": varied}
    return {
        "image": recipe.image,
        "mask": recipe.mask,
        "strength": recipe.strength or 1.0,
        "resampling": None if recipe.resampling == 1 else recipe.resampling,
        "variation": varied,
    }


def _told(own: Any, usual: Any) -> Any:
    """A setting as one would write it: of a sampler its name, where that alone does not mean the stage's own."""
    if not isinstance(own, SamplerConfig):
        return own
    return own.model_dump(mode="json") if own.kind != usual.kind else {"kind": own.kind, **own.own}
