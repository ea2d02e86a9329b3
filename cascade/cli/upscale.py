"""`cascade upscale`: enlarges your own pictures with the super-resolution stages."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cascade.cli.generate import conditions_option, for_stages
from cascade.cli.terminal import path_argument, path_option, say
from cascade.config.values import PRESETS, SETTINGS, number, threshold_value, whole_number
from cascade.errors import CascadeError, StorageError
from cascade.files.paths import alike, portable
from cascade.files.text import content_of, json_text, open_regular, parse_json
from cascade.seeds import MAX_SEED
from cascade.text.language import well_formed

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

    from cascade.pictures.finish import Finish
    from cascade.pictures.format import PictureFormat
    from cascade.pictures.frames import Frames
    from cascade.pipeline import CascadePipeline


# --- one picture -----------------------------------------------------------------------------------------------------
# One picture of `cascade upscale`: enlarged with its alpha, EXIF and frames, written, and recognised later.

MANIFEST = "manifest.jsonl"


@dataclass(frozen=True)
class Enlarger:
    """Enlarges pictures with the settings of one call.

    pipeline: None: nothing draws, `finish` alone enlarges. options: arguments of `CascadePipeline.upscale`. finish:
    what is done to the enlarged pictures.
    """

    pipeline: CascadePipeline | None
    options: Mapping[str, Any]
    overwrite: bool
    finish: Finish

    def make(self, image: str, target: Path) -> str:
        """Write one picture and its manifest line; returns a message. Raises CascadeError."""
        from cascade.pictures.format import RGB, RGBA
        from cascade.pictures.frames import read_frames

        try:
            source = hashlib.sha256(content_of(image)).hexdigest()
        except OSError as error:
            raise CascadeError(f"{image}: cannot be read: {error.strerror or error}") from None
        asked = {"source_sha256": source, **self._settings(), **self.finish.described()}
        if target.exists() and self._is_kept(target, asked):
            return "kept"
        form = self._form(image)
        if form not in (RGB, RGBA):
            return self._make_other(image, target, form, asked)
        drawn = self._enlarged(image, read_frames(image))
        _write(target, drawn, self._entry(image, asked, drawn.images[0].size, len(drawn.images)))
        width, height = drawn.images[0].size
        return f"{width}x{height}, {len(drawn.images)} frames" if drawn.is_animated else f"{width}x{height}"

    def _settings(self) -> dict[str, Any]:
        """The options as a manifest has them: pictures and vectors among the conditions by digest."""
        from cascade.conditions.values import recorded

        plain = {name: value for name, value in self.options.items() if name != "conditions"}
        conditions = recorded(self.options.get("conditions", {}))
        return plain | ({"conditions": conditions} if conditions else {})

    def _form(self, image: str) -> PictureFormat:
        """The format of the pictures: the model's, or without one that of the file."""
        from cascade.pictures.format import RGB, PictureFormat
        from cascade.pictures.reading import open_picture, picture_errors

        if self.pipeline is not None:
            return self.pipeline.enlargers[-1].config.pictures
        with picture_errors(image), open_picture(image) as opened:
            return PictureFormat.of("gray", "uint16") if opened.mode.startswith("I;16") else RGB

    def _make_other(self, image: str, target: Path, form: PictureFormat, asked: Mapping[str, Any]) -> str:
        """`make` for pictures that are neither RGB nor RGBA of 8 bits: one without frames and EXIF, in its own type."""
        import torch
        from PIL import Image

        from cascade.pictures.frames import Frames
        from cascade.pictures.rasters import as_pil, has_pil_mode, read_given

        pixels = read_given(image, form, image)
        if self.pipeline is not None:
            given = pixels.permute(1, 2, 0).numpy()
            (drawn,) = self.pipeline.upscale(given, **self.options, output_type="np").images
            pixels = torch.from_numpy(drawn).permute(2, 0, 1)
        pixels = self.finish(pixels, form)
        size = (pixels.shape[-1], pixels.shape[-2])
        entry = self._entry(image, asked, size, 1)
        if has_pil_mode(form):
            _write(target, Frames([as_pil(pixels, form)], [0.0], 0, Image.Exif()), entry)
        else:
            _write_array(target, pixels, form, entry)
        return f"{size[0]}x{size[1]}"

    def _is_kept(self, target: Path, asked: Mapping[str, Any]) -> bool:
        """Whether the existing picture is the requested one. Raises CascadeError if it must not be replaced."""
        same = _is_from(target, json.loads(json.dumps(asked)))
        if same is None:
            raise CascadeError(f"{target}: exists, and `cascade upscale` did not write it; move it")
        if not same and not self.overwrite:
            raise CascadeError(f"{target}: exists, but from another call; give --overwrite, or name another --out")
        return same and not self.overwrite

    def _enlarged(self, name: str, frames: Frames) -> Frames:
        """Every frame, enlarged separately. All have the same noise, so that still parts do not flicker."""
        from cascade.drawing.edit import target_size
        from cascade.pictures.frames import check_pixels, is_opaque

        width, height = frames.images[0].size
        if self.pipeline is None:
            scale = self.finish.scale
            check_pixels(name, len(frames.images), (width * scale, height * scale))
            return replace(frames, images=[self._finished(image) for image in frames.images])
        configs = [slot.config for slot in self.pipeline.enlargers]
        height, width = target_size(configs, (height, width), self.options["to"])
        check_pixels(name, len(frames.images), (width, height))
        opaque = all(is_opaque(image) for image in frames.images)
        return replace(frames, images=[self._finished(self._one(image, opaque)) for image in frames.images])

    def _finished(self, image: Image.Image) -> Image.Image:
        """The picture with its palette, scale and background."""
        from cascade.pictures.finish import Finish
        from cascade.pictures.format import RGB, RGBA
        from cascade.pictures.rasters import read_stored

        form = RGBA if image.mode == "RGBA" else RGB
        return image if self.finish == Finish() else self.finish.image(read_stored(image, form), form)

    def _one(self, image: Image.Image, opaque: bool) -> Image.Image:
        """A frame as RGB where all are opaque, else as RGBA: an animation has one mode."""
        from cascade.pictures.frames import bled, with_alpha

        assert self.pipeline is not None
        if self.pipeline.enlargers[-1].config.pictures.alpha:
            (drawn,) = self.pipeline.upscale(image, **self.options).images
            return drawn.convert("RGB") if opaque else drawn
        whole = image if image.mode == "RGBA" else image.convert("RGBA")
        colours = image.convert("RGB") if opaque else bled(whole)
        (drawn,) = self.pipeline.upscale(colours, **self.options).images
        return drawn if opaque else with_alpha(drawn, whole.getchannel("A"))

    def _entry(self, image: str, asked: Mapping[str, Any], size: tuple[int, int], frames: int) -> dict[str, Any]:
        """The entry for the picture's metadata and the manifest."""
        from cascade._version import __version__

        pipeline, (width, height) = self.pipeline, size
        if pipeline is None:
            about = {"source": Path(image).name, "width": width, "height": height}
            return {**about, "cascade": __version__, "upscale": asked}
        return {
            "source": Path(image).name,
            "prompt": self.options["prompt"],
            "seed": self.options["seed"],
            "width": width,
            "height": height,
            **({"frames": frames} if frames > 1 else {}),
            "model": pipeline.name,
            "license": pipeline.license,
            "cascade": __version__,
            "settings": {"device": pipeline.device.type, "dtype": str(pipeline.dtype).removeprefix("torch.")},
            "upscale": asked,
        }


def _write(target: Path, drawn: Frames, entry: Mapping[str, Any]) -> None:
    """Write the picture in full, then its manifest line. Raises CascadeError when they cannot be written."""
    from PIL.PngImagePlugin import PngInfo

    from cascade.files.atomic import atomic_file
    from cascade.pictures.frames import save_png

    chunks = PngInfo()
    for name, value in entry.items():
        chunks.add_itxt(name, well_formed(value) if isinstance(value, str) else json.dumps(value))
    try:
        with atomic_file(target) as temporary:
            save_png(temporary, drawn, chunks)
        _note(target, entry)
    except OSError as error:
        raise StorageError(f"{target}: cannot be written: {error.strerror or error}") from None


def _write_array(target: Path, pixels: Tensor, form: PictureFormat, entry: Mapping[str, Any]) -> None:
    """`_write` of a TIFF."""
    from cascade.files.atomic import atomic_file
    from cascade.pictures.rasters import write_array

    try:
        with atomic_file(target) as temporary, temporary.open("wb") as file:
            write_array(file, pixels, form, "tiff", json.dumps(entry))
        _note(target, entry)
    except OSError as error:
        raise StorageError(f"{target}: cannot be written: {error.strerror or error}") from None


def _note(target: Path, entry: Mapping[str, Any]) -> None:
    """Append the picture's line to the manifest. Raises OSError."""
    line = {"file": target.name, **entry, "sha256": hashlib.sha256(target.read_bytes()).hexdigest()}
    with (target.parent / MANIFEST).open("a", encoding="utf-8", newline="\n") as manifest:
        manifest.write(json_text(line) + "\n")


def _is_from(target: Path, asked: Any) -> bool | None:
    """Whether the existing picture is complete and from the same request; None: cascade did not write it."""
    from cascade.pictures.rasters import array_text
    from cascade.pictures.reading import open_picture

    try:
        if target.suffix == ".tif":
            recorded = parse_json(array_text(target)).get("upscale")
            return None if not isinstance(recorded, dict) else recorded == asked
        # Without a size limit: it is decoded only if its metadata says that cascade wrote it.
        with open_picture(target, limited=False) as image:
            recorded = parse_json(image.info.get("upscale", "null"))
            if not isinstance(recorded, dict):
                return None
            return bool(recorded == asked) and _is_whole(image)
    except (OSError, SyntaxError, ValueError, TypeError, AttributeError):
        return None


def _is_whole(image: Image.Image) -> bool:
    """Whether every frame can be decoded."""
    try:
        for place in range(getattr(image, "n_frames", 1)):
            image.seek(place)
            image.load()
    except (OSError, SyntaxError, ValueError, EOFError):
        return False
    return True


# --- upscale ---------------------------------------------------------------------------------------------------------

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
@click.option(
    "--condition",
    "conditions",
    multiple=True,
    callback=conditions_option,
    metavar="NAME=VALUE",
    help="A condition of the stages: age=41, layout=FILE, or none.",
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
    from cascade.conditions.values import given_values
    from cascade.drawing.arguments import resolve_sampling
    from cascade.pictures.finish import Finish, read_palette
    from cascade.pictures.format import RGBA
    from cascade.pictures.rasters import file_formats
    from cascade.pipeline import CascadePipeline
    from cascade.storage.index import read_index
    from cascade.storage.stage import read_config

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
        options["conditions"] = given_values([config.conditions for config in configs], options["conditions"])
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
        with open_regular(path) as file:
            first = parse_json(file.readline() or b"{}")
        ours = isinstance(first, dict) and (not first or "upscale" in first)
    except (OSError, ValueError):
        ours = False
    if not ours:
        raise CascadeError(f"{path}: not written by `cascade upscale`; name another folder with --out")
