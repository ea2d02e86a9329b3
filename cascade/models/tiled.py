"""A large picture drawn in squares: which part of it a network call sees, and which part of its answer is kept.

`TiledNetwork` goes around a network, and nobody who calls it knows. Exact for networks without attention and without
statistics over the picture: a pixel depends on its surroundings up to the network's receptive radius alone, so a square
that is seen with that much around it gets the pixels of the whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from cascade.conditioning import Conditioning
from cascade.models.network import Network, Prepared


@dataclass(frozen=True)
class Tile:
    """Rows and columns of a picture: `kept`, which tile it without overlap, within `seen`."""

    kept: tuple[slice, slice]
    seen: tuple[slice, slice]

    def cut(self, image: Tensor) -> Tensor:
        """The part that is seen: (B, C, H, W) -> (B, C, h, w)."""
        return image[:, :, *self.seen]

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


class TiledNetwork(Network):
    """A network that is given squares of a picture one at a time, each seen with its receptive radius around it.

    Its output is that for the whole picture up to float32's rounding, in the memory of one square and of a few tensors
    of the whole size.
    """

    def __init__(self, network: Network, side: int, radius: int) -> None:
        """side: of the squares, a multiple of what the network divides a picture by. radius: how far it looks."""
        super().__init__()
        self.network, self.side, self.radius = network, side, radius

    def prepare(self, cond: Conditioning) -> Prepared:
        """As the network itself, for the whole picture."""
        return self.network.prepare(cond)

    def repeated_blocks(self) -> Sequence[nn.Module]:
        """As the network itself."""
        return self.network.repeated_blocks()

    def attention_layers(self) -> Sequence[nn.Module]:
        """As the network itself."""
        return self.network.attention_layers()

    def forward(self, z: Tensor, log_snr: Tensor, cond: Conditioning | Prepared) -> Tensor:
        """z: (B, C, H, W); log_snr: (B, 1, 1, 1) -> (B, C', H, W)."""
        prepared = self.prepare(cond) if isinstance(cond, Conditioning) else cond

        def answer(tile: Tile) -> Tensor:
            output: Tensor = self.network(tile.cut(z), log_snr, prepared.crop(*tile.seen))
            return output

        return in_tiles(answer, (z.shape[-2], z.shape[-1]), self.side, self.radius)
