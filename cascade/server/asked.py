"""What somebody asks to have drawn: the arguments of a call as JSON, checked; and back from what a picture says."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, TypeAlias, TypeVar

from pydantic import BeforeValidator, Field

from cascade.batch.plan import DrawOptions, Planner
from cascade.batch.plan import Job as Plan
from cascade.config.samplers import SamplerConfig
from cascade.config.stage import StageConfig
from cascade.drawing.recipe import Recipe
from cascade.errors import CascadeError
from cascade.pipeline import CascadePipeline
from cascade.prompts.record import PromptRecord
from cascade.seeds import MAX_SEED, fresh_seed
from cascade.settings import Settings
from cascade.values import SETTINGS

T = TypeVar("T")
LONGEST_PROMPT = 4000
"""Characters; an encoder reads far fewer."""
MOST_PICTURES = 64
"""Of one prompt in one go."""
MOST_PIXELS = 4 << 20
"""Of one picture: 2048 x 2048."""


def _number(value: object) -> object:
    """JavaScript rounds whole numbers above 2^53, so a seed may come as text."""
    return int(value) if isinstance(value, str) and value.isdecimal() else value


PerStage: TypeAlias = T | dict[str, T] | None
Seed: TypeAlias = Annotated[int, BeforeValidator(_number), Field(ge=0, le=MAX_SEED)]
Text: TypeAlias = Annotated[str, Field(max_length=LONGEST_PROMPT)]


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

    def plan(self, pipeline: CascadePipeline, index: int) -> Plan:
        """The same with everything settled. index: see `PromptRecord`. Raises CascadeError for what cannot be drawn."""
        options = self.options()
        if self.number is not None and self.number >= self.num_images_per_prompt:
            raise CascadeError(f"number: {self.number}; expected less than num_images_per_prompt")
        plan = Planner(pipeline, options).job(PromptRecord(index, self.prompt, options.run_seed, origin="studio"))
        height, width = plan.sizes[-1]
        if height * width > MOST_PIXELS:
            raise CascadeError(f"height and width: {height}x{width}; expected at most {MOST_PIXELS:,} pixels in all")
        return plan

    @property
    def numbers(self) -> Sequence[int]:
        """Of the pictures that are to be drawn."""
        return range(self.num_images_per_prompt) if self.number is None else [self.number]

    def to_json(self) -> dict[str, Any]:
        """What was asked for, without what was left open; the seed as text."""
        values = self.model_dump(mode="json", exclude_defaults=True)
        return {**values, "prompt": self.prompt} | ({} if self.seed is None else {"seed": str(self.seed)})


def asked_of(said: Mapping[str, Any], stages: Sequence[StageConfig]) -> dict[str, Any]:
    """`Asked.to_json` of a picture, from its line of a manifest or what stands inside it.

    stages: of the model at hand; values that are its defaults are left out. Raises CascadeError for no picture of ours.
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
    }
    return {name: value for name, value in asked.items() if value not in (None, "", {})}


def _told(own: Any, usual: Any) -> Any:
    """A setting as one would write it: of a sampler its name, where that alone does not mean the stage's own."""
    if not isinstance(own, SamplerConfig):
        return own
    return own.model_dump(mode="json") if own.kind != usual.kind else {"kind": own.kind, **own.own}
