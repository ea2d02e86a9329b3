"""`cascade generate --from-image`: a picture is drawn again from what it says of itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
from PIL import Image

from cascade.errors import CascadeError


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
    from cascade.batch import Drawn, DrawOptions, Engine, Job, Task, describe
    from cascade.batch.metadata import encode
    from cascade.config import SamplingConfig
    from cascade.pipeline import CascadePipeline
    from cascade.prompts import PromptRecord
    from cascade.settings import parse

    settings = said["settings"]
    pipeline = CascadePipeline.from_pretrained(model, device=device or settings["device"], dtype=settings["dtype"])
    stages = settings["stages"]
    if pipeline.name != said["model"] or pipeline.stage_names[: len(stages)] != list(stages):
        raise CascadeError(f"{picture}: was drawn by the model {said['model']!r}; name its folder with --model")
    sampling = {name: parse(SamplingConfig, values, f"{picture}: {name}") for name, values in stages.items()}
    record = PromptRecord(said["index"], said["prompt"], said["seed"], origin=picture)
    options = DrawOptions(
        run_seed=said["seed"],
        until=pipeline.slots[len(stages) - 1].config.resolution,
        height=settings["height"],
        width=settings["width"],
        batch_size=settings["batch_size"],
        save_stages=True,
    )
    with Image.open(picture) as image:
        size = image.size
    task = Task(Job(record, said["negative_prompt"], said["num_images"], sampling), said["number"])
    for result in Engine(pipeline, options).draw([task]):
        if isinstance(result, Drawn):
            chosen = next((stage for stage in result.stages.values() if stage.size == size), result.image)
            return encode(chosen, describe(pipeline, result, options), format)[0]
        raise CascadeError(f"{picture}: {result.reason}")
    raise AssertionError("one task has one result")


def _difference(said: dict[str, Any]) -> str:
    return (
        f"not the same bytes; it was drawn by cascade {said['cascade']} on {said['settings']['device']},"
        " and machine, torch version and thread count count too"
    )
