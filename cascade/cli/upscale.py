"""`cascade upscale`: enlarges your own pictures with the super-resolution stages."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from cascade.cli.generate import for_stages
from cascade.cli.paths import path_argument, path_option
from cascade.cli.say import say
from cascade.cli.upscaled import MANIFEST, Enlarger
from cascade.errors import CascadeError, StorageError
from cascade.files.names import alike, portable
from cascade.files.parsed import parse_json
from cascade.seeds import MAX_SEED
from cascade.values import PRESETS, SETTINGS, number, threshold_value, whole_number

_POSITIVE = click.IntRange(min=1)


@click.command()
@path_argument("images", metavar="IMAGE...", nargs=-1, required=True)
@click.option("--prompt", default="", metavar="TEXT", help="Description of the pictures.")
@click.option("--to", type=_POSITIVE, metavar="N", help="Longer side of the result; default: the last stage's size.")
@click.option("--tile", type=_POSITIVE, metavar="N", help="Draw in square tiles of this side, which takes less memory.")
@path_option("--model", metavar="MODEL", help="A folder or hub id; default: the bundled cascade.")
@path_option("--out", default="upscaled", show_default=True, metavar="FOLDER", help="Folder of the pictures.")
@click.option("--overwrite", is_flag=True, help="Replace existing pictures.")
@click.option(
    "--seed", type=click.IntRange(0, MAX_SEED), default=0, show_default=True, help="Same seed, same pictures."
)
@for_stages("--steps", whole_number, "Sampling steps, e.g. 2 or sr256=4,sr1024=2.")
@for_stages("--guidance", number, "Weight of the prompt, 1 = none.")
@for_stages("--sampler", str, "By name; docs/configuration.md lists them.")
@for_stages("--aug-level", number, "Noise on the smaller picture, 0 to 1.")
@for_stages("--threshold", threshold_value, "A quantile such as 0.995, clip, or none.")
@click.option("--preset", type=click.Choice(PRESETS), help="Steps and samplers chosen for speed or quality.")
@click.option("--device", help="cpu, cuda, cuda:1, ...; default: the GPU if there is one.")
@click.option(
    "--dtype",
    help="float32, bfloat16, float16, or auto, the fastest; default: bfloat16 if the GPU supports it, else float32.",
)
@click.option("--low-memory", is_flag=True, help="Hold one stage in memory at a time.")
@click.option("--scale", type=_POSITIVE, metavar="N", help="With --nearest: each pixel becomes a square of this side.")
@click.option("--nearest", is_flag=True, help="Enlarge by --scale without smoothing and without a model.")
@path_option("--palette", metavar="N|FILE", help="Limit the colours: a number, or .hex, .gpl, .pal, or a picture.")
@click.option(
    "--background", type=click.Choice(("white", "checker", "none")), default="none", help="Behind transparency."
)
@click.option("--quiet", is_flag=True, help="Print only failures.")
def upscale(
    images: tuple[str, ...],
    model: str | None,
    out: str,
    overwrite: bool,
    device: str | None,
    dtype: str | None,
    low_memory: bool,
    scale: int | None,
    nearest: bool,
    palette: str | None,
    background: str,
    quiet: bool,
    **options: Any,
) -> int:
    """Enlarge pictures of any size and aspect ratio.

    Each becomes FOLDER/NAME.png (.tif where png cannot hold the values) with metadata about how it was made, and a line
    in manifest.jsonl. Existing pictures from the same call are kept. Transparency, EXIF and the frames of an animation
    are preserved (as an animated PNG).

    \b
    cascade upscale photo.jpg --prompt "a red apple, noto style"
    cascade upscale out/*.png --to 4096 --tile 512
    cascade upscale sprite.png --scale 8 --nearest --palette 16
    """
    from cascade.finish import Finish, read_palette
    from cascade.load.index import read_index
    from cascade.load.stage import read_config
    from cascade.pipeline import CascadePipeline
    from cascade.pixels import RGBA
    from cascade.rasters import file_formats
    from cascade.sampling import resolve_sampling

    if (scale is not None) != nearest:
        raise CascadeError("--scale N and --nearest belong together; without them --to sets the size")
    if nearest and options["to"] is not None:
        raise CascadeError("--to: --nearest enlarges by whole numbers; give --scale instead")
    finish = Finish.of(
        {"palette": None if palette is None else read_palette(palette), "scale": scale or 1, "background": background}
    )
    if nearest:
        enlarger = Enlarger(None, {}, overwrite, finish)
        targets = _targets(images, Path(out), "png")
    else:
        index = read_index(model)
        form = read_config((index.enlargers or index.stages)[-1]).pictures
        finish.check(form if not form.is_rgb else RGBA)  # `rgb` stages keep the transparency of a picture
        targets = _targets(images, Path(out), "png" if "png" in file_formats(form) else "tif")
        pipeline = CascadePipeline.from_pretrained(model, device=device, dtype=dtype, low_memory=low_memory)
        sampling = {name: options[name] for name in SETTINGS}
        configs = [slot.config for slot in pipeline.enlargers]
        resolve_sampling(configs, options["preset"], sampling)  # to report a mistake once, not for each picture
        enlarger = Enlarger(pipeline, options, overwrite, finish)
    failed = 0
    for image, target in targets.items():
        try:
            done = enlarger.make(image, target)
        except CascadeError as error:
            failed += 1
            named = "" if str(error).startswith((image, str(target))) else f"{image}: "
            say(f"cascade: error: {named}{error}", error=True)
        else:
            if not quiet:
                say(f"{target}: {done}")
    if failed == len(targets):
        return 2
    return 1 if failed else 0


def _targets(images: tuple[str, ...], out: Path, ending: str) -> dict[str, Path]:
    """The output file of each picture. Raises CascadeError when two are the same, or `out` is not a folder."""
    targets: dict[str, Path] = {}
    taken: dict[str, str] = {}
    for image in dict.fromkeys(images):
        target = out / f"{portable(Path(image).stem)}.{ending}"
        same = alike(target.name)
        if same in taken:
            raise CascadeError(f"{image}: would become {target}, as {taken[same]} does; use two --out folders")
        if target.exists() and Path(image).exists() and target.samefile(image):
            raise CascadeError(f"{image}: would be overwritten; name another folder with --out")
        targets[image], taken[same] = target, image
    _check_manifest(out)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(f"--out {out}: cannot be written: {error.strerror or error}") from None
    return targets


def _check_manifest(out: Path) -> None:
    """Raises CascadeError if another program wrote the folder's manifest; neither could continue a mixed one."""
    path = out / MANIFEST
    if not path.exists():
        return
    try:
        with path.open(encoding="utf-8") as file:
            first = parse_json(file.readline() or "{}")
        ours = isinstance(first, dict) and (not first or "upscale" in first)
    except (OSError, ValueError):
        ours = False
    if not ours:
        raise CascadeError(f"{path}: not written by `cascade upscale`; name another folder with --out")
