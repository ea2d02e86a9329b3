"""Metadata inside PNG, WebP and JPEG files, enough to draw the same bytes again; the identity of model and software."""

from __future__ import annotations

import hashlib
import io
import json
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Literal, get_origin

import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from pydantic import Field
from torch import Tensor

from cascade._version import __version__
from cascade.batch.plan import DrawOptions, Target
from cascade.drawing.recipe import Recipe
from cascade.drawing.task import Drawn
from cascade.errors import CascadeError
from cascade.files.atomic import read_json
from cascade.files.text import open_regular, parse_json
from cascade.pictures.format import PictureFormat
from cascade.pictures.rasters import ARRAY_FORMATS, array_format, array_text, as_pil, write_array
from cascade.pictures.reading import open_picture, picture_errors
from cascade.pipeline import CascadePipeline
from cascade.settings import Noted
from cascade.storage.index import ModelIndex
from cascade.text.language import well_formed

FORMATS = {"png": "png", "webp": "webp", "jpeg": "jpg", **ARRAY_FORMATS}
"""File formats and their file name endings."""

_ORIGIN = ("num_images", "index", "model", "license", "cascade")
"""Entries about a picture's origin, in addition to its recipe."""
_TEXTS = {
    "model",
    "license",
    "cascade",
    *(
        name
        for name, field in Recipe.model_fields.items()
        if field.annotation is str or get_origin(field.annotation) is Literal
    ),
}
"""Entries that are plain text in PNG chunks; all others are JSON."""
_JPEG_QUALITY, _WEBP_QUALITY = 95, 95
_DESCRIPTION = 0x010E  # EXIF's ImageDescription, which viewers show
_LONGEST_EXIF = 60_000  # bytes; a JPEG segment ends at 65,535


class _Machine(Noted):
    """What is read of the settings that a picture names, besides those of its recipe."""

    device: str = Field(pattern=r"^[a-z]{1,20}$")
    dtype: str = Field(pattern=r"^[a-z0-9]{1,20}$")
    batch_size: int | dict[str, int] = Field()


class _Inside(Noted):
    """What is read of where a picture says that it comes from."""

    num_images: int = Field(ge=1, lt=1 << 63)
    index: int = Field(ge=0, lt=1 << 63)
    model: str
    license: str
    cascade: str
    settings: _Machine


@dataclass(frozen=True)
class Describer:
    """Describes how a pipeline drew a picture of a run."""

    pipeline: CascadePipeline
    options: DrawOptions
    output: Mapping[str, Any] = field(default_factory=dict)
    """Settings of the picture files that decide their bytes, in addition to the recipe."""

    def __call__(self, target: Target, drawn: Drawn) -> dict[str, Any]:
        """The entries of the manifest's line about how the picture was drawn."""
        pipeline, record = self.pipeline, target.job.record
        recipe = target.recipe.to_json()
        sizes = set(drawn.batch_sizes.values())
        settings = {
            **{name: recipe["settings"][name] for name in ("height", "width")},
            "batch_size": sizes.pop() if len(sizes) == 1 else dict(drawn.batch_sizes),
            "device": pipeline.device.type,
            "dtype": str(pipeline.dtype).removeprefix("torch."),
            "stages": recipe["settings"]["stages"],
            **self.output,
        }
        return {
            "index": record.index,
            "id": target.job.id,
            **recipe,
            "run_seed": self.options.run_seed,
            "num_images": target.job.num_images,
            "model": pipeline.name,
            "license": pipeline.license,
            "cascade": __version__,
            "settings": settings,
        }


def encode(picture: Tensor, form: PictureFormat, entry: Mapping[str, Any], format: str) -> tuple[bytes, bytes | None]:
    """The bytes of a picture file with its metadata, and the metadata as a second file if they do not fit into it.

    picture: (C, H, W), stored values of `form`.
    """
    if format in ARRAY_FORMATS:
        buffer, text = io.BytesIO(), json.dumps(_inside(entry))
        write_array(buffer, picture, form, format, text)
        return buffer.getvalue(), text.encode() if format == "npy" else None
    return encode_image(as_pil(picture, form), entry, format)


def encode_image(image: Image.Image, entry: Mapping[str, Any], format: str) -> tuple[bytes, bytes | None]:
    """`encode` of a PIL picture as png, webp or jpeg."""
    buffer = io.BytesIO()
    text = json.dumps(_inside(entry))
    if format == "png":
        # Run-length only: drawn pictures hardly repeat longer strings, and the search for them takes most of the time.
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


def _inside(entry: Mapping[str, Any]) -> dict[str, Any]:
    """The entries of a manifest line that go into the picture: its recipe, its origin and its settings."""
    recipe = [name for name in Recipe.model_fields if name in entry]
    return {name: entry[name] for name in (*recipe, *_ORIGIN, "settings")}


def _text_chunks(entry: Mapping[str, Any]) -> PngInfo:
    """International text chunks, which hold any Unicode; values that are not text as JSON."""
    chunks = PngInfo()
    for name, value in _inside(entry).items():
        chunks.add_itxt(name, well_formed(value) if isinstance(value, str) else json.dumps(value))
    return chunks


class NoRecipeError(CascadeError):
    """A picture that does not record how it was drawn."""


def sidecar(file: str) -> str:
    """The name of the metadata file of a picture."""
    return f"{file}.json"


def read_metadata(picture: str | Path | BinaryIO) -> tuple[dict[str, Any], str]:
    """(metadata that `encode` wrote into a picture, its format). Raises NoRecipeError if there is none."""
    path = picture if isinstance(picture, (str, Path)) else "picture"
    if (format := array_format(picture)) is not None:
        with picture_errors(str(path)):
            text = {"all": array_text(picture) if format == "tiff" else ""}
        return _described(Path(path), text), format
    with picture_errors(str(path)), open_picture(picture) as image:
        format = str(image.format).lower()
        if format == "png":
            image.load()
            text = getattr(image, "text", {})
        else:
            text = {"all": str(image.getexif().get(_DESCRIPTION, ""))}
    return _described(Path(path), text), format


def _described(path: Path, text: Mapping[str, str]) -> dict[str, Any]:
    try:
        return _parsed(path, text)
    except (KeyError, ValueError, TypeError, AttributeError):
        raise NoRecipeError(
            f"{path}: does not record how it was drawn; expected a `cascade generate` picture"
        ) from None


def _parsed(path: Path, text: Mapping[str, str]) -> dict[str, Any]:
    """The inverse of `_inside`, from JSON or chunks. Raises KeyError, ValueError or TypeError for other content."""
    if "all" in text:
        separate = Path(sidecar(str(path)))
        data = read_json(separate) if not text["all"] and separate.exists() else parse_json(text["all"])
    else:
        data = {name: value if name in _TEXTS else parse_json(value) for name, value in _known(text).items()}
    for name in ("num_images", "index"):
        data[name] = int(str(data[name]))
    Recipe.digest_of(data)
    said = _inside(data)
    _Inside.model_validate(said)
    return said


def _known(text: Mapping[str, str]) -> dict[str, str]:
    """The chunks that `encode` writes; others, such as a camera's, may hold anything."""
    return {name: str(value) for name, value in text.items() if name in (*Recipe.model_fields, *_ORIGIN, "settings")}


# --- identity --------------------------------------------------------------------------------------------------------
# The identity of a model and of the software: a continued run must have the same.

_ENDS_BYTES = 1 << 16


def model_identity(index: ModelIndex) -> str:
    """A model's name and a digest of its files: settings in full; of weights the size, the beginning and the end."""
    digest = hashlib.sha256(str(index.max_text_length).encode())
    if index.text_padded or index.captions != "as_is":
        digest.update(f" padded={index.text_padded} {index.captions}".encode())
    if index.styles.default is not None:
        digest.update(f" styles={index.styles}".encode())
    for folder in (index.text_encoder, *index.stages):
        for path in _files(folder):
            digest.update(f"{folder.name}/{path.name} {path.stat().st_size}".encode())
            digest.update(_ends_of(path))
    return f"{index.name} {digest.hexdigest()[:12]}"


def _ends_of(path: Path) -> bytes:
    try:
        with open_regular(path) as file:
            beginning = file.read(_ENDS_BYTES)
            file.seek(max(0, path.stat().st_size - _ENDS_BYTES))
            return beginning + file.read(_ENDS_BYTES)
    except OSError as error:
        raise CascadeError(f"{path}: cannot be read: {error.strerror or error}") from None


def weights_sha256(index: ModelIndex) -> str:
    """SHA-256 over all weights of a model, hexadecimal: the safetensors files of text encoder and stages, in full."""
    digest = hashlib.sha256()
    for folder in (index.text_encoder, *index.folders):
        for path in _files(folder):
            if path.suffix == ".safetensors":
                digest.update(f"{folder.name}/{path.name} {path.stat().st_size}".encode())
                with open_regular(path) as file:
                    digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def versions() -> str:
    """Versions of the software that draws; another version may change the last bits."""
    return f"cascade {__version__}, torch {torch.__version__}"


def _files(folder: Path) -> Iterable[Path]:
    """The model's files in a folder of cascade, or of DeepFloyd IF in diffusers' layout."""
    places = [folder, *(folder / name for name in ("unet", "scheduler", "tokenizer"))]
    found = (path for place in places if place.is_dir() for path in place.iterdir())
    return sorted(path for path in found if path.suffix in (".json", ".safetensors"))
