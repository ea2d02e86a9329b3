"""Training views of the two stages: pictures with their conditions, cut on the device from a library in its memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from cascade.conditioning import Conditioning
from cascade.diffusion.noise import diffuse, log_snr_from_std
from cascade.pictures.images import upsample
from gpu.pictures import SIZE, Library, cut, mirror

SMALL = 64
"""Side of the pictures of the base stage."""
DROPPED = 0.1
"""Share of the views whose text is the null text, for guidance."""


@dataclass(frozen=True)
class View:
    """x: (B, 3, H, W) in [-1, 1], and its conditions, with the smaller picture already noised and enlarged."""

    x: Tensor
    cond: Conditioning

    def split(self, batch: int) -> list[View]:
        """The view in parts of at most `batch` pictures."""
        count = -(-len(self.x) // batch)
        fields = (self.cond.text, self.cond.text_mask, self.cond.low_res, self.cond.low_res_log_snr)
        columns = [[None] * count if field is None else field.split(batch) for field in fields]
        conditions = [Conditioning(*row) for row in zip(*columns, strict=True)]
        return [View(x, cond) for x, cond in zip(self.x.split(batch), conditions, strict=True)]


Views = Callable[[int, int, torch.Generator], View]
"""(number of pictures, side in pixels, generator) -> a batch."""


@dataclass(frozen=True)
class BaseViews:
    """Art, and drawn scenes with a share of `scenes`."""

    library: Library
    scenes: float = 0.15

    def __call__(self, count: int, size: int, generator: torch.Generator) -> View:
        art, drawn, words = self.library.art, self.library.scenes, self.library.words
        assert drawn is not None
        of_scenes = round(count * self.scenes)
        chance = torch.rand(4, count, device=art.pixels.device, generator=generator)
        which, of_caption = chance.split(2)
        scene = (which[0, :of_scenes] * len(drawn.pixels)).long()
        who = art.pick(which[:, of_scenes:])
        painted = F.avg_pool2d(drawn.pixels[scene].float() / 127.5 - 1, SMALL // size)
        rows = [
            drawn.captions.chosen(scene, of_caption[:, :of_scenes], DROPPED),
            art.captions.chosen(who, of_caption[:, of_scenes:], DROPPED),
        ]
        x = torch.cat([painted, art.zoomed(who, size, generator)])
        return View(x, Conditioning(*words.rows(torch.cat(rows))))


@dataclass(frozen=True)
class EnlargingViews:
    """Crops, or whole pictures, with their noised area means or the base stage's drawings as smaller pictures.

    own: (N, 3, 64, 64) uint8, the base's drawings of the same pictures; drawn: (N,), whether one exists. share: of the
    views of such pictures that use the drawing. most: the largest aug_level, uniform below it.
    """

    library: Library
    own: Tensor | None = None
    drawn: Tensor | None = None
    share: float = 0.3
    most: float = 0.6

    def __call__(self, count: int, size: int, generator: torch.Generator) -> View:
        art, words = self.library.art, self.library.words
        scale = SIZE // SMALL
        chance = torch.rand(6, count, device=art.pixels.device, generator=generator)
        who = art.pick(chance[:2])
        x, offset, mirrored = art.cropped(who, size, scale, generator)
        low = F.avg_pool2d(x, scale)
        if self.own is not None and self.drawn is not None:
            own = mirror(cut(self.own, who, offset // scale, size // scale), mirrored).float() / 127.5 - 1
            seen = self.drawn[who] & (chance[4] < self.share)
            low = torch.where(seen[:, None, None, None], own, low)
        level = log_snr_from_std(chance[5] * self.most)[:, None, None, None]
        noised = diffuse(low, torch.randn(low.shape, device=x.device, generator=generator), level)
        text, mask = words.rows(art.captions.chosen(who, chance[2:4], DROPPED))
        return View(x, Conditioning(text, mask, upsample(noised, size), level))
