"""`cascade generate --from-image`: draws a picture again from the metadata inside it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cascade._version import __version__
from cascade.cli.terminal import say
from cascade.errors import CascadeError, StorageError, quoted
from cascade.files.text import content_of

if TYPE_CHECKING:
    from cascade.batch.request import BatchRequest
    from cascade.drawing.changes import Changes
    from cascade.drawing.edit import Edit
    from cascade.drawing.recipe import Recipe
    from cascade.drawing.task import Task
    from cascade.pipeline import CascadePipeline


def redraw(picture: str, request: BatchRequest) -> int:
    """Draw `picture` again into the request's folder, to the same bytes; returns the exit status.

    request: holds the model, the device, and the picture to change, if there was one; with `overwrite` an existing
    picture of cascade is replaced. Raises CascadeError when the picture has no metadata, or was drawn by another model,
    and for a file that would be overwritten.
    """
    from cascade.batch.metadata import read_metadata

    metadata, format = read_metadata(picture)
    target = Path(request.out) / Path(picture).name
    if target.exists() and target.samefile(picture):
        raise CascadeError(f"{picture}: would be overwritten; name another folder with --out")
    if target.exists():
        read_metadata(target)  # another program's picture is refused before anything is drawn, and kept
    content = _drawn_again(metadata, format, picture, request)
    same = content == content_of(picture)
    if target.exists() and not request.overwrite and target.read_bytes() != content:
        raise CascadeError(f"{target}: exists, and is another picture; give --overwrite, or name another --out")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(content)
    except OSError as error:
        raise StorageError(f"{target}: cannot be written: {error.strerror or error}") from None
    say(f"{target}: {'the same bytes' if same else _difference(metadata)}")
    return 0 if same else 1


def _drawn_again(metadata: dict[str, Any], format: str, picture: str, request: BatchRequest) -> bytes:
    """The content of the picture file, as the original run wrote it; an earlier stage's picture by its size."""
    from cascade.batch.metadata import encode
    from cascade.drawing.engine import Conduct
    from cascade.drawing.recipe import Recipe
    from cascade.drawing.slots import adapters_in
    from cascade.drawing.task import Drawn
    from cascade.pictures.finish import Finish
    from cascade.pictures.rasters import size_of
    from cascade.pipeline import CascadePipeline

    recipe = Recipe.from_json(metadata, picture)
    if recipe.source:
        raise CascadeError(f"{picture}: was enlarged from another picture; enlarge that one with `cascade upscale`")
    settings = metadata["settings"]
    pipeline = CascadePipeline.from_pretrained(
        request.model, device=request.device or settings["device"], dtype=settings["dtype"], adapters=request.adapters()
    )
    if adapters_in(pipeline.slots[: len(recipe.stages)]) != recipe.adapters:
        raise CascadeError(f"{picture}: was drawn with {_named(recipe.adapters)}; give exactly these with --lora")
    if pipeline.name != metadata["model"] or pipeline.stage_names[: len(recipe.stages)] != list(recipe.stages):
        raise CascadeError(
            f"{picture}: was drawn by the model {quoted(metadata['model'])}; name its folder with --model"
        )
    size = size_of(picture)
    engine = pipeline.engine(Conduct(settings["batch_size"], keep_stages=True))
    (result,) = engine.draw([_task(recipe, pipeline, picture, request)])
    if not isinstance(result, Drawn):
        raise CascadeError(f"{picture}: {result.reason}")
    finish, form = Finish.of(settings), pipeline.pictures
    *smaller, last = result.pixels
    plain = replace(finish, palette=None, scale=1)
    chosen = next((plain(one, form) for one in smaller if one.shape[-2:] == size[::-1]), finish(last, form))
    used = {"device": pipeline.device.type, "dtype": str(pipeline.dtype).removeprefix("torch.")}
    entry = {**metadata, "cascade": __version__, "settings": {**settings, **used}}
    return encode(chosen, finish.result(form), entry, format)[0]


def _task(recipe: Recipe, pipeline: CascadePipeline, picture: str, request: BatchRequest) -> Task:
    """The task that drew the picture. Raises CascadeError when a file that it was drawn with is not given."""
    from cascade.drawing.changes import regions_of

    masks = regions_of(request.regions).masks
    if any(region.mask and region.mask not in masks for region in recipe.regions):
        raise CascadeError(f"{picture}: was drawn with masks of regions; name each with --region, as when it was drawn")
    edit = _edit(recipe, pipeline, picture, request.changes())
    return pipeline.task(recipe, edit=edit, masks=masks, conditions=request.conditions)


def _named(adapters: Mapping[str, Mapping[str, float]]) -> str:
    """The adapters of a recipe as words."""
    lines = [f"{digest}:{scale:g} on {stage}" for stage, each in adapters.items() for digest, scale in each.items()]
    return f"the adapters {', '.join(lines)}" if lines else "no adapters"


def _edit(recipe: Recipe, pipeline: CascadePipeline, picture: str, changes: Changes) -> Edit | None:
    """The edit that made the picture. Raises CascadeError when the command line has another one, or none."""
    if not recipe.image:
        return None
    if changes.image is None:
        raise CascadeError(f"{picture}: was made from another picture; name it with --image, and its mask with --mask")
    configs = [slot.config for slot in pipeline.slots[: len(recipe.stages)]]
    edit, _, own = changes.resolve(configs, (recipe.height, recipe.width), asked=True)
    if (own["image"], own["mask"]) != (recipe.image, recipe.mask):
        raise CascadeError(f"{picture}: was made from another picture or mask than those in --image and --mask")
    return edit


def _difference(metadata: dict[str, Any]) -> str:
    return (
        f"not the same bytes; it was drawn by cascade {metadata['cascade']} on {metadata['settings']['device']},"
        " and the bytes also depend on machine, torch version and thread count"
    )
