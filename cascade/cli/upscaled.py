"""One picture of `cascade upscale`: enlarged with its alpha, EXIF and frames, written, and recognised later."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cascade.errors import CascadeError, StorageError
from cascade.files.parsed import parse_json
from cascade.files.text import json_text
from cascade.text.captions import well_formed

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

    from cascade.files.frames import Frames
    from cascade.finish import Finish
    from cascade.pipeline import CascadePipeline
    from cascade.pixels import PictureFormat

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
        from cascade.files.frames import read_frames
        from cascade.pixels import RGB, RGBA

        try:
            source = hashlib.sha256(Path(image).read_bytes()).hexdigest()
        except OSError as error:
            raise CascadeError(f"{image}: cannot be read: {error.strerror or error}") from None
        asked = {"source_sha256": source, **self.options, **self.finish.described()}
        if target.exists() and self._is_kept(target, asked):
            return "kept"
        form = self._form(image)
        if form not in (RGB, RGBA):
            return self._make_other(image, target, form, asked)
        drawn = self._enlarged(image, read_frames(image))
        _write(target, drawn, self._entry(image, asked, drawn.images[0].size, len(drawn.images)))
        width, height = drawn.images[0].size
        return f"{width}x{height}, {len(drawn.images)} frames" if drawn.is_animated else f"{width}x{height}"

    def _form(self, image: str) -> PictureFormat:
        """The format of the pictures: the model's, or without one that of the file."""
        from cascade.files.picture import open_picture, picture_errors
        from cascade.pixels import RGB, PictureFormat

        if self.pipeline is not None:
            return self.pipeline.enlargers[-1].config.pictures
        with picture_errors(image), open_picture(image) as opened:
            return PictureFormat.of("gray", "uint16") if opened.mode.startswith("I;16") else RGB

    def _make_other(self, image: str, target: Path, form: PictureFormat, asked: Mapping[str, Any]) -> str:
        """`make` for pictures that are neither RGB nor RGBA of 8 bits: one without frames and EXIF, in its own type."""
        import torch
        from PIL import Image

        from cascade.files.frames import Frames
        from cascade.rasters import as_pil, has_pil_mode, read_given

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
        from cascade.files.alpha import is_opaque
        from cascade.files.frames import check_pixels
        from cascade.upscaling import target_size

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
        from cascade.finish import Finish
        from cascade.pixels import RGB, RGBA
        from cascade.rasters import read_stored

        form = RGBA if image.mode == "RGBA" else RGB
        return image if self.finish == Finish() else self.finish.image(read_stored(image, form), form)

    def _one(self, image: Image.Image, opaque: bool) -> Image.Image:
        """A frame as RGB where all are opaque, else as RGBA: an animation has one mode."""
        from cascade.files.alpha import bled, with_alpha

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

    from cascade.checkpoint import atomic_file
    from cascade.files.frames import save_png

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
    from cascade.checkpoint import atomic_file
    from cascade.rasters import write_array

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
    from cascade.files.picture import open_picture
    from cascade.rasters import array_text

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
