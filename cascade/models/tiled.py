"""Drawing a large picture in squares: the part that a network call reads, and the part of its output that is kept.

`TiledNetwork` wraps a network and has the same interface. The result is exact for networks without attention and
without statistics over the picture: a pixel depends only on its surroundings up to the network's receptive radius, so a
square read with that margin has the same pixels as in the whole picture.
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
    """Rows and columns of a picture: `kept` areas cover it without overlap; `seen` adds the margin that is read."""

    kept: tuple[slice, slice]
    seen: tuple[slice, slice]

    def cut(self, image: Tensor) -> Tensor:
        """The `seen` part of a picture: (B, C, H, W) -> (B, C, h, w)."""
        return image[:, :, *self.seen]

    def keep(self, answer: Tensor) -> Tensor:
        """The `kept` part of an answer that has the size of `seen`."""
        rows, columns = (
            slice(kept.start - seen.start, kept.stop - seen.start)
            for kept, seen in zip(self.kept, self.seen, strict=True)
        )
        return answer[:, :, rows, columns]


def tiles(height: int, width: int, side: int, margin: int) -> Iterator[Tile]:
    """Squares of `side` that cover height x width, row by row, each read with a `margin` clipped to the picture."""
    for top in range(0, height, side):
        for left in range(0, width, side):
            kept = slice(top, min(top + side, height)), slice(left, min(left + side, width))
            rows, columns = (
                slice(max(part.start - margin, 0), min(part.stop + margin, end))
                for part, end in zip(kept, (height, width), strict=True)
            )
            yield Tile(kept, (rows, columns))


def in_tiles(function: Callable[[Tile], Tensor], size: tuple[int, int], side: int, margin: int) -> Tensor:
    """The picture (B, C, *size) assembled from answers of `function`, each (B, C, h, w) for a tile's `seen` part."""
    result: Tensor | None = None
    for tile in tiles(*size, side, margin):
        kept = tile.keep(function(tile))
        if result is None:
            result = torch.empty(*kept.shape[:2], *size, dtype=kept.dtype, device=kept.device)
        result[:, :, *tile.kept] = kept
    assert result is not None, "a picture has at least one tile"
    return result


class TiledNetwork(Network):
    """A network applied to one square of a picture at a time, each with a margin of the receptive radius.

    Its output equals that of one call for the whole picture up to float32 rounding, with the memory of one square and a
    few tensors of the whole size.
    """

    def __init__(self, network: Network, side: int, radius: int) -> None:
        """side: of the squares, a multiple of the network's divisor. radius: the network's receptive radius."""
        super().__init__()
        self.network, self.side, self.radius = network, side, radius

    def prepare(self, cond: Conditioning) -> Prepared:
        """The wrapped network's, for the whole picture."""
        return self.network.prepare(cond)

    def repeated_blocks(self) -> Sequence[nn.Module]:
        """The wrapped network's."""
        return self.network.repeated_blocks()

    def attention_layers(self) -> Sequence[nn.Module]:
        """The wrapped network's."""
        return self.network.attention_layers()

    def forward(self, z: Tensor, log_snr: Tensor, cond: Conditioning | Prepared) -> Tensor:
        """z: (B, C, H, W); log_snr: (B, 1, 1, 1) -> (B, C', H, W)."""
        prepared = self.prepare(cond) if isinstance(cond, Conditioning) else cond

        def answer(tile: Tile) -> Tensor:
            output: Tensor = self.network(tile.cut(z), log_snr, prepared.crop(*tile.seen))
            return output

        return in_tiles(answer, (z.shape[-2], z.shape[-1]), self.side, self.radius)
