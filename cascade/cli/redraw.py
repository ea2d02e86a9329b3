"""`cascade generate --from-image`: a picture is drawn again from what it says of itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from cascade._version import __version__
from cascade.errors import CascadeError
from cascade.files.picture import open_picture


def redraw(picture: str, *, model: str | None, out: str, device: str | None) -> int:
    """Draw `picture` again into the folder `out`, to the same bytes; the exit status.

    Raises CascadeError when it says nothing of itself, or was drawn by another model.
    """
    from cascade.batch import read_metadata

    said, format = read_metadata(picture)
    target = Path(out) / Path(picture).name
    if target.exists() and target.samefile(picture):
        raise CascadeError(f"{picture}: would be overwritten; name another folder with --out")
    content = _drawn(said, format, picture, model, device)
    same = content == Path(picture).read_bytes()
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(content)
    except OSError as error:
        raise CascadeError(f"{target}: cannot be written: {error.strerror or error}") from None
    click.echo(f"{target}: {'the same bytes' if same else _difference(said)}")
    return 0 if same else 1


def _drawn(said: dict[str, Any], format: str, picture: str, model: str | None, device: str | None) -> bytes:
    """The file, as the run that wrote it would; the smaller picture of a stage is known by its size."""
    from cascade.batch.metadata import encode
    from cascade.drawing.engine import Conduct
    from cascade.drawing.recipe import Recipe
    from cascade.drawing.task import Drawn
    from cascade.images import to_pil
    from cascade.pipeline import CascadePipeline

    recipe = Recipe.from_json(said, picture)
    settings = said["settings"]
    pipeline = CascadePipeline.from_pretrained(model, device=device or settings["device"], dtype=settings["dtype"])
    if pipeline.name != said["model"] or pipeline.stage_names[: len(recipe.stages)] != list(recipe.stages):
        raise CascadeError(f"{picture}: was drawn by the model {said['model']!r}; name its folder with --model")
    with open_picture(picture, limited=False) as image:
        size = image.size
    engine = pipeline.engine(Conduct(settings["batch_size"], keep_stages=True))
    (result,) = engine.draw([pipeline.task(recipe)])
    if not isinstance(result, Drawn):
        raise CascadeError(f"{picture}: {result.reason}")
    images = [to_pil(pixels[None])[0] for pixels in result.pixels]
    chosen = next((image for image in images if image.size == size), images[-1])
    used = {"device": pipeline.device.type, "dtype": str(pipeline.dtype).removeprefix("torch.")}
    return encode(chosen, {**said, "cascade": __version__, "settings": {**settings, **used}}, format)[0]


def _difference(said: dict[str, Any]) -> str:
    return (
        f"not the same bytes; it was drawn by cascade {said['cascade']} on {said['settings']['device']},"
        " and machine, torch version and thread count count too"
    )
