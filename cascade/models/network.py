"""What every network offers and asks, whichever it is: the seam at which another architecture is added."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol, Self, TypeVar, cast

from torch import nn

from cascade.conditioning import Conditioning
from cascade.settings import Settings


@dataclass(frozen=True)
class Geometry:
    """How a network lies over a picture.

    divisor: height and width of a picture are multiples of it.
    receptive_radius: how far a square of the output looks beyond its edges, in pixels, a multiple of the divisor as the
    square's edges are; None: at the whole picture.
    least_activations: numbers for each pixel that exist at once in a network call, or more. By this lower bound drawing
    refuses at once what cannot fit into memory.
    finest_width: numbers for each pixel in a map of the finest level, by which a batch size is guessed.
    """

    divisor: int
    receptive_radius: int | None
    least_activations: float
    finest_width: float


class Prepared(Protocol):
    """What a network computes once for all noise levels, from the conditions alone."""

    def crop(self, rows: slice, columns: slice) -> Self:
        """The same for a part of the picture: images among the conditions are cropped, all else is kept."""


class Network(nn.Module):
    """(z, log SNR, conditions) -> output.

    `forward(z, log_snr, cond)` takes z (B, C, H, W), log_snr (B, 1, 1, 1), and conditions as they are or prepared; it
    gives (B, C', H, W), of which channels beyond those of z say where the variance lies.
    """

    activation_checkpointing: bool = False
    """Whether a training step recomputes activations in its backward pass."""

    @abstractmethod
    def prepare(self, cond: Conditioning) -> Prepared:
        """Everything that depends on the conditions alone. Raises ValueError for conditions that do not fit."""

    @abstractmethod
    def repeated_blocks(self) -> Sequence[nn.Module]:
        """The blocks between the first layer and the last, whose matrices Muon trains."""

    @abstractmethod
    def attention_layers(self) -> Sequence[nn.Module]:
        """The modules whose linear layers are attention's, which low-rank adaptation trains by default."""

    def sharded_blocks(self) -> Sequence[nn.Module]:
        """Blocks whose weights are read by their own call alone: each is a unit of FSDP."""
        return self.repeated_blocks()

    @property
    def _no_split_modules(self) -> list[str]:
        """The classes of `sharded_blocks`, under the name by which accelerate asks for them."""
        return sorted({type(block).__name__ for block in self.sharded_blocks()})


def check_conditions(cond: Conditioning, low_res_channels: int) -> None:
    """Raises ValueError when a smaller picture is missing, or there without a place for it."""
    complete = cond.low_res is not None and cond.low_res_log_snr is not None
    if low_res_channels and not complete:
        raise ValueError("a super-resolution network needs low_res and low_res_log_snr in its conditions")
    if not low_res_channels and cond.low_res is not None:
        raise ValueError("a base network sees no smaller picture; leave low_res out of its conditions")


class NetworkConfig(Settings):
    """The settings of a network, which stand in one file with it, and build it.

    Each kind also has the settings `kind`, by which a file names it, and `text_dim`, the width of the text it reads.
    """

    enlarges_first: ClassVar[bool] = False
    """Whether a smaller picture is enlarged before it is noised."""
    predicts_variance: ClassVar[bool] = False
    """Whether the output has a second half, which says where the variance of a step lies."""
    needs_schedule: ClassVar[str | None] = None
    """The kind of noise schedule that its noise levels are numbered by; None: it reads any."""
    reads_padding: ClassVar[bool] = False
    """Whether it reads what the text encoder gives for padding, too, and so must have all of it."""
    has_foreign_weights: ClassVar[bool] = False
    """Whether weights of this kind are published by others, whose terms a user should see."""

    @property
    def reads_text(self) -> bool:
        """Whether the network sees the prompt at all."""
        return True

    @abstractmethod
    def geometry(self, channels: int) -> Geometry:
        """How the network lies over a picture of `channels`."""

    @abstractmethod
    def build(self, channels: int, low_res_channels: int = 0) -> Network:
        """The network with fresh weights, for pictures of `channels`.

        low_res_channels: those of the smaller picture among the conditions of a super-resolution stage, else 0.
        """


ModuleT = TypeVar("ModuleT", bound=nn.Module)


def module_list(modules: Iterable[ModuleT]) -> Sequence[ModuleT]:
    """An nn.ModuleList whose members' type is known to the type checker."""
    return cast("Sequence[ModuleT]", nn.ModuleList(modules))


def rounded_up(pixels: int, multiple: int) -> int:
    """The least multiple that is not smaller."""
    return -(-pixels // multiple) * multiple
