"""The network of a stage: our U-Net, or that of DeepFloyd IF."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import Discriminator, Field, Tag, model_validator

from cascade.config.common import PositiveInt
from cascade.settings import Settings


class UNetConfig(Settings):
    """The U-Net. Lists have one entry per level, from the finest to the coarsest."""

    kind: Literal["unet"] = "unet"
    channels: tuple[PositiveInt, ...] = (64, 128, 192)
    """Width of each level."""
    blocks: tuple[PositiveInt, ...] = (1, 2, 2)
    """Residual blocks of each level, the same on the way down and up."""
    strides: tuple[Literal[1, 2], ...] = (1, 2, 2)
    """Downsampling *before* each level's blocks. Starting with 2 gives the Efficient U-Net of Imagen (fig. A.28)."""
    attention: tuple[bool, ...] = (False, True, True)
    """Whether the blocks of a level are followed by global self-attention (with the text tokens joined in)."""
    attention_after: Literal["blocks", "level"] = "blocks"
    """Attention after each block of such a level, or once after the last, as in Imagen's Efficient U-Net."""
    self_attention: bool = True
    """Whether attention sees the picture beside the text. Without, each pixel asks the text alone, as in Imagen's 1024
    stage, the same on crop and whole."""
    middle_blocks: Annotated[int, Field(ge=0)] = 1
    """Residual blocks after the coarsest level, each but the last followed by attention where that level has it."""
    patch: PositiveInt = 1
    """Space-to-depth factor of the stem: the network works at 1/patch of the resolution."""
    resampling: Literal["shuffle", "conv"] = "shuffle"
    """Between levels: space-to-depth and a 1x1 convolution, or a strided 3x3 one, as Imagen has it; likewise back."""
    skips: Literal["concat", "add", "level"] = "concat"
    """How the way up receives the way down: concatenated or added block by block, or added once a `level`."""
    skip_scale: Annotated[float, Field(gt=0)] = 1.0
    """Factor on the skips; Imagen's Efficient U-Net uses 1/sqrt(2)."""
    norm: Literal["group", "pixel"] = "group"
    """`group`: GroupNorm over the picture. `pixel`: over the channels of each pixel, the same on crop and whole."""
    groups: PositiveInt = 32
    """Groups of `norm: group`."""
    head_dim: PositiveInt = 64
    """Width of one attention head."""
    embedding_dim: PositiveInt = 256
    """Width of the noise-level embedding."""
    text: Literal["attention", "pooled", "none"] = "attention"
    """`attention`: tokens join keys and values, and pooled text joins the embedding. `pooled`: only the latter."""
    text_dim: PositiveInt = 256
    """Width of the text encoder's embeddings."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Dropout inside residual blocks at levels with attention (the coarse ones)."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if not self.channels:
            raise ValueError("channels is empty; give at least one level")
        for name in ("blocks", "strides", "attention"):
            if len(getattr(self, name)) != len(self.channels):
                raise ValueError(
                    f"{name} has {len(getattr(self, name))} entries, channels has {len(self.channels)};"
                    " give one per level"
                )
        if any(self.attention) and not self.self_attention and self.text != "attention":
            raise ValueError(f"self_attention: false leaves attention the text alone; text: {self.text} gives it none")
        if self.embedding_dim % 2:
            raise ValueError(f"embedding_dim {self.embedding_dim} must be even: half sines, half cosines")
        for width, attends in zip(self.channels, self.attention, strict=True):
            if attends and width % self.head_dim:
                raise ValueError(f"head_dim {self.head_dim} does not divide the {width} channels that attend")
            if self.norm == "group" and width % self.groups:
                raise ValueError(
                    f"groups {self.groups} does not divide {width} channels; use norm: pixel or fewer groups"
                )
        return self

    @property
    def reads_text(self) -> bool:
        """Whether the network sees the prompt at all."""
        return self.text != "none"

    @property
    def enlarges_first(self) -> bool:
        """Whether a smaller picture is noised after it is enlarged."""
        return False

    @property
    def least_activations(self) -> float:
        """Numbers for each pixel of a picture that exist at once in a network call, or more: the skips and the input.

        A lower bound, by which drawing refuses at once what cannot fit into memory.
        """
        total, scale = 3.0, self.patch
        for width, blocks, stride in zip(self.channels, self.blocks, self.strides, strict=True):
            scale *= stride
            total += width * (1 if self.skips == "level" else blocks) / scale**2
        return total

    @property
    def receptive_radius(self) -> int | None:
        """How far a square of the output looks beyond its edges, in pixels; None: at the whole picture.

        The square's edges are multiples of `downsampling`; so is this. Rounded up where a path enters a coarser level.
        """
        if self.norm == "group" or (any(self.attention) and self.self_attention):
            return None
        cell = radius = self.patch  # the head
        cells = []
        for blocks, stride in zip(self.blocks, self.strides, strict=True):
            if self.resampling == "conv":
                radius += 2 * cell  # on the way up, and down
            cell *= stride
            cells.append(cell)
            radius = _rounded_up(radius, cell) + 2 * blocks * cell
        radius += 2 * self.middle_blocks * cell
        radius += sum(2 * blocks * size for blocks, size in zip(self.blocks, cells, strict=True))
        return _rounded_up(radius + self.patch, self.downsampling)  # with the stem

    @property
    def downsampling(self) -> int:
        """Height and width of a picture must be multiples of this."""
        total = self.patch
        for stride in self.strides:
            total *= stride
        return total


class IFUNetConfig(Settings):
    """The U-Net of DeepFloyd IF. Lists have one entry per level, from the finest to the coarsest."""

    kind: Literal["if_unet"] = "if_unet"
    channels: tuple[PositiveInt, ...] = (192, 384, 576, 768)
    """Width of each level; each but the finest has half the size of the one before."""
    blocks: tuple[PositiveInt, ...] = (3, 3, 3, 3)
    """Residual blocks of each level on the way down; one more on the way up."""
    attention: tuple[bool, ...] = (False, True, True, True)
    """Whether the blocks of a level are followed by attention."""
    self_attention: bool = True
    """Whether attention sees the picture beside the text."""
    embedding_dim: PositiveInt = 768
    """Width of the noise-level embedding."""
    block_scale: Annotated[float, Field(gt=0)] = 1.0
    """A residual block's sum is divided by this; 1.41423 in stage II."""
    text_dim: PositiveInt = 4096
    """Width of the text encoder's embeddings."""
    context_dim: PositiveInt = 768
    """Width to which text is projected before attention; a multiple of 32."""
    head_dim: PositiveInt = 64
    """Width of one attention head."""
    pooling_heads: PositiveInt = 64
    """Heads of the text pooling."""
    groups: PositiveInt = 32
    """Groups of GroupNorm over the picture."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        for name in ("blocks", "attention"):
            if len(getattr(self, name)) != len(self.channels):
                raise ValueError(
                    f"{name} has {len(getattr(self, name))} entries, channels has {len(self.channels)};"
                    " give one per level"
                )
        for width, attends in zip(self.channels, self.attention, strict=True):
            if width % self.groups or width % 2:
                raise ValueError(f"channels {width} must be even and a multiple of groups {self.groups}")
            if attends and width % self.head_dim:
                raise ValueError(f"head_dim {self.head_dim} does not divide the {width} channels that attend")
        if self.channels[-1] % self.head_dim:
            raise ValueError(f"head_dim {self.head_dim} does not divide the {self.channels[-1]} channels at the bottom")
        if self.context_dim % 32:
            raise ValueError(f"context_dim {self.context_dim} must be a multiple of 32, the groups of its norm")
        if self.text_dim % self.pooling_heads:
            raise ValueError(f"pooling_heads {self.pooling_heads} does not divide text_dim {self.text_dim}")
        return self

    @property
    def reads_text(self) -> bool:
        """Whether the network sees the prompt at all."""
        return True

    @property
    def enlarges_first(self) -> bool:
        """Whether a smaller picture is noised after it is enlarged."""
        return True

    @property
    def least_activations(self) -> float:
        """Numbers for each pixel of a picture that exist at once in a network call, or more: the skips and the input.

        See `UNetConfig.least_activations`.
        """
        total = 3.0 + self.channels[0]
        for level, (width, blocks) in enumerate(zip(self.channels, self.blocks, strict=True)):
            total += width * blocks / 4**level
            if level < len(self.channels) - 1:
                total += width / 4 ** (level + 1)
        return total

    @property
    def receptive_radius(self) -> int | None:
        """See `UNetConfig.receptive_radius`: it attends, and normalizes over the whole picture."""
        return None

    @property
    def downsampling(self) -> int:
        """Height and width of a picture must be multiples of this."""
        return int(2 ** (len(self.channels) - 1))


def _rounded_up(pixels: int, multiple: int) -> int:
    return -(-pixels // multiple) * multiple


def _kind_of_model(value: Any) -> Any:
    """A model without `kind` is our U-Net, as in files from before there was a second one."""
    return value.get("kind", "unet") if isinstance(value, dict) else getattr(value, "kind", "unet")


ModelConfig = Annotated[
    Annotated[UNetConfig, Tag("unet")] | Annotated[IFUNetConfig, Tag("if_unet")], Discriminator(_kind_of_model)
]
