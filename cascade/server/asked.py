"""A drawing request: the arguments of a call as checked JSON, and its plan."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal, TypeAlias, TypeVar

from PIL import Image
from pydantic import BeforeValidator, Field

from cascade.batch.matrix import Matrix
from cascade.batch.plan import DrawOptions, Job, Planner, Target
from cascade.batch.plan import Job as Plan
from cascade.conditions.settings import NONE, ConditionConfig, PictureCondition, VectorCondition
from cascade.config.sampling import ProjectionConfig
from cascade.config.values import SETTINGS
from cascade.drawing.arguments import resolve_sampling
from cascade.drawing.changes import Changes, regions_of
from cascade.drawing.edit import fitted, read_picture
from cascade.drawing.recipe import Recipe
from cascade.drawing.slots import StageSlot
from cascade.drawing.task import Drawn, Task, with_conditions
from cascade.errors import CascadeError, quoted
from cascade.pipeline import CascadePipeline
from cascade.prompts.records import PromptRecord
from cascade.seeds import MAX_SEED, fresh_seed
from cascade.server.sources import Sources
from cascade.settings import Settings, parse

# --- enlarging -------------------------------------------------------------------------------------------------------
# Enlarging an uploaded picture as a planned job, so that queue and gallery treat it like drawing.


@dataclass(frozen=True, eq=False, kw_only=True)
class EnlargedJob(Job):
    """Plan for one picture enlarged from another. task: for the engine."""

    task: Task

    def targets(self) -> Iterator[Target]:
        """The picture."""
        yield EnlargedTarget(self, 0)


@dataclass(frozen=True)
class EnlargedTarget(Target):
    """The picture of an `EnlargedJob`."""

    job: EnlargedJob

    @property
    def recipe(self) -> Recipe:
        """See `Target.recipe`."""
        return self.job.task.recipe

    def task(self) -> Task:
        """See `Target.task`."""
        return replace(self.job.task, name=str(self.job.record.index))

    def fitted(self, drawn: Drawn) -> Drawn:
        """The picture at the requested size: area means of the last stage's picture."""
        size = self.recipe.height, self.recipe.width
        form = self.job.slots[-1].config.pictures
        return replace(drawn, pixels=[fitted(drawn.pixels[-1][None], size, form)[0]])


# --- requests --------------------------------------------------------------------------------------------------------

T = TypeVar("T")
LONGEST_PROMPT = 4000
"""Characters of a prompt; an encoder reads far fewer."""
MOST_PICTURES = 64
"""Pictures per request."""
MOST_PIXELS = 4 << 20
"""Pixels of one picture: 2048 x 2048."""
MOST_PIXELS_ENLARGED = 16 << 20
"""Pixels of the largest picture that a stage draws when enlarging: 4096 x 4096."""
MOST_REGIONS = 16
"""Regions of a picture, each of which takes the time of a picture."""
MOST_NUMBERS = 16_384
"""Numbers of a condition that is a vector."""
MOST_CONDITIONS = 64
"""Conditions of a request."""
MOST_ADAPTERS = 16
"""Low-rank adapters of a request."""
MOST_ROUNDS = 20
"""Most rounds of resampling, each of which takes the time of a picture."""


def _number(value: object) -> object:
    """Accept digits as text, because JavaScript rounds integers above 2^53."""
    return int(value) if isinstance(value, str) and value.isdecimal() else value


PerStage: TypeAlias = T | dict[str, T] | None
Seed: TypeAlias = Annotated[int, BeforeValidator(_number), Field(ge=0, le=MAX_SEED)]
Text: TypeAlias = Annotated[str, Field(max_length=LONGEST_PROMPT)]
Name: TypeAlias = Annotated[str, Field(max_length=64)]
Share: TypeAlias = Annotated[float, Field(ge=0, le=1)]
Side: TypeAlias = Literal["left", "top", "right", "bottom"]
Numbers: TypeAlias = Annotated[tuple[float, ...], Field(max_length=MOST_NUMBERS, strict=False)]
_OF_A_DRAWING = (
    "prompt_language",
    "long_prompts",
    "regions",
    "guidance_rescale",
    "guidance_of",
    "projection",
    "known",
    "adapters",
)
_OF_A_CHANGE = ("mask", "strength", "extend", "variation", "until", "height", "width", "number")


class AskedRegion(Settings):
    """A part of the pictures with its own prompt."""

    box: Annotated[tuple[Share, Share, Share, Share], Field(strict=False)]
    """Left, top, right and bottom edge, as shares of width and height."""
    prompt: Text
    """Description of this part."""


class Asked(Settings):
    """One prompt to draw; names and meanings as in `CascadePipeline.__call__`."""

    prompt: Text
    """Description of the pictures."""
    negative_prompt: Text = ""
    """Description of what the pictures should not show."""
    default_style: Text | None = None
    """Style words if the prompt has none; default the model's own; "none" adds nothing."""
    seed: Seed | None = None
    """Equal seeds give equal pictures; a number, or its digits as text. None: a random seed, which is reported."""
    num_images_per_prompt: int = Field(default=1, ge=1, le=MOST_PICTURES)
    """Number of pictures."""
    number: int | None = Field(default=None, ge=0, lt=MOST_PICTURES)
    """Draw only the picture with this index, from 0."""
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
    guidance_rescale: PerStage[Share] = None
    """How far guidance's increase of contrast is undone."""
    guidance_of: Annotated[dict[Name, Annotated[float, Field(ge=0)]], Field(max_length=MOST_CONDITIONS)] | None = None
    """Weights of single conditions in place of `guidance`, such as {"layout": 5}; `text` is one of them."""
    projection: PerStage[float | dict[str, Any]] = None
    """Adaptive projected guidance: the factor on what saturates colours, or a section such as {"parallel": 0}."""
    preset: str | None = None
    """fast, default or best."""
    prompt_language: bool = False
    """Read (word:1.3), [from:to:0.4] and a AND b in the prompts."""
    long_prompts: Literal["cut", "chunk"] = "cut"
    """A prompt beyond the text encoder's limit is cut, or read in windows."""
    regions: tuple[AskedRegion, ...] = Field(default=(), max_length=MOST_REGIONS, strict=False)
    """Parts with their own prompts; a later one lies above."""
    conditions: Annotated[dict[Name, Text | float | Numbers], Field(max_length=MOST_CONDITIONS)] = Field(
        default_factory=dict
    )
    """Conditions of the model other than text, by name: a label, a number, a list of numbers, or the name of an upload;
    "none" leaves one open."""
    adapters: Annotated[dict[Name, Annotated[float, Field(ge=-2, le=2)]], Field(max_length=MOST_ADAPTERS)] = Field(
        default_factory=dict
    )
    """Scales of low-rank adapters by name, of those that the server offers (`--loras`)."""
    image: Name | None = None
    """A picture to edit: the name of an upload, or the id of a picture in the gallery."""
    mask: Name | None = None
    """White where the picture is redrawn; every other pixel keeps its bits. A name as for `image`."""
    strength: PerStage[Share] = None
    """0 returns the picture, 1 ignores it."""
    extend: dict[Side, Annotated[int, Field(ge=0, le=4096)]] | None = None
    """Pixels to add at each side of the picture."""
    resampling: int = Field(default=1, ge=1, le=MOST_ROUNDS)
    """Repetitions of each step when a mask keeps part of the picture."""
    known: Literal["noised", "clean"] = "noised"
    """How the network sees pixels outside a mask."""
    variation: Annotated[tuple[Seed, Share], Field(strict=False)] | None = None
    """Another seed, and the share of its noise in the starting noise."""
    variation_noise: Literal["start", "all"] = "start"
    """Whether that share is of the starting noise, or of all noise."""
    to: int | None = Field(default=None, ge=1, le=1 << 16)
    """Enlarge `image` until its longer side has this many pixels, instead of drawing."""

    trace: bool = False
    """Keep what each stage computes at every step, in place of the picture."""

    def settled(self) -> Asked:
        """This request with a seed."""
        return self if self.seed is not None else self.model_copy(update={"seed": fresh_seed()})

    def options(self) -> DrawOptions:
        """The request as options of a run; needs a seed."""
        assert self.seed is not None, "call settled() first"
        return DrawOptions(
            run_seed=self.seed,
            num_images=self.num_images_per_prompt,
            negative_prompt=self.negative_prompt,
            until=self.until,
            height=self.height,
            width=self.width,
            sampling=self._sampling(),
            preset=self.preset,
            default_style=self.default_style,
            language=self.prompt_language,
            long_prompts=self.long_prompts,
            regions=regions_of([(region.box, region.prompt) for region in self.regions]),
        )

    def _sampling(self) -> dict[str, Any]:
        """The sampling settings; `projection` as sections."""
        projection: Any = self.projection
        if isinstance(projection, dict) and not projection.keys() & ProjectionConfig.model_fields.keys():
            projection = {stage: _section(value) for stage, value in projection.items()}
        own = {name: getattr(self, name) for name in SETTINGS}
        own |= {"guidance_of": self.guidance_of} if self.guidance_of else {}
        return {**own, "guidance_rescale": self.guidance_rescale, "projection": _section(projection)}

    def plan(
        self,
        pipeline: CascadePipeline,
        index: int,
        sources: Sources,
        adapted: Callable[[Mapping[str, float]], Sequence[StageSlot]] | None = None,
    ) -> Plan:
        """The complete plan. index: see `PromptRecord`. adapted: the stages with adapters of given scales.

        Raises CascadeError for a request that cannot be drawn.
        """
        options = self.options()
        if self.number is not None and self.number >= self.num_images_per_prompt:
            raise CascadeError(f"number: {self.number}; expected less than num_images_per_prompt")
        if self.trace and (self.image is not None or len(self.numbers) > 1):
            raise CascadeError("trace: is of one picture that is drawn from a prompt alone")
        record = PromptRecord(index, self.prompt, options.run_seed, origin="studio")
        if self.to is not None:
            return self._enlarging(pipeline, record, sources)
        changed = replace(options, changes=self._changes(sources), conditions=self._given(pipeline, sources))
        if any(self.adapters.values()):
            if adapted is None:
                raise CascadeError("adapters: this server offers none; start it with --loras FOLDER")
            slots = adapted(self.adapters)
            changed, record = replace(changed, adapted=lambda _: slots), replace(record, adapter_factor=1.0)
        plan = Planner(pipeline, changed).job(record)
        height, width = plan.sizes[-1]
        if height * width > MOST_PIXELS:
            raise CascadeError(f"height and width: {height}x{width}; expected at most {MOST_PIXELS:,} pixels in all")
        return plan

    def _given(self, pipeline: CascadePipeline, sources: Sources) -> dict[str, Any]:
        """The conditions with pictures in place of their names."""
        configs = [slot.config.conditions for slot in (*pipeline.slots, *pipeline.enlargers)]
        known = {name: config for conditions in configs for name, config in conditions.items()}
        return {name: _value(name, value, known.get(name), sources) for name, value in self.conditions.items()}

    def _changes(self, sources: Sources) -> Changes:
        """The edit with pictures in place of their names."""
        return Changes(
            None if self.image is None else sources.picture(self.image),
            None if self.mask is None else sources.mask(self.mask),
            self.strength,
            None if self.extend is None else {str(side): pixels for side, pixels in self.extend.items()},
            self.resampling,
            self.variation,
            self.known,
            self.variation_noise,
        )

    def _enlarging(self, pipeline: CascadePipeline, record: PromptRecord, sources: Sources) -> EnlargedJob:
        given = [name for name in _OF_A_CHANGE if getattr(self, name) is not None]
        usual = {name: type(self).model_fields[name].get_default(call_default_factory=True) for name in _OF_A_DRAWING}
        given += [name for name, value in usual.items() if getattr(self, name) != value]
        if given or self.num_images_per_prompt > 1 or self.negative_prompt:
            name = given[0] if given else "num_images_per_prompt and negative_prompt"
            raise CascadeError(f"{name}: cannot be combined with `to`, which only enlarges a picture")
        if self.image is None:
            raise CascadeError("to: no picture to enlarge; set image")
        slots = pipeline.enlargers
        sampling = {name: getattr(self, name) for name in SETTINGS}
        settings = resolve_sampling([slot.config for slot in slots], self.preset, sampling)
        picture = read_picture(sources.picture(self.image), slots[-1].config.pictures)[0]
        task = pipeline.upscale_task(picture, self.prompt, record.seed, settings, self.to)
        task = with_conditions(task, self._given(pipeline, sources))
        height, width = task.passes[-1].size
        if height * width > MOST_PIXELS_ENLARGED:
            raise CascadeError(f"to: {width}x{height} would be drawn; expected at most {MOST_PIXELS_ENLARGED:,} pixels")
        ways = [drawing.slot for drawing in task.passes], [drawing.size for drawing in task.passes]
        return EnlargedJob(record, "", 1, *ways, settings, conditions=task.conditions, task=task)

    @property
    def numbers(self) -> Sequence[int]:
        """Indices of the pictures to draw."""
        return range(self.num_images_per_prompt) if self.number is None else [self.number]

    def to_json(self) -> dict[str, Any]:
        """The explicitly set fields; the seed as text."""
        values = self.model_dump(mode="json", exclude_defaults=True)
        if self.variation is not None:
            values["variation"] = [str(self.variation[0]), self.variation[1]]
        return {**values, "prompt": self.prompt} | ({} if self.seed is None else {"seed": str(self.seed)})


def _value(name: str, value: Any, config: ConditionConfig | None, sources: Sources) -> Any:
    """The value of a condition. Its text is a label, numbers or the name of an upload, never a file of the server."""
    if not isinstance(value, str) or value == NONE:
        return value
    if isinstance(config, PictureCondition):
        picture = Image.fromarray(sources.picture(value, f"condition {name}"))
        return picture.convert("L") if config.labels else picture
    if isinstance(config, VectorCondition):
        try:
            return [float(part) for part in value.split(",")]
        except ValueError:
            raise CascadeError(f"condition {name}: {quoted(value)}; expected {config.dim} numbers") from None
    return value


def _section(value: Any) -> Any:
    """A section of `projection` for a number."""
    return {"parallel": float(value)} if isinstance(value, int | float) else value


class AskedMatrix(Settings):
    """A sheet: one request, drawn with each value of one or two settings."""

    asked: Asked
    """The request; an axis replaces its value."""
    matrix: Annotated[tuple[Annotated[str, Field(max_length=LONGEST_PROMPT)], ...], Field(strict=False)]
    """The columns, and perhaps the rows, such as "steps=4,8"; see docs/editing.md."""

    def read(self) -> Matrix:
        """The axes. Raises CascadeError."""
        matrix = Matrix.read(self.matrix)
        if matrix.has_adapters:
            raise CascadeError(
                "matrix lora: the server's model has its adapters already; draw the sheet by the command"
            )
        if len(matrix) > MOST_PICTURES:
            raise CascadeError(f"matrix: {len(matrix):,} pictures; at most {MOST_PICTURES} are possible here")
        if self.asked.num_images_per_prompt > 1 or self.asked.to is not None or self.asked.trace:
            raise CascadeError("matrix: has one drawn picture per cell; leave out num_images_per_prompt, to and trace")
        return matrix

    def cells(self) -> list[Asked]:
        """The request of each cell, row by row, all with one seed unless an axis has seeds. Raises CascadeError."""
        asked = self.asked.settled()
        assert asked.seed is not None
        return [_with_cell(asked, record) for record in self.read().records(asked.prompt, asked.seed)]


def _with_cell(asked: Asked, record: PromptRecord) -> Asked:
    """The request with the values of a cell. Raises CascadeError for one that is not allowed."""
    own = {name: getattr(record, name) for name in ("negative_prompt", "strength", "preset")}
    given = {name: value for name, value in {**own, **record.sampling}.items() if value is not None}
    values = {**asked.to_json(), **given, "prompt": record.prompt, "seed": str(record.seed)}
    return parse(Asked, values, record.origin)
