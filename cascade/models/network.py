"""The interface of all networks and their settings, which another architecture implements; and drawing in squares."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol, Self, TypeVar, cast

import torch
from torch import Tensor, nn

from cascade.conditioning import Conditioning
from cascade.conditions.settings import Conditions
from cascade.settings import Settings


@dataclass(frozen=True)
class Geometry:
    """Sizes, receptive field and memory of a network in relation to the picture.

    divisor: height and width of a picture must be multiples of it.
    receptive_radius: pixels beyond its edges on which a square of the output depends, a multiple of the divisor like
    the square's edges; None: the whole picture.
    least_activations: lower bound on the values per pixel that a network call holds at the same time. Drawing uses it
    to refuse immediately a picture that cannot fit into memory.
    finest_width: values per pixel in a feature map of the finest level, used to estimate a batch size.
    """

    divisor: int
    receptive_radius: int | None
    least_activations: float
    finest_width: float


class Prepared(Protocol):
    """Values that a network computes once for all noise levels, from the conditions alone."""

    def crop(self, rows: slice, columns: slice) -> Self:
        """The same for a part of the picture: images among the conditions are cropped, all else is kept."""


class Network(nn.Module):
    """(z, log SNR, conditions) -> output.

    `forward(z, log_snr, cond)` takes z (B, C, H, W), log_snr (B, 1, 1, 1), and raw or prepared conditions. It returns
    (B, C', H, W); channels beyond the C of z hold the place of the log variance.
    """

    activation_checkpointing: bool = False
    """Whether a training step recomputes activations in its backward pass."""

    @abstractmethod
    def prepare(self, cond: Conditioning) -> Prepared:
        """Everything that depends only on the conditions. Raises ValueError for conditions that do not fit."""

    def add_conditions(self, conditions: Conditions) -> None:
        """Let the network read other conditions than text. Raises ValueError if it cannot; see `reads_conditions`."""
        raise ValueError(f"{type(self).__name__} reads no conditions, but was given {', '.join(conditions)}")

    @abstractmethod
    def repeated_blocks(self) -> Sequence[nn.Module]:
        """The blocks between the first layer and the last, whose matrices Muon trains."""

    @abstractmethod
    def attention_layers(self) -> Sequence[nn.Module]:
        """The attention modules, whose linear layers low-rank adaptation trains by default."""

    def sharded_blocks(self) -> Sequence[nn.Module]:
        """Blocks whose weights are read only in their own call: each is a unit of FSDP."""
        return self.repeated_blocks()

    @property
    def _no_split_modules(self) -> list[str]:
        """Class names of `sharded_blocks`, in the attribute that accelerate reads."""
        return sorted({type(block).__name__ for block in self.sharded_blocks()})


def check_conditions(cond: Conditioning, low_res_channels: int) -> None:
    """Raise ValueError when a smaller picture is missing or not expected."""
    complete = cond.low_res is not None and cond.low_res_log_snr is not None
    if low_res_channels and not complete:
        raise ValueError("a super-resolution network needs low_res and low_res_log_snr in its conditions")
    if not low_res_channels and cond.low_res is not None:
        raise ValueError("a base network sees no smaller picture; leave low_res out of its conditions")


class NetworkConfig(Settings):
    """The settings of a network, defined in the same file as the network, which they build.

    Each subclass also has the settings `kind`, its name in a file, and `text_dim`, the width of the text embeddings.
    """

    enlarges_first: ClassVar[bool] = False
    """Whether a smaller picture is enlarged before it is noised."""
    predicts_variance: ClassVar[bool] = False
    """Whether the output has a second half, the place of a step's log variance between its bounds."""
    needs_schedule: ClassVar[str | None] = None
    """The kind of noise schedule that the network requires; None: any."""
    reads_padding: ClassVar[bool] = False
    """Whether the network also reads the text encoder's output for padding, and so requires all of it."""
    reads_conditions: ClassVar[bool] = False
    """Whether the network can read a stage's `conditions`."""
    has_foreign_weights: ClassVar[bool] = False
    """Whether others publish weights of this kind, with terms that a user should see."""

    @property
    def reads_text(self) -> bool:
        """Whether the network sees the prompt at all."""
        return True

    @abstractmethod
    def geometry(self, channels: int) -> Geometry:
        """Sizes, receptive field and memory for pictures of `channels`."""

    @abstractmethod
    def build(self, channels: int, low_res_channels: int = 0) -> Network:
        """The network with fresh weights, for pictures of `channels`.

        low_res_channels: channels of the smaller picture that conditions a super-resolution stage, else 0.
        """


ModuleT = TypeVar("ModuleT", bound=nn.Module)


def module_list(modules: Iterable[ModuleT]) -> Sequence[ModuleT]:
    """An nn.ModuleList whose members' type is known to the type checker."""
    return cast("Sequence[ModuleT]", nn.ModuleList(modules))


def rounded_up(pixels: int, multiple: int) -> int:
    """The smallest multiple of `multiple` that is at least `pixels`."""
    return -(-pixels // multiple) * multiple


# --- squares ---------------------------------------------------------------------------------------------------------
# Drawing a large picture in squares: the part that a network call reads, and the part of its output that is kept.
#
# `TiledNetwork` wraps a network and has the same interface. The result is exact for networks without attention and
# without statistics over the picture: a pixel depends only on its surroundings up to the network's receptive radius,
# so a square read with that margin has the same pixels as in the whole picture.


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
