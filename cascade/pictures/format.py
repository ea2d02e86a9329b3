"""The format of a cascade's pictures: channels, value type and range, and the way from data to [-1, 1] and back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal, Self, TypeAlias

import numpy as np
import torch
from torch import Tensor

ValueType: TypeAlias = Literal["uint8", "uint16", "float32"]
_Array: TypeAlias = np.ndarray[Any, Any]
Limits: TypeAlias = tuple[tuple[float, float], ...]

NAMED = {"rgb": ("red", "green", "blue"), "gray": ("gray",), "rgba": ("red", "green", "blue", "alpha")}
"""Bands of the channels that have a name of their own."""
_DTYPES = {"uint8": torch.uint8, "uint16": torch.uint16, "float32": torch.float32}
_WHOLE: dict[str, tuple[float, float]] = {"uint8": (0.0, 255.0), "uint16": (0.0, 65535.0), "float32": (0.0, 1.0)}


@dataclass(frozen=True)
class PictureFormat:
    """The channels of pictures, the type of their values, and the range that becomes [-1, 1].

    Three forms of a picture (..., C, H, W) occur. *Stored*: the data's own values and type, colours not multiplied by
    alpha, as in a file. *Linear*: the same values as float32, colours multiplied by alpha, the form in which pictures
    may be averaged, enlarged and laid over each other. *x*: linear, with the range mapped to [-1, 1].

    bands: name of each channel. limits: (lowest, highest) value, one pair for all channels or one for each. alpha:
    whether the last channel is the opacity of the others.
    """

    bands: tuple[str, ...] = NAMED["rgb"]
    values: ValueType = "uint8"
    limits: Limits = ((0.0, 255.0),)
    alpha: bool = False

    @classmethod
    def of(cls, channels: str | Sequence[str], values: ValueType = "uint8", limits: Limits | None = None) -> Self:
        """The format of `rgb`, `gray`, `rgba`, or of named bands. limits: default the whole range of the type."""
        bands = NAMED[channels] if isinstance(channels, str) else tuple(channels)
        return cls(bands, values, limits or (_WHOLE[values],), channels == "rgba")

    @property
    def channels(self) -> int:
        """Number of channels, alpha included."""
        return len(self.bands)

    @property
    def dtype(self) -> torch.dtype:
        """Type of stored values."""
        return _DTYPES[self.values]

    @property
    def bytes_per_pixel(self) -> int:
        """Bytes of a stored pixel."""
        return self.channels * self.dtype.itemsize

    @property
    def is_rgb(self) -> bool:
        """Whether these are red, green and blue of 8 bits, which every program shows, and every judge expects."""
        return self == RGB

    @property
    def kind(self) -> str:
        """`rgb`, `gray`, `rgba`, or `bands`."""
        return next((name for name, bands in NAMED.items() if bands == self.bands), "bands")

    def __str__(self) -> str:
        """A few words for messages, such as `4 channels (blue, green, red, nir) of uint16`."""
        plural = "s" * (self.channels != 1)
        return f"{self.channels} channel{plural} ({', '.join(self.bands)}) of {self.values}"

    @property
    def fill(self) -> tuple[float, ...]:
        """Linear values around a picture that is padded: nothing if it has alpha, white for `rgb` and `gray`.

        Named bands, of which the highest value rarely means "nothing here", get their lowest value.
        """
        limits = self.limits * (self.channels // len(self.limits))
        if self.alpha:
            return (0.0,) * self.channels
        return tuple(pair[0] if self.kind == "bands" else pair[1] for pair in limits)

    def linear(self, stored: Tensor) -> Tensor:
        """Stored values (..., C, H, W) as float32, colours multiplied by alpha."""
        values = stored.to(torch.float32)
        if not self.alpha:
            return values
        alpha = values[..., -1:, :, :]
        return torch.cat((values[..., :-1, :, :] * (alpha / self.limits[0][1]), alpha), dim=-3)

    def stored(self, linear: Tensor) -> Tensor:
        """Linear values within the limits, (..., C, H, W), in the data's own type, rounded half to even.

        With alpha, colours are divided by the rounded alpha, so that over any background the stored picture looks like
        the linear one to within rounding; fully transparent pixels are black.
        """
        if not self.alpha:
            return linear.round().to(self.dtype) if self.values != "float32" else linear
        most = self.limits[0][1]
        alpha = linear[..., -1:, :, :].clamp(0, most)
        alpha = alpha.round() if self.values != "float32" else alpha
        colours = torch.where(alpha > 0, linear[..., :-1, :, :] * most / alpha.clamp(min=1 / 65536), 0.0)
        whole = torch.cat((colours.clamp(0, most), alpha), dim=-3)
        return whole.round().to(self.dtype) if self.values != "float32" else whole

    def to_float(self, stored: Tensor) -> Tensor:
        """Stored values (..., C, H, W) -> x, float32 in [-1, 1]; values beyond stated limits are clipped there."""
        low, half = self._scale(stored.device)
        linear = self.linear(stored)
        x = (linear - low if low is not None else linear) / half - 1
        return x if self._is_whole else x.clamp(-1, 1)

    def from_float(self, x: Tensor) -> Tensor:
        """x (..., C, H, W), clamped to [-1, 1] -> stored values.

        Where alpha is beyond 1, as on the inner side of an edge after bicubic enlargement, colours are beyond by the
        same factor, and are divided by it.
        """
        low, half = self._scale(x.device)
        x = x.to(torch.float32)
        if self.alpha:
            x = (x + 1) / ((x[..., -1:, :, :] + 1) / 2).clamp(min=1) - 1
        linear = (x.clamp(-1, 1) + 1) * half
        return self.stored(linear if low is None else linear + low)

    @property
    def _is_whole(self) -> bool:
        """Whether no stored value can be beyond the limits."""
        return self.values != "float32" and self.limits == (_WHOLE[self.values],)

    def _scale(self, device: torch.device) -> tuple[Tensor | float | None, Tensor | float]:
        """Lowest values (None: zero) and half ranges, numbers or (C, 1, 1)."""
        if len(self.limits) == 1:
            low, high = self.limits[0]
            return low or None, (high - low) / 2
        low_high = _tensor(self.limits).to(device)
        return low_high[:, :1, None], (low_high[:, 1:, None] - low_high[:, :1, None]) / 2


RGB = PictureFormat()
"""Red, green and blue of 8 bits: the default."""
RGBA = PictureFormat.of("rgba")
"""The same with transparency."""


@lru_cache(maxsize=64)
def _tensor(limits: Limits) -> Tensor:
    return torch.tensor(limits, dtype=torch.float32)


def mirrored(picture: Tensor) -> Tensor:
    """A picture (..., H, W) of any type from right to left; torch has no `flip` for uint16."""
    return picture.to(torch.int32).flip(-1).to(torch.uint16) if picture.dtype == torch.uint16 else picture.flip(-1)


def as_stored(values: _Array, format: PictureFormat, channels_last: bool = True) -> Tensor:
    """An array (H, W), (H, W, C) or (C, H, W) as a stored picture (C, H, W).

    channels_last: the order where both are possible. Whole numbers become float32 where the format is. Raises
    ValueError for other channels or values, with what was found and expected.
    """
    values = values.astype(values.dtype.newbyteorder("="), copy=False)
    if 0 in values.shape or values.ndim not in (2, 3) or values.dtype.kind not in "uif":
        raise ValueError(f"an array {values.dtype} of shape {values.shape}; expected {format}, (H, W, C) or (C, H, W)")
    planes = values[None] if values.ndim == 2 else _planes(values, format.channels, channels_last)
    fits = values.dtype == format.values or format.values == "float32"
    if planes is None or len(planes) != format.channels or not fits:
        last = values.shape[-1] if channels_last else values.shape[0]
        found = 1 if values.ndim == 2 else last
        raise ValueError(f"has {found} channel{'s' * (found != 1)} of {values.dtype}; expected {format}")
    if format.values == "float32":
        planes = planes.astype(np.float32)
        if not np.isfinite(planes).all():
            raise ValueError("has values that are not finite (NaN or infinity); replace them by a number")
    return torch.from_numpy(np.array(planes))


def _planes(values: _Array, channels: int, channels_last: bool) -> _Array | None:
    """(C, H, W) of an array of three axes, whichever of the first and the last has `channels` entries."""
    ways = [values.transpose(2, 0, 1), values]
    return next((way for way in (ways if channels_last else ways[::-1]) if len(way) == channels), None)
