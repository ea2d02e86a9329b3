"""The cascade: prompts -> text -> stage -> stage -> stage -> pictures."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from PIL import Image
from torch import Tensor

from cascade.conditioning import TextEmbeddings
from cascade.conditions.values import recorded, restored, settled
from cascade.config.data import Captions
from cascade.config.sampling import SamplingConfig
from cascade.drawing.arguments import (
    PerStage,
    check_chain,
    check_result,
    check_text_widths,
    conditions_of,
    integer,
    negatives_of,
    one_of,
    one_text,
    positive,
    prompts_of,
    resolve_sampling,
    seeds_of,
    stage_sizes,
)
from cascade.drawing.changes import Changes, GivenRegions, regions_of
from cascade.drawing.edit import Edit, ImageLike, fitted, read_picture, route, target_size, tile_of
from cascade.drawing.engine import Conduct, Engine, default_batch_size
from cascade.drawing.output import Callback, CascadeOutput, Watcher, check_output_arguments
from cascade.drawing.recipe import LONG_PROMPTS, Recipe
from cascade.drawing.slots import StageSlot, TextSlot, adapters_in, check_memory, shortage_names
from cascade.drawing.task import Drawn, Pass, Shelf, Task, passes, with_conditions
from cascade.drawing.texts import script_of
from cascade.errors import CascadeError
from cascade.pictures.format import PictureFormat
from cascade.pictures.images import contact_sheet, digest_of
from cascade.resources.number_format import settled_dtype
from cascade.settings import PICTURES
from cascade.stage import Stage
from cascade.system.device import choose_device
from cascade.text.language import Styles
from cascade.text.t5 import TextEncoder

if TYPE_CHECKING:
    from cascade.storage.saving import Card

_SHEET_CELL = 256  # pixels of a picture on a card's sheet


class CascadePipeline:
    """A text encoder and the stages of a cascade, from the smallest picture to the largest."""

    def __init__(
        self,
        text_encoder: TextEncoder,
        stages: Sequence[Stage | StageSlot],
        *,
        name: str = "unnamed",
        license: str = "unstated",
        enlargers: Sequence[Stage | StageSlot] | None = None,
        reload_text_encoder: Callable[[], TextEncoder] | None = None,
    ) -> None:
        """Raises CascadeError when the sizes of the stages or the width of the text do not fit together.

        enlargers: the super-resolution stages of `upscale`, default those of the cascade; a stage trained to redraw
        the previous stage's pictures does not stay true to a real one. reload_text_encoder: if given, the encoder is
        released after it has read the prompts, and loaded again by this function for the next ones.
        """
        self._text = TextSlot(text_encoder, reload_text_encoder)
        self.slots = _slots(stages)
        self.enlargers = self.slots if enlargers is None else _slots(enlargers)
        self.name, self.license = name, license
        self.styles = Styles()
        """The model's style words, and the default style of prompts that have none."""
        self.device, self.dtype = torch.device("cpu"), torch.float32
        for slot in self.slots:
            if slot.held:
                weight = next(slot.load().network.parameters())
                self.device, self.dtype = weight.device, weight.dtype
                break
        check_chain([slot.config for slot in self.slots], text_encoder.dim)
        check_text_widths([slot.config for slot in self.enlargers], text_encoder.dim)

    @classmethod
    def from_pretrained(
        cls,
        model: str | Path | None = None,
        *,
        super_resolution: str | Path | Sequence[str | Path] | None = None,
        device: str | torch.device | None = None,
        dtype: torch.dtype | str | None = None,
        low_memory: bool = False,
        captions: Captions | None = None,
        text_8bit: bool = False,
        adapters: Mapping[str, str | Path | Sequence[str | Path]] | None = None,
    ) -> CascadePipeline:
        """The bundled cascade (None), a folder, or a hub id; DeepFloyd IF's too, in diffusers' layout.

        super_resolution: stage folders or `model/stage` that replace the model's own stages after the base stage.
        device: default the GPU if there is one. dtype: default float32 on a CPU, bfloat16 on a GPU that supports it;
            `auto`: on a CPU whichever of the two computes faster, see `cascade.resources.number_format`.
        low_memory: stages are loaded one at a time, the text encoder is released after reading the prompts, and a part
            that still does not fit into memory is read from disk layer by layer.
        text_8bit: the text encoder's linear weights are int8; needs the extra `quantized`.
        captions: how prompts are cleaned, "as_is", "lower" or "deepfloyd"; default the model's own setting.
        adapters: folders of low-rank adapters by the name of the stage that they are added to, e.g. {"base": folder} or
            {"base": ["a:0.8", "b:0.5"]}, with the scale of each.
        """
        from cascade.storage.pipeline import LoadOptions, load_pipeline  # a higher layer; see docs/architecture.md

        options = LoadOptions(super_resolution, device, dtype, low_memory, captions, text_8bit, adapters)
        return load_pipeline(model, options)

    @property
    def text_encoder(self) -> TextEncoder:
        """The text encoder; with `low_memory`, without its weights except during a call."""
        return self._text.encoder

    @property
    def stage_names(self) -> list[str]:
        """Names for per-stage arguments, in order."""
        return [slot.config.name for slot in self.slots]

    @property
    def pictures(self) -> PictureFormat:
        """The channels and values of its pictures."""
        return self.slots[0].config.pictures

    @property
    def default_batch_size(self) -> int:
        """Pictures per network call if the caller gives no batch size."""
        return default_batch_size(self.device)

    @torch.inference_mode()
    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        *,
        prompt_embeds: TextEmbeddings | None = None,
        negative_prompt: str | Sequence[str] | None = None,
        num_images_per_prompt: int = 1,
        seed: int | Sequence[int] | None = None,
        until: int | None = None,
        height: int | None = None,
        width: int | None = None,
        steps: PerStage[int] = None,
        guidance: PerStage[float] = None,
        sampler: PerStage[str | Mapping[str, Any]] = None,
        aug_level: PerStage[float] = None,
        threshold: PerStage[float | str] = None,
        guidance_rescale: PerStage[float] = None,
        projection: PerStage[Mapping[str, Any]] = None,
        preset: str | None = None,
        image: ImageLike | None = None,
        mask: ImageLike | None = None,
        strength: PerStage[float] = None,
        extend: Mapping[str, int] | None = None,
        resampling: int = 1,
        known: str = "noised",
        variation: tuple[int, float] | None = None,
        variation_noise: str = "start",
        prompt_language: bool = False,
        long_prompts: str = "cut",
        default_style: str | None = None,
        regions: GivenRegions | None = None,
        conditions: Mapping[str, Any] | Sequence[Mapping[str, Any]] | None = None,
        guidance_of: Mapping[str, float] | None = None,
        batch_size: int | None = None,
        output_type: Literal["pil", "np", "pt"] = "pil",
        progress: bool = False,
        callback: Callback | None = None,
    ) -> CascadeOutput:
        """Draw pictures for prompts, or for embeddings given in their place.

        seed: one for all prompts, one for each, or None for random ones, which the result reports. until: resolution of
        the last stage to run. height, width: of that stage, in pixels. threshold: a quantile, "clip" or "none" (None:
        the stage's default). guidance_rescale, projection: see `SamplingConfig`. preset: "fast", "default" or "best".
        image: a picture to change; mask: white where it is redrawn, elsewhere every bit stays; strength, extend,
        resampling, known, variation, variation_noise: see `cascade.drawing.changes`. prompt_language: prompts may have
        weights and phases, see `cascade.text.language`. long_prompts: beyond the encoder's limit a prompt is "cut", or
        read in windows ("chunk"). default_style: style words for prompts without any, default the model's
        own; "none" adds nothing, as does `prompt_language`. regions: parts with their own prompts, [(box or mask,
        prompt)], a box being (left, top, right, bottom) as shares of width and height. conditions: {"age": 41,
        "layout": picture}, for models that read more than text, for all prompts or one mapping for each; guidance_of: a
        weight of guidance for single ones, see `SamplingConfig`.
        batch_size: pictures per network call, default 1 on a CPU and 8 on a GPU; a short last batch is padded.
        output_type: PIL, NumPy (B, H, W, C) in the data's own type, uint8 for `rgb`, or torch (B, C, H, W) float32 in
        [-1, 1], colours multiplied by alpha where there is one. Raises CascadeError for arguments that do not fit.
        """
        check_output_arguments(output_type, callback, self.pictures)
        prompts = prompts_of(prompt, prompt_embeds, conditions is not None)
        prompts = self._styled(prompts, "none" if prompt_language else default_style)
        seeds = seeds_of(seed, len(prompts))
        slots = self.slots_until(until)
        sampling = {"steps": steps, "guidance": guidance, "sampler": sampler, "aug_level": aug_level}
        sampling |= {"threshold": threshold, "guidance_rescale": guidance_rescale, "projection": projection}
        sampling["guidance_of"] = guidance_of
        settings = resolve_sampling([slot.config for slot in self.slots], preset, sampling)
        configs = [slot.config for slot in slots]
        changes = Changes(image, mask, strength, extend, resampling, variation, known, variation_noise)
        asked = height is not None or width is not None
        edit, size, entries = changes.resolve(configs, stage_sizes(configs, height, width)[-1], asked)
        negative = negatives_of(negative_prompt, len(prompts))
        parts = regions_of(regions)
        if prompt_embeds is not None and (prompt_language or parts.entries):
            raise CascadeError("prompt_embeds: a prompt language or regions need prompts as text")
        entries |= {"language": prompt_language, "regions": parts.entries}
        entries["long_prompts"] = one_of("long_prompts", long_prompts, LONG_PROMPTS)
        values = [settled([c.conditions for c in configs], one) for one in conditions_of(conditions, len(prompts))]
        embeds = self._rows(prompt_embeds, len(prompts))
        numbers = range(positive("num_images_per_prompt", num_images_per_prompt, PICTURES))
        check_result(len(prompts) * len(numbers), size, self.pictures.bytes_per_pixel)
        stages = {slot.config.name: settings[slot.config.name] for slot in slots}
        tasks = [
            self.task(
                Recipe(
                    prompt=prompts[index],
                    negative_prompt=negative[index],
                    seed=seeds[index],
                    number=number,
                    height=size[0],
                    width=size[1],
                    stages=stages,
                    adapters=adapters_in(slots),
                    conditions=recorded(values[index]),
                    **entries,
                ),
                embeds[index],
                edit,
                parts.masks,
                values[index],
            )
            for index in range(len(prompts))
            for number in numbers
        ]
        count = positive("batch_size", self.default_batch_size if batch_size is None else batch_size, PICTURES)
        with Watcher(progress, callback) as watcher:
            drawn = self.engine(Conduct(count, keep_stages=True, on_step=watcher.step)).draw_all(tasks)
        return self._output(slots, drawn, output_type)

    def _output(
        self, slots: Sequence[StageSlot], drawn: Sequence[Drawn], output_type: Literal["pil", "np", "pt"]
    ) -> CascadeOutput:
        """The pictures of every stage, in the requested type."""
        pixels = {
            slot.config.resolution: torch.stack([result.pixels[place] for result in drawn])
            for place, slot in enumerate(slots)
        }
        recipes = [result.task.recipe for result in drawn]
        seeds, prompts = ([getattr(recipe, name) for recipe in recipes] for name in ("seed", "prompt"))
        return CascadeOutput.of(pixels, output_type, seeds, prompts, self.pictures)

    @torch.inference_mode()
    def upscale(
        self,
        image: ImageLike,
        *,
        prompt: str = "",
        conditions: Mapping[str, Any] | None = None,
        to: int | None = None,
        tile: int | None = None,
        seed: int | None = None,
        steps: PerStage[int] = None,
        guidance: PerStage[float] = None,
        sampler: PerStage[str | Mapping[str, Any]] = None,
        aug_level: PerStage[float] = None,
        threshold: PerStage[float | str] = None,
        preset: str | None = None,
        output_type: Literal["pil", "np", "pt"] = "pil",
        progress: bool = False,
        callback: Callback | None = None,
    ) -> CascadeOutput:
        """Enlarge a picture of any size with the super-resolution stages in `enlargers`; its aspect ratio is kept.

        image: a PIL picture, a path, or NumPy uint8 (H, W, 3 or 4); transparent parts become white. prompt: a
        description of it. conditions: those of the stages in use, as for drawing. to: longer side of the result,
        default the last stage's. `cascade.drawing.edit.route` gives the sequence of stages; a result larger than `to`
        is averaged down. tile: side of the square tiles in which the network draws, see `Stage.tiled`; results above
        4 megapixels always use tiles, of 1024 by default.
        `stages` of the result are keyed by the longer side. Raises CascadeError for arguments that do not fit.
        """
        form = self.enlargers[-1].config.pictures
        check_output_arguments(output_type, callback, form)
        pixels = read_picture(image, form)
        text, (own_seed,) = one_text("prompt", prompt), seeds_of(seed, 1)
        settings = resolve_sampling(
            [slot.config for slot in self.enlargers],
            preset,
            {"steps": steps, "guidance": guidance, "sampler": sampler, "aug_level": aug_level, "threshold": threshold},
        )
        task = with_conditions(self.upscale_task(pixels[0], text, own_seed, settings, to, tile), conditions or {})
        with Watcher(progress, callback) as watcher:
            engine = self.engine(Conduct(1, keep_stages=True, on_step=watcher.step))
            (drawn,) = engine.draw_all([task])
        pictures = [picture[None] for picture in drawn.pixels]
        pictures[-1] = fitted(pictures[-1], (task.recipe.height, task.recipe.width), form)
        stages = {max(picture.shape[-2:]): picture for picture in pictures}
        return CascadeOutput.of(stages, output_type, [own_seed], [text], form)

    def save_pretrained(self, folder: str | Path, dtype: torch.dtype | None = None, card: Card | None = None) -> None:
        """Write one folder: cascade.json, text_encoder/, one folder per stage in safetensors, and a card; atomically.

        dtype: number format of the stage weights, default their own. card: what its README.md adds to stages, licence
        and how to draw; a sheet of its prompts is drawn. An existing cascade in `folder` is replaced, except for a
        README.md that was written by hand; raises CascadeError if the folder holds anything else.
        """
        from cascade.storage.saving import Card, Parts, write_model  # a higher layer

        card = card or Card()
        enlargers = None if self.enlargers is self.slots else self.enlargers
        sheet = self._sheet(card.prompts) if card.prompts else None
        parts = Parts(self._text.load(), self.slots, enlargers, self.name, self.license, card, sheet, self.styles)
        write_model(folder, parts, dtype)

    def _sheet(self, prompts: Sequence[str]) -> Image.Image:
        """Pictures of prompts with seeds 0, 1, 2, ... and the prompts under them."""
        drawn = self(list(prompts), seed=list(range(len(prompts))))
        return contact_sheet(drawn.images, min(4, len(prompts)), list(prompts), cell=_SHEET_CELL)

    def push_to_hub(self, repo: str, *, private: bool = False, card: Card | None = None) -> None:
        """Upload the folder that `save_pretrained` writes to a model repository of the Hugging Face hub."""
        from cascade.storage.saving import model_for_hub  # a higher layer

        with model_for_hub(repo, private) as folder:
            self.save_pretrained(folder, card=card)

    def to(self, device: str | torch.device | None = None, dtype: torch.dtype | str | None = None) -> CascadePipeline:
        """Move the stages to a device and number format. The text encoder moves too, but keeps its own format.

        Raises CascadeError, before anything moves, for a device that is missing or a format that it does not support.
        """
        target = self.device if device is None else choose_device(device)
        configs = [slot.config for slot in self.slots]
        number_format = settled_dtype(self.dtype if dtype is None else dtype, target, configs)
        self._text.load().to(device=target)
        shared = self.enlargers is self.slots
        moved = {id(slot): slot.moved(target, number_format) for slot in [*self.slots, *self.enlargers]}
        self.device, self.dtype = target, number_format
        self.slots = [moved[id(slot)] for slot in self.slots]
        self.enlargers = self.slots if shared else [moved[id(slot)] for slot in self.enlargers]
        return self

    def encode(self, texts: Sequence[str]) -> TextEmbeddings:
        """Embeddings of texts, each encoded alone and padded to the full length; `low_memory` then releases T5."""
        with self._text.reading() as encoder:
            embeddings = encoder.encode(texts)
        return embeddings.padded(max(encoder.max_length, embeddings.tokens.shape[1]))

    def task(
        self,
        recipe: Recipe,
        text: TextEmbeddings | None = None,
        edit: Edit | None = None,
        masks: Mapping[str, Tensor] | None = None,
        conditions: Mapping[str, Any] | None = None,
    ) -> Task:
        """A recipe as a task for the engine. text, edit, masks, conditions: see `Task`.

        Raises CascadeError if no stage can draw it, and for a mistake in the prompt language.
        """
        script_of(recipe)
        slots = self.slots[: len(recipe.stages)]
        sizes = stage_sizes([slot.config for slot in slots], recipe.height, recipe.width)
        values = restored([slot.config.conditions for slot in slots], recipe.conditions, conditions or {})
        ways = passes(slots, sizes, recipe)
        return Task(recipe, ways, edit=edit, text=text, masks=masks or {}, conditions=values)

    def upscale_task(
        self,
        picture: Tensor,
        prompt: str,
        seed: int,
        settings: Mapping[str, SamplingConfig],
        to: int | None = None,
        tile: int | None = None,
    ) -> Task:
        """Task that enlarges a picture, (C, h, w) as stored; see `upscale`.

        settings: for each stage in `enlargers`. The recipe holds the requested size; the last stage may draw a larger
        picture, which the caller averages down. Raises CascadeError for a size that cannot be drawn.
        """
        configs = [slot.config for slot in self.enlargers]
        height, width = target_size(configs, (picture.shape[-2], picture.shape[-1]), to)
        places = route(configs, max(picture.shape[-2:]), max(height, width))
        if tile is not None:
            positive("tile", tile)
        last = configs[places[-1]]
        with shortage_names(last.name):  # now, not after all the stages before
            check_memory(last, (height, width), 1, self.device, self.dtype, tile_of(tile, (height, width), last))
        scaled, ways = tuple(picture.shape[-2:]), list[Pass]()
        for step, place in enumerate(places):
            slot = self.enlargers[place]
            scaled = (scaled[0] * slot.config.scale, scaled[1] * slot.config.scale)
            side = tile_of(tile, scaled, slot.config)
            ways.append(Pass(slot, scaled, settings[slot.config.name], places[:step].count(place), tile=side))
        recipe = Recipe(
            prompt=prompt,
            negative_prompt="",
            seed=seed,
            number=0,
            height=height,
            width=width,
            stages={drawing.slot.config.name: drawing.settings for drawing in ways},
            source=digest_of(picture),
            adapters=adapters_in({drawing.slot.config.name: drawing.slot for drawing in ways}.values()),
        )
        return Task(recipe, ways, start=picture)

    def engine(self, conduct: Conduct | None = None, shelf: Shelf | None = None) -> Engine:
        """An engine that draws tasks with this pipeline's stages on their current device."""
        return Engine(self.encode, self.device, conduct, shelf, lambda text: self.text_encoder.windows(text))

    def _styled(self, prompts: Sequence[str], default_style: str | None) -> list[str]:
        styles = self.styles.choose(default_style)
        return [styles.added(prompt) for prompt in prompts]

    def _rows(self, embeds: TextEmbeddings | None, count: int) -> list[TextEmbeddings] | list[None]:
        """The given embeddings, one row per prompt, or None for each. Raises CascadeError for another width."""
        if embeds is None:
            return [None] * count
        width, expected = embeds.tokens.shape[-1], self.text_encoder.dim
        if width != expected:
            raise CascadeError(f"prompt_embeds: width {width}, this cascade reads {expected}")
        return [embeds.select([row]) for row in range(count)]

    def slots_until(self, until: int | None) -> list[StageSlot]:
        """The stages up to the one that draws `until` px; all for None. Raises CascadeError."""
        resolutions = [slot.config.resolution for slot in self.slots]
        if until is None:
            return self.slots
        if integer("until", until) not in resolutions:
            raise CascadeError(f"until: no stage draws {until} px; choose one of {', '.join(map(str, resolutions))}")
        return self.slots[: resolutions.index(until) + 1]


def _slots(stages: Sequence[Stage | StageSlot]) -> list[StageSlot]:
    return [StageSlot.holding(stage) if isinstance(stage, Stage) else stage for stage in stages]
