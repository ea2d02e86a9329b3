"""Conditions of a stage in addition to text: the settings of a class, a number, a vector or a picture."""

from __future__ import annotations

import difflib
import io
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal, Self, TypeAlias

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from pydantic import Field, model_validator
from torch import Tensor

from cascade.errors import quoted
from cascade.files.paths import expanded
from cascade.files.text import open_regular
from cascade.pictures.images import downsample, from_pil
from cascade.pictures.reading import open_picture, picture_errors
from cascade.settings import Settings, Side, Width

NONE = "none"
"""The word for a condition without a value: its null takes its place."""
TEXT = "text"
"""The name of the text among the conditions, in weights of guidance."""
RESERVED = frozenset(
    {
        *("prompt", "negative_prompt", "seed", "id", "num_images", "guidance", "steps", "strength", "regions"),
        *("text", "image", "mask", "low", "caption", "captions", "file_name", "conditions", NONE),
    }
)
"""Names that mean something else in a prompt file, in data or in the settings."""
_SHOWN = 12  # labels in a message
_LUMA = (0.299, 0.587, 0.114)  # ITU-R 601, as in Pillow

Value: TypeAlias = str | float | Tensor | None
"""A checked value: a label, a number, a vector (D,) float32, a picture (C, h, w) uint8; None: the null."""


class _Condition(Settings):
    """Settings that all kinds share."""

    dropout: Annotated[float, Field(ge=0, le=1)] = 0.05
    """Probability that training replaces it alone by its null; `data.joint_dropout` replaces all together."""
    null: Literal["learned", "zero"] = "learned"
    """In place of a missing value: a learned vector, or zeros."""


class ClassCondition(_Condition):
    """One of several labels."""

    kind: Literal["class"] = "class"
    labels: Annotated[tuple[Annotated[str, Field(min_length=1, max_length=200)], ...], Field(min_length=1)]
    """Names of the classes, in the order of the network's table."""
    default: str | None = None
    """Label of drawings that give none, or `none` for the null. None: it must be given."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        twice = [label for index, label in enumerate(self.labels) if label in self.labels[:index]]
        if twice:
            raise ValueError(f"labels: {quoted(twice[0])} is listed twice")
        if NONE in self.labels:
            raise ValueError("labels: `none` stands for no class; name the label otherwise")
        if self.default not in (None, NONE, *self.labels):
            raise ValueError(f"default {quoted(self.default)} is not one of the labels")
        return self

    @property
    def described(self) -> str:
        """The values that it takes."""
        more = f" and {len(self.labels) - _SHOWN} more" if len(self.labels) > _SHOWN else ""
        return f"one of {', '.join(map(quoted, self.labels[:_SHOWN]))}{more}"

    def checked(self, value: object, folder: Path | None = None) -> str:  # noqa: ARG002 - as for every kind
        """The label. Numbers, which tables often hold, count as their digits. Raises ValueError."""
        whole = isinstance(value, float) and value.is_integer()
        label = str(int(value)) if isinstance(value, float) and whole else str(value)
        if label in self.labels:
            return label
        close = difflib.get_close_matches(label, self.labels, n=1)
        raise ValueError(f"{quoted(label)} is not {self.described}{f'; did you mean {close[0]}?' if close else ''}")

    def tensor(self, value: Value, size: tuple[int, int]) -> Tensor:  # noqa: ARG002 - as for every kind
        """() int64."""
        return torch.tensor(self.labels.index(value) if isinstance(value, str) else 0)

    def blank(self, count: int, size: tuple[int, int]) -> Tensor:  # noqa: ARG002 - as for every kind
        """(count,) of zeros, on the default device."""
        return torch.zeros(count, dtype=torch.int64)


Measure: TypeAlias = Literal["width", "height", "aspect", "left", "top"]


class NumberCondition(_Condition):
    """A number in a range, read as Fourier features."""

    kind: Literal["number"] = "number"
    range: tuple[float, float]
    """Smallest and largest value, which the network sees as 0 and 1."""
    octaves: Annotated[int, Field(ge=1, le=16)] = 6
    """Sines and cosines of pi, 2 pi, 4 pi, ... times the value, as many as this of each; more for finer differences."""
    measure: Measure | None = None
    """Training measures it instead of reading a column: `width` or `height` of the stored picture, in pixels; `aspect`,
    the first over the second; `left` or `top`, how many pixels were cut off there, counted at the stage's size (SDXL's
    micro-conditioning). Values beyond the range count as its end."""
    default: float | Literal["none"] | None = None
    """Value of drawings that give none, or `none` for the null. None: it must be given."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        low, high = self.range
        if low >= high:
            raise ValueError(f"range [{low:g}, {high:g}] is empty; give the smaller number first")
        if isinstance(self.default, float) and not low <= self.default <= high:
            raise ValueError(f"default {self.default:g} is outside of range [{low:g}, {high:g}]")
        return self

    @property
    def described(self) -> str:
        """The values that it takes."""
        return f"a number from {self.range[0]:g} to {self.range[1]:g}"

    def checked(self, value: object, folder: Path | None = None) -> float:  # noqa: ARG002 - as for every kind
        """The number; its digits as text too. Raises ValueError."""
        plain = getattr(value, "item", None)
        value = plain() if plain is not None and getattr(value, "ndim", 0) == 0 else value
        try:
            number = math.nan if isinstance(value, bool) else float(value)  # type: ignore[arg-type]
        except (TypeError, ValueError, OverflowError):
            number = math.nan
        if not self.range[0] <= number <= self.range[1]:
            raise ValueError(f"{quoted(value)}; expected {self.described}")
        return number

    def tensor(self, value: Value, size: tuple[int, int]) -> Tensor:  # noqa: ARG002 - as for every kind
        """() float32, 0 to 1 over the range."""
        low, high = self.range
        return torch.tensor((value - low) / (high - low) if isinstance(value, float) else 0.0)

    def blank(self, count: int, size: tuple[int, int]) -> Tensor:  # noqa: ARG002 - as for every kind
        """(count,) of zeros, on the default device."""
        return torch.zeros(count)


class VectorCondition(_Condition):
    """A vector, such as an embedding that another network made."""

    kind: Literal["vector"] = "vector"
    dim: Width
    """Number of its values."""
    scale: Annotated[float, Field(gt=0)] = 1.0
    """Factor before the first layer, such that the values have about unit variance."""
    default: Literal["none"] | None = None
    """`none`: drawings that give none get the null. None: it must be given."""

    @property
    def described(self) -> str:
        """The values that it takes."""
        return f"{self.dim} numbers, or the path of a .npy file of them"

    def checked(self, value: object, folder: Path | None = None) -> Tensor:
        """(dim,) float32 from a list, an array, a tensor, text with commas, or a .npy file. Raises ValueError."""
        if isinstance(value, (str, os.PathLike)):
            value = _vector_in(value, folder)
        try:
            vector = torch.as_tensor(np.asarray(value, dtype=np.float32))
        except (TypeError, ValueError, RuntimeError, OverflowError):
            raise ValueError(f"{type(value).__name__}; expected {self.described}") from None
        if tuple(vector.shape) != (self.dim,):
            raise ValueError(f"has shape {list(vector.shape)}; expected {self.described}")
        if not torch.isfinite(vector).all():
            raise ValueError("holds NaN or infinity; expected finite numbers")
        return vector.clone()

    def tensor(self, value: Value, size: tuple[int, int]) -> Tensor:  # noqa: ARG002 - as for every kind
        """(dim,) float32, scaled."""
        return value * self.scale if isinstance(value, Tensor) else torch.zeros(self.dim)

    def blank(self, count: int, size: tuple[int, int]) -> Tensor:  # noqa: ARG002 - as for every kind
        """(count, dim) of zeros, on the default device."""
        return torch.zeros(count, self.dim)


class PictureCondition(_Condition):
    """A picture of the same layout as the drawn one: an outline, a label map, a pose, a depth."""

    kind: Literal["picture"] = "picture"
    channels: Literal[1, 3, 4] = 1
    """Gray, RGB, or RGBA."""
    labels: Annotated[int, Field(ge=0, le=256)] = 0
    """A map of labels: each pixel's value is a number below this, and becomes a channel. 0: a plain picture."""
    resolution: Side | None = None
    """Its detail: height and width for a picture of the stage's own size, a divisor of that. None: the stage's."""
    hidden: Width = 32
    """Width of the layer between the picture and the network's first feature map."""
    default: Literal["none"] | None = None
    """`none`: drawings that give none get the null. None: it must be given."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.labels and self.channels != 1:
            raise ValueError(f"labels: a map of labels has one channel, not {self.channels}")
        return self

    @property
    def described(self) -> str:
        """The values that it takes."""
        return f"a map of {self.labels} labels" if self.labels else "a picture or the path of one"

    @property
    def seen_channels(self) -> int:
        """Channels after labels became channels."""
        return self.labels or self.channels

    def checked(self, value: object, folder: Path | None = None) -> Tensor:
        """(channels, h, w) uint8 from a PIL picture, a path, bytes of a file, or uint8 (h, w) or (h, w, C).

        Raises ValueError, and CascadeError for a file that cannot be read.
        """
        ready = isinstance(value, Tensor) and value.dtype == torch.uint8 and value.shape[:-2] == (self.channels,)
        picture = value if isinstance(value, Tensor) and ready else self._read(value, folder)
        if self.labels and int(picture.max()) >= self.labels:
            raise ValueError(f"has the label {int(picture.max())}; expected numbers below {self.labels}")
        return picture

    def fitted(self, picture: Tensor, size: tuple[int, int], detail: int) -> Tensor:
        """The picture (C, h, w) at `size`, with the detail of one `detail` times smaller: reduced by area means, and
        enlarged by repeated pixels; labels are never mixed."""
        height, width = size
        grid = (max(1, height // detail), max(1, width // detail))
        if tuple(picture.shape[-2:]) == size == grid:
            return picture
        pixels = picture[None].float()
        smaller = (min(grid[0], pixels.shape[-2]), min(grid[1], pixels.shape[-1]))
        if not self.labels:
            pixels = downsample(pixels, smaller)
        pixels = F.interpolate(pixels, size=grid, mode="nearest-exact")
        return F.interpolate(pixels, size=size, mode="nearest-exact")[0].round().to(torch.uint8)

    def tensor(self, value: Value, size: tuple[int, int]) -> Tensor:
        """(channels, H, W) uint8, already fitted."""
        return value if isinstance(value, Tensor) else torch.zeros(self.channels, *size, dtype=torch.uint8)

    def blank(self, count: int, size: tuple[int, int]) -> Tensor:
        """(count, channels, H, W) of zeros, on the default device."""
        return torch.zeros(count, self.channels, *size, dtype=torch.uint8)

    def _read(self, value: object, folder: Path | None) -> Tensor:
        if isinstance(value, Tensor) and value.dtype == torch.uint8 and value.ndim == 3:
            value = value.permute(1, 2, 0).numpy()
        if isinstance(value, np.ndarray):
            plain = value[:, :, 0] if value.ndim == 3 and value.shape[2] == 1 else value
            if value.dtype != np.uint8 or plain.ndim not in (2, 3) or 0 in value.shape or plain.shape[2:] > (4,):
                raise ValueError(f"an array {value.dtype} of shape {value.shape}; expected uint8 (H, W) or (H, W, 3)")
            return self._pixels(Image.fromarray(np.ascontiguousarray(plain)))
        if isinstance(value, Image.Image):
            return self._pixels(value)
        if isinstance(value, bytes):
            with picture_errors("its picture"), open_picture(io.BytesIO(value)) as opened:
                return self._pixels(opened)
        if not isinstance(value, (str, os.PathLike)) or not os.fspath(value):
            raise ValueError(f"{type(value).__name__}; expected {self.described}")
        path = _path(value, folder)
        with picture_errors(str(path)), open_picture(path) as opened:
            return self._pixels(opened)

    def _pixels(self, image: Image.Image) -> Tensor:
        if self.labels:
            if image.mode not in ("1", "L", "P"):
                raise ValueError(f"has mode {image.mode}; expected one channel of label numbers (L or P)")
            return torch.from_numpy(np.array(image).astype(np.uint8))[None]
        if self.channels == 4:
            return torch.from_numpy(np.array(image.convert("RGBA"))).permute(2, 0, 1).contiguous()
        colours = from_pil(image)
        if self.channels == 3:
            return colours
        return (colours.double() * torch.tensor(_LUMA)[:, None, None]).sum(0, keepdim=True).round().to(torch.uint8)


ConditionConfig: TypeAlias = Annotated[
    ClassCondition | NumberCondition | VectorCondition | PictureCondition, Field(discriminator="kind")
]
ConditionName: TypeAlias = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]{0,39}$")]
Conditions: TypeAlias = Mapping[str, ConditionConfig]


def _path(value: str | os.PathLike[str], folder: Path | None) -> Path:
    path = Path(expanded(os.fspath(value)))
    return path if folder is None else folder / path


def _vector_in(value: str | os.PathLike[str], folder: Path | None) -> object:
    """The numbers in a text, or in a .npy file."""
    parts = os.fspath(value).split(",")
    try:
        return [float(part) for part in parts]
    except ValueError:
        path = _path(value, folder)
    try:
        with open_regular(path) as file:
            return np.load(file, allow_pickle=False)
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file") from None
    except (OSError, ValueError, EOFError) as error:
        raise ValueError(f"{path}: not a readable .npy file: {str(error).splitlines()[0]}") from None
