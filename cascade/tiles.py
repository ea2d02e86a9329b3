"""A large picture drawn in squares: which part of it a network call sees, and which part of its answer is kept.

Exact for networks without attention and without statistics over the picture: a pixel depends on its surroundings up to
the network's receptive radius alone, so a square that is seen with that much around it gets the pixels of the whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Tile:
    """Rows and columns of a picture: `kept`, which tile it without overlap, within `seen`."""

    kept: tuple[slice, slice]
    seen: tuple[slice, slice]

    def cut(self, picture: Tensor) -> Tensor:
        """The part that is seen: (B, C, H, W) -> (B, C, h, w)."""
        return picture[:, :, *self.seen]

    def keep(self, answer: Tensor) -> Tensor:
        """Of an answer that has the size of `seen`, what is kept."""
        rows, columns = (
            slice(kept.start - seen.start, kept.stop - seen.start)
            for kept, seen in zip(self.kept, self.seen, strict=True)
        )
        return answer[:, :, rows, columns]


def tiles(height: int, width: int, side: int, margin: int) -> Iterator[Tile]:
    """Squares of `side` that cover height x width, row by row, each seen with `margin` around it inside the picture."""
    for top in range(0, height, side):
        for left in range(0, width, side):
            kept = slice(top, min(top + side, height)), slice(left, min(left + side, width))
            rows, columns = (
                slice(max(part.start - margin, 0), min(part.stop + margin, end))
                for part, end in zip(kept, (height, width), strict=True)
            )
            yield Tile(kept, (rows, columns))


def in_tiles(function: Callable[[Tile], Tensor], size: tuple[int, int], side: int, margin: int) -> Tensor:
    """The answers of `function`, each (B, C, h, w) for what a tile sees, put together: (B, C, *size)."""
    result: Tensor | None = None
    for tile in tiles(*size, side, margin):
        kept = tile.keep(function(tile))
        if result is None:
            result = torch.empty(*kept.shape[:2], *size, dtype=kept.dtype, device=kept.device)
        result[:, :, *tile.kept] = kept
    assert result is not None, "a picture has at least one tile"
    return result
