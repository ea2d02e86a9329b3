"""The interface of all networks and their settings, which another architecture implements."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol, Self, TypeVar, cast

from torch import nn

from cascade.conditioning import Conditioning
from cascade.conditions import Conditions
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
