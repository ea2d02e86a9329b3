"""What a picture says of itself: enough to draw the same bytes again. Inside PNG, WebP and JPEG."""

from __future__ import annotations

import io
import json
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image, UnidentifiedImageError
from PIL.PngImagePlugin import PngInfo

from cascade._version import __version__
from cascade.batch.engine import Drawn
from cascade.batch.plan import DrawOptions
from cascade.checkpoint import read_json
from cascade.errors import CascadeError
from cascade.pipeline import CascadePipeline

FORMATS = {"png": "png", "webp": "webp", "jpeg": "jpg"}
"""File formats and their endings."""

_IN_PICTURE = ("prompt", "negative_prompt", "seed", "number", "num_images", "index", "model", "license", "cascade")
_JPEG_QUALITY, _WEBP_QUALITY = 95, 95
_DESCRIPTION = 0x010E  # EXIF's ImageDescription, where viewers show it
_LONGEST_EXIF = 60_000  # bytes; a JPEG segment ends at 65,535


def describe(pipeline: CascadePipeline, drawn: Drawn, options: DrawOptions) -> dict[str, Any]:
    """What a picture's line of the manifest says of how it was drawn."""
    task, job, record = drawn.task, drawn.task.job, drawn.task.job.record
    ran = [slot.config.name for slot in pipeline.slots_until(options.until)]
    sizes = set(drawn.batch_sizes.values())
    return {
        "index": record.index,
        "id": job.id,
        "prompt": record.prompt,
        "negative_prompt": job.negative_prompt,
        "seed": record.seed,
        "run_seed": options.run_seed,
        "number": task.number,
        "num_images": job.num_images,
        "model": pipeline.name,
        "license": pipeline.license,
        "cascade": __version__,
        "settings": {
            "height": drawn.image.height,
            "width": drawn.image.width,
            "batch_size": sizes.pop() if len(sizes) == 1 else drawn.batch_sizes,
            "device": pipeline.device.type,
            "dtype": str(pipeline.dtype).removeprefix("torch."),
            "stages": {name: job.settings[name].model_dump(mode="json") for name in ran},
        },
    }


def encode(image: Image.Image, entry: Mapping[str, Any], format: str) -> tuple[bytes, bytes | None]:
    """A picture file with its metadata inside, and the metadata as a file beside it where they do not fit."""
    buffer = io.BytesIO()
    text = json.dumps({name: entry[name] for name in (*_IN_PICTURE, "settings")})
    if format == "png":
        # Runs only: drawn pictures have hardly a string that returns, and looking for them takes most of the time.
        image.save(buffer, format="PNG", pnginfo=_text_chunks(entry), compress_type=zlib.Z_RLE)
        return buffer.getvalue(), None
    exif = Image.Exif()
    fits = len(text) <= _LONGEST_EXIF
    if fits:
        exif[_DESCRIPTION] = text  # ASCII: JSON escapes the rest
    if format == "webp":
        image.save(buffer, format="WEBP", quality=_WEBP_QUALITY, exif=exif.tobytes())
    else:
        image.save(buffer, format="JPEG", quality=_JPEG_QUALITY, subsampling=0, exif=exif.tobytes())
    return buffer.getvalue(), None if fits else text.encode()


def _text_chunks(entry: Mapping[str, Any]) -> PngInfo:
    """International text chunks, which hold any Unicode; settings as JSON."""
    chunks = PngInfo()
    for name in _IN_PICTURE:
        chunks.add_itxt(name, str(entry[name]))
    chunks.add_itxt("settings", json.dumps(entry["settings"]))
    return chunks


def sidecar(file: str) -> str:
    """The name of the metadata beside a picture."""
    return f"{file}.json"


def read_metadata(path: str | Path) -> tuple[dict[str, Any], str]:
    """(what `encode` wrote into a picture, its format). Raises CascadeError when it is no picture of ours."""
    try:
        with Image.open(path) as image:
            format = str(image.format).lower()
            if format == "png":
                image.load()
                text = getattr(image, "text", {})
            else:
                text = {"all": str(image.getexif().get(_DESCRIPTION, ""))}
    except FileNotFoundError:
        raise CascadeError(f"{path}: no such file") from None
    except (OSError, UnidentifiedImageError, ValueError, SyntaxError) as error:
        raise CascadeError(f"{path}: not a readable picture: {error}") from None
    try:
        return _parsed(Path(path), text), format
    except (KeyError, ValueError, TypeError):
        raise CascadeError(f"{path}: does not say how it was drawn; expected a picture of `cascade generate`") from None


def _parsed(path: Path, text: Mapping[str, str]) -> dict[str, Any]:
    if "all" in text:
        beside = Path(sidecar(str(path)))
        data = read_json(beside) if not text["all"] and beside.exists() else json.loads(text["all"])
    else:
        data = {name: str(text[name]) for name in _IN_PICTURE} | {"settings": json.loads(text["settings"])}
    for name in ("seed", "number", "num_images", "index"):
        data[name] = int(data[name])
    return {name: data[name] for name in (*_IN_PICTURE, "settings")}
