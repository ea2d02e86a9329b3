"""The settings of a stage and of a training run. What each builds is one hop away, in `cascade.build`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Discriminator, Field, Tag, model_validator

from cascade.settings import Settings, override, parse, read_yaml

FORMAT_VERSION = 1
"""Version of every file that is written from these settings; `cascade.load` reads this one."""

Kind = Literal["eps", "v", "x", "velocity"]
"""What a network may predict; see `diffusion.parameterization`."""
PositiveInt = Annotated[int, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Momentum = Annotated[float, Field(ge=0, lt=1)]
StepCount = Annotated[int, Field(gt=0, le=1_000_000)]
LogSnr = Annotated[float, Field(ge=-20, le=20)]  # diffusion.noise.LOG_SNR_RANGE
NamedSteps = Literal["fast27", "smart27", "smart50", "smart100", "smart185", "super27", "super100"]


# --- the noise -------------------------------------------------------------------------------------------


class ConstantSchedule(Settings):
    """The same beta at every step (Prince ch. 18)."""

    kind: Literal["constant"] = "constant"
    beta: Annotated[float, Field(gt=0, lt=1)] = 0.01
    """Share of the variance that is replaced by noise in each step."""
    steps: PositiveInt = 1000
    """Number of diffusion steps T."""


class LinearSchedule(Settings):
    """beta grows linearly from `beta_start` to `beta_end` (Ho et al. 2020)."""

    kind: Literal["linear"] = "linear"
    beta_start: Annotated[float, Field(gt=0, lt=1)] = 1e-4
    """First beta."""
    beta_end: Annotated[float, Field(gt=0, lt=1)] = 0.02
    """Last beta."""
    steps: PositiveInt = 1000
    """Number of diffusion steps T."""


class SquaredCosineSchedule(Settings):
    """Discrete cosine of Nichol & Dhariwal (2021) with capped betas, as diffusers and DeepFloyd IF write it."""

    kind: Literal["squared_cosine"] = "squared_cosine"
    steps: PositiveInt = 1000
    """Number of diffusion steps T."""
    max_beta: Annotated[float, Field(gt=0, lt=1)] = 0.999
    """Cap on beta, which would reach 1 at the last step."""


class CosineSchedule(Settings):
    """Continuous cosine; shifted by resolution when `reference_resolution` is given (simple diffusion, 2023)."""

    kind: Literal["cosine"] = "cosine"
    reference_resolution: PositiveInt | None = None
    """Resolution whose noise levels are kept: log SNR moves by 2 log(reference / resolution). None: no shift."""
    log_snr_min: LogSnr = -20.0
    """Log SNR at t = 1 is clipped to this."""
    log_snr_max: LogSnr = 20.0
    """Log SNR at t = 0 is clipped to this."""

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.log_snr_min >= self.log_snr_max:
            raise ValueError(f"log_snr_min {self.log_snr_min} must lie below log_snr_max {self.log_snr_max}")
        return self


ScheduleConfig = Annotated[
    ConstantSchedule | LinearSchedule | SquaredCosineSchedule | CosineSchedule, Field(discriminator="kind")
]


# --- the network -----------------------------------------------------------------------------------------


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
    middle_blocks: Annotated[int, Field(ge=0)] = 1
    """Residual blocks after the coarsest level, each but the last followed by attention where that level has it."""
    patch: PositiveInt = 1
    """Space-to-depth factor of the stem: the network works at 1/patch of the resolution."""
    skips: Literal["concat", "add"] = "concat"
    """How the way up receives the way down."""
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
            total += width * blocks / scale**2
        return total

    @property
    def receptive_radius(self) -> int | None:
        """How far a square of the output looks beyond its edges, in pixels; None: at the whole picture.

        The square's edges are multiples of `downsampling`; so is this. Rounded up where a path enters a coarser level.
        """
        if self.norm == "group" or any(self.attention):
            return None
        cell = radius = self.patch  # the head
        cells = []
        for blocks, stride in zip(self.blocks, self.strides, strict=True):
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


# --- a stage ---------------------------------------------------------------------------------------------


class SamplingConfig(Settings):
    """How a stage draws unless the caller says otherwise."""

    sampler: Literal["ddpm", "ddim", "heun", "dpm++"] = "ddim"
    """`ddpm` is algorithm 18.2; the others reach the same quality in fewer steps."""
    steps: StepCount = 50
    """Number of sampling steps (Heun calls the network twice in each but the last)."""
    spacing: Literal["t", "log_snr", "leading", "trailing"] = "t"
    """Steps are spread evenly in the schedule's time or in log SNR; `leading` and `trailing`: whole steps of a discrete
    schedule, of which the first or the last is met."""
    timesteps: tuple[Annotated[int, Field(ge=0)], ...] | NamedSteps | None = None
    """Discrete schedules: the steps themselves, numbered from 0, high noise first, or one of DeepFloyd IF's lists, in
    place of `steps` and `spacing`."""
    variance: Literal["posterior", "beta", "learned"] = "posterior"
    """Variance sigma_t^2 of `ddpm`: of the posterior, beta_t, or between them where the network says (`if_unet`)."""
    eta: Fraction = 0.0
    """`ddim`: 0 is deterministic, 1 adds as much noise as `ddpm`."""
    guidance: Annotated[float, Field(ge=0)] = 1.0
    """Weight of classifier-free guidance, 1 = none."""
    guidance_interval: tuple[float, float] | None = None
    """Log SNR range in which guidance acts (Kynkaanniemi et al. 2024). None: everywhere."""
    threshold: Annotated[float, Field(gt=0, lt=1)] | Literal["clip"] | None = "clip"
    """Dynamic thresholding at a quantile such as 0.995 (Imagen), static `clip` to [-1, 1], or none."""
    threshold_maximum: Annotated[float, Field(ge=1)] | None = None
    """Dynamic thresholding divides by no more than this. None: no cap."""
    aug_level: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Super-resolution: standard deviation of the noise on the smaller picture."""
    consistency: Annotated[int, Field(ge=0)] = 0
    """Super-resolution: rounds of back-projection after the last step: the area mean of the result is compared with the
    smaller picture, and the difference, enlarged, added to it (Irani & Peleg 1991)."""

    @model_validator(mode="after")
    def _descending(self) -> Self:
        if isinstance(self.timesteps, tuple) and (
            not self.timesteps or any(after >= before for before, after in pairwise(self.timesteps))
        ):
            raise ValueError("timesteps must fall from step to step, from high noise to low, such as [999, 500, 0]")
        return self

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.guidance_interval is not None and self.guidance_interval[0] >= self.guidance_interval[1]:
            low, high = self.guidance_interval
            raise ValueError(f"guidance_interval [{low:g}, {high:g}] is empty; give the smaller log SNR first")
        return self


class PresetConfig(Settings):
    """What a named preset changes in `sampling`."""

    sampler: Literal["ddpm", "ddim", "heun", "dpm++"] | None = None
    """See sampling.sampler."""
    steps: StepCount | None = None
    """See sampling.steps."""
    guidance: Annotated[float, Field(ge=0)] | None = None
    """See sampling.guidance."""
    aug_level: Annotated[float, Field(ge=0, lt=1)] | None = None
    """See sampling.aug_level."""


class StageConfig(Settings):
    """One diffusion model of the cascade: network, noise, and what the network predicts. Saved as stage.json."""

    name: Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]*$")]
    """Name by which per-stage options speak of it, such as `base`; also of its folder in a cascade."""
    resolution: PositiveInt
    """Height and width of the pictures it draws by default, in pixels."""
    low_resolution: PositiveInt | None = None
    """Super-resolution: size of the smaller picture it starts from. None: a base stage."""
    path: Literal["picture", "residual"] = "picture"
    """What is diffused: the picture, or (super-resolution) its difference from the upsampled smaller one."""
    residual_scale: Annotated[float, Field(gt=0)] = 1.0
    """`path: residual`: the difference is divided by this, so that it has about unit variance."""
    parameterization: Kind = "eps"
    """What the network predicts."""
    schedule: ScheduleConfig = CosineSchedule()
    """Noise level as a function of time."""
    model: ModelConfig = UNetConfig()
    """The network."""
    sampling: SamplingConfig = SamplingConfig()
    """Defaults when drawing."""
    presets: dict[Literal["fast", "best"], PresetConfig] = Field(default_factory=dict)
    """Named changes of `sampling`; `default` is `sampling` itself."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.name in ("text_encoder", "cascade"):
            raise ValueError(f"name {self.name} is taken by another part of a cascade's folder; choose another")
        if self.low_resolution is not None and self.low_resolution >= self.resolution:
            raise ValueError(f"low_resolution {self.low_resolution} must be smaller than resolution {self.resolution}")
        if self.low_resolution is not None and self.resolution % self.low_resolution:
            raise ValueError(f"resolution {self.resolution} is not a multiple of low_resolution {self.low_resolution}")
        if self.path == "residual" and self.low_resolution is None:
            raise ValueError("path: residual needs low_resolution, the smaller picture it differs from")
        if isinstance(self.model, IFUNetConfig) and not isinstance(self.schedule, SquaredCosineSchedule):
            raise ValueError("model.kind: if_unet needs schedule.kind: squared_cosine, whose steps it was trained on")
        if self.sampling.variance == "learned" and not isinstance(self.model, IFUNetConfig):
            raise ValueError("sampling.variance: learned needs model.kind: if_unet, which predicts it")
        if self.resolution % self.model.downsampling:
            raise ValueError(
                f"resolution {self.resolution} is not a multiple of {self.model.downsampling},"
                " by which the model divides it"
            )
        return self


# --- text ------------------------------------------------------------------------------------------------


class TextConfig(Settings):
    """The frozen text encoder of a training run."""

    encoder: str = "bundled"
    """`bundled`, a folder in transformers' layout, or a hub id such as google/flan-t5-base."""
    max_length: PositiveInt = 64
    """Tokens kept of a caption; longer ones are cut with a warning."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Number format of the encoder."""
    padded: bool = False
    """Give networks all `max_length` tokens, with what the encoder makes of the padding, as DeepFloyd IF reads them."""
    captions: Literal["as_is", "lower", "deepfloyd"] = "as_is"
    """Texts as they are, in lower case, or cleaned as DeepFloyd IF's captions were."""
    cache: str | None = None
    """Folder of cached embeddings; captions not in it are encoded when met. None: encode every time."""


# --- data ------------------------------------------------------------------------------------------------


class FolderSource(Settings):
    """A folder of pictures with captions: sidecar .txt files, or metadata.jsonl / metadata.csv with file_name."""

    kind: Literal["folder"] = "folder"
    path: str
    """The folder; searched recursively."""
    caption_column: str = "caption"
    """Column of metadata.jsonl or metadata.csv that holds the caption, or a list of variants."""
    weight: Annotated[float, Field(gt=0)] = 1.0
    """Share of the views, relative to the other sources."""


class ParquetSource(Settings):
    """Parquet files with an encoded picture and a caption in each row."""

    kind: Literal["parquet"] = "parquet"
    files: tuple[str, ...]
    """Paths or glob patterns."""
    image_column: str = "image"
    """Column of encoded pictures (bytes, or a struct with `bytes`)."""
    caption_column: str = "caption"
    """Column of captions, or of lists of variants of which one is drawn per view."""
    low_column: str | None = None
    """Super-resolution: column of the smaller pictures, such as those that the stage before drew. None, or an empty
    cell: the area mean."""
    weight: Annotated[float, Field(gt=0)] = 1.0
    """Share of the views, relative to the other sources."""


class HubSource(Settings):
    """Any dataset that Hugging Face `datasets` loads, streaming or not."""

    kind: Literal["datasets"] = "datasets"
    name: str
    """Hub id, builder name or local folder, as for `datasets.load_dataset`."""
    config: str | None = None
    """Configuration of the dataset."""
    split: str = "train"
    """Split."""
    streaming: bool = False
    """Read as a stream, without downloading first."""
    shuffle_buffer: PositiveInt = 1000
    """Streaming: records are shuffled within blocks of this many."""
    image_column: str = "image"
    """Column of pictures."""
    caption_column: str = "caption"
    """Column of captions or lists of variants."""
    weight: Annotated[float, Field(gt=0)] = 1.0
    """Share of the views, relative to the other sources."""


class WebDatasetSource(Settings):
    """WebDataset tar shards on a disk: neighbours 0001.jpg, 0001.txt are a record. Read in place, never unpacked."""

    kind: Literal["webdataset"] = "webdataset"
    files: tuple[str, ...]
    """Paths or glob patterns of uncompressed tar files. (Shards on a hub: `kind: datasets` with `streaming`.)"""
    caption: Annotated[str, Field(pattern=r"^[a-z0-9_.]+$")] = "txt"
    """Ending of the members with captions: `txt`, of which each line is a variant, or `json`."""
    caption_column: str = "caption"
    """Key of the caption, or of a list of variants, in `json` members."""
    shuffle_block: PositiveInt = 10_000
    """Each epoch permutes the shards, then records within blocks of this many; nothing is held in memory."""
    weight: Annotated[float, Field(gt=0)] = 1.0
    """Share of the views, relative to the other sources."""


class ScenesSource(Settings):
    """Drawn scenes of coloured shapes: endless, labelled, no files."""

    kind: Literal["scenes"] = "scenes"
    held_out: bool = False
    """Draw only the attribute pairs that are otherwise never drawn; for evaluation."""
    weight: Annotated[float, Field(gt=0)] = 1.0
    """Share of the views, relative to the other sources."""


SourceConfig = Annotated[
    FolderSource | ParquetSource | WebDatasetSource | HubSource | ScenesSource, Field(discriminator="kind")
]


def _own_lows(sources: Sequence[SourceConfig]) -> bool:
    """Whether a source has smaller pictures of its own."""
    return any(isinstance(source, ParquetSource) and source.low_column is not None for source in sources)


class DataConfig(Settings):
    """Where pictures and captions come from and how a view is made of them."""

    sources: Annotated[tuple[SourceConfig, ...], Field(min_length=1)]
    """One or several sources, mixed by weight."""
    caption_dropout: Fraction = 0.1
    """Probability that a caption gives way to the null text, for classifier-free guidance."""
    crop: PositiveInt | None = None
    """Super-resolution: train on random crops of this size (in pixels of the large picture). None: whole pictures."""
    tiles: bool = False
    """Super-resolution: the pictures are tiles cut from pictures of `resolution`; they are cropped, never resized."""
    aspect: Literal["crop", "pad"] = "pad"
    """Pictures that are not square are centre-cropped, or padded with white."""
    flip: Fraction = 0.0
    """Probability of mirroring; leave 0 where captions speak of left and right."""
    jitter: Fraction = 0.0
    """Largest random shift and zoom, as a share of the size, with white around; for pictures on white."""
    max_aug_level: Annotated[float, Field(ge=0, lt=1)] = 0.3
    """Super-resolution: noise on the smaller picture is uniform in [0, this]."""
    max_bad_share: Fraction = 0.05
    """Stop when a larger share of the records is broken or has no caption."""
    workers: Annotated[int, Field(ge=0)] = 0
    """Processes that decode pictures beside the training process."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.tiles and self.crop is None:
            raise ValueError("tiles: true needs crop, the size to cut from each tile")
        if self.tiles and self.jitter:
            raise ValueError("jitter resamples whole pictures; leave it 0 with tiles: true")
        if self.jitter and _own_lows(self.sources):
            raise ValueError("jitter would move a picture away from its low_column; leave it 0")
        return self


# --- training --------------------------------------------------------------------------------------------


class UniformLevels(Settings):
    """t uniform, as in algorithm 18.1: over the T steps of a discrete schedule, over (0, 1) of a continuous one."""

    kind: Literal["uniform"] = "uniform"


class LogitNormalLevels(Settings):
    """logit t of the straight path (log SNR = -2 logit t) is normal; t = 1 is noise (Esser et al. 2024)."""

    kind: Literal["logit_normal"] = "logit_normal"
    mean: float = 0.4
    """Mean of logit t; larger means noisier."""
    std: Annotated[float, Field(gt=0)] = 1.0
    """Standard deviation of logit t."""


class LossConfig(Settings):
    """The training loss: a weighted square, and the distribution of noise levels."""

    space: Kind = "eps"
    """The square is taken between true and predicted eps, v, x or velocity, whatever the network predicts."""
    min_snr_gamma: Annotated[float, Field(gt=0)] | None = None
    """Weight min(SNR, gamma) on the square in x (Hang et al. 2023), in place of `space`."""
    max_weight: Annotated[float, Field(gt=0)] | None = None
    """Cap on the weight in x, for spaces whose weight grows without bound as the noise vanishes."""
    variance_weight: Annotated[float, Field(ge=0)] = 1.0
    """`if_unet`: weight of the variational bound, in bits per dimension, which alone trains the predicted variance."""
    levels: Annotated[UniformLevels | LogitNormalLevels, Field(discriminator="kind")] = UniformLevels()
    """Distribution of the noise levels."""
    stratified: bool = False
    """Spread the noise levels of a batch evenly over their distribution: same mean, less variance."""


class OptimizerConfig(Settings):
    """Optimizer and learning-rate schedule, counted in optimizer steps."""

    kind: Literal["adamw", "adafactor", "muon"] = "adamw"
    """`adamw`; `adafactor` (less memory; Imagen's base stage); `muon` (orthogonal steps for the hidden layers' matrices
    and kernels, AdamW for the first and last layers, biases, norms and embeddings)."""
    learning_rate: Annotated[float, Field(gt=0)] = 1e-4
    """Peak learning rate."""
    betas: tuple[Momentum, Momentum] = (0.9, 0.99)
    """AdamW's averaging factors; Muon's momentum is 0.95."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """Decoupled weight decay, on matrices and kernels only."""
    warmup_steps: Annotated[int, Field(ge=0)] = 100
    """Steps over which the learning rate rises from 0."""
    decay: Literal["constant", "linear", "cosine"] = "constant"
    """Shape of the fall at the end."""
    decay_steps: Annotated[int, Field(ge=0)] = 0
    """Steps of the fall; it ends at 0 with the last step of the run. 0 with a decay: everything after the warm-up."""
    clip_norm: Annotated[float, Field(gt=0)] | None = 1.0
    """Gradients are scaled down to this norm. None: never."""


class EMAConfig(Settings):
    """Average of the weights over the recent past, which is what gets saved for drawing."""

    half_life_images: PositiveInt = 50_000
    """Pictures after which a weight's contribution has halved."""
    warmup: bool = True
    """Shorten the half-life to a fifth of the pictures seen so far, so that the start is forgotten."""


class ValidationConfig(Settings):
    """The loss on pictures that training does not see, of the averaged weights, always with the same noise."""

    sources: Annotated[tuple[SourceConfig, ...], Field(min_length=1)]
    """The held-out pictures."""
    every: PositiveInt = 1000
    """Steps between validations; there is one after the last step too."""
    batches: PositiveInt = 8
    """Batches of batch_size / accumulation pictures, shared by the processes."""


class TrainingConfig(Settings):
    """The run."""

    steps: PositiveInt = 1000
    """Optimizer steps."""
    batch_size: PositiveInt = 16
    """Pictures per optimizer step, over all processes and accumulation."""
    accumulation: PositiveInt = 1
    """Passes per optimizer step; each holds batch_size / accumulation / processes pictures in memory."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Arithmetic inside the network; weights stay float32. fp16 needs a GPU."""
    seed: Annotated[int, Field(ge=0, le=2**63 - 1)] = 0
    """Everything random follows from it."""
    init_from: str | None = None
    """Weights that the network starts from: a stage folder, such as MODEL/base of a model, or a run's folder."""
    frozen: tuple[str, ...] = ()
    """Parts that stay as they are, by name or pattern: `levels.0`, `*.attention`, `*.bias`."""
    lora_rank: Annotated[int, Field(ge=0)] = 0
    """Train differences of this rank alone (needs the extra `peft`); the finished stage has them added in, the folder
    `adapter` holds them apart. 0: train all weights."""
    lora_layers: Literal["attention", "all"] = "attention"
    """Layers that `lora_rank` is for: the linear ones of attention, or all linear and convolutional ones."""
    activation_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    compile: bool = False
    """torch.compile the network; worth it on a GPU or for long runs."""
    loss: LossConfig = LossConfig()
    """The loss."""
    optimizer: OptimizerConfig = OptimizerConfig()
    """The optimizer."""
    ema: EMAConfig = EMAConfig()
    """The weight average."""
    validation: ValidationConfig | None = None
    """A validation loss. None: no validation."""
    log_every: PositiveInt = 50
    """Steps between log entries."""
    sample_every: Annotated[int, Field(ge=0)] = 0
    """Steps between grids of sample pictures; 0: none."""
    sample_prompts: tuple[str, ...] = ()
    """Prompts of the grids; empty: the captions of the first pictures."""
    sample_count: PositiveInt = 8
    """Pictures in a grid when `sample_prompts` is empty, and for super-resolution."""
    save_every: PositiveInt = 1000
    """Steps between checkpoints; the last step is always saved."""
    keep_checkpoints: PositiveInt = 2
    """Newest checkpoints kept."""
    trackers: tuple[str, ...] = ()
    """Experiment trackers of accelerate by name, such as tensorboard. A log.jsonl is always written."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.batch_size % self.accumulation:
            raise ValueError(f"batch_size {self.batch_size} is not a multiple of accumulation {self.accumulation}")
        if self.optimizer.warmup_steps + self.optimizer.decay_steps > self.steps:
            raise ValueError(
                f"optimizer.warmup_steps + decay_steps = {self.optimizer.warmup_steps + self.optimizer.decay_steps}"
                f" is longer than the run of {self.steps} steps"
            )
        return self


class TrainConfig(Settings):
    """One stage's training run: a YAML file of `configs/`."""

    format: Literal[1] = 1
    """Version of this file's layout."""
    output: str
    """Folder of the run: checkpoints, samples, log and the finished stage."""
    stage: StageConfig
    """What is trained."""
    text: TextConfig = TextConfig()
    """The text encoder."""
    data: DataConfig
    """What it is trained on."""
    training: TrainingConfig = TrainingConfig()
    """How it is trained."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        crop = self.data.crop
        if self.stage.low_resolution is None and _own_lows(self.data.sources):
            raise ValueError("low_column is for super-resolution stages; this stage has no low_resolution")
        if crop is not None:
            if self.stage.low_resolution is None:
                raise ValueError("data.crop is for super-resolution stages; this stage has no low_resolution")
            if crop > self.stage.resolution:
                raise ValueError(f"data.crop {crop} is larger than stage.resolution {self.stage.resolution}")
            scale = self.stage.resolution // self.stage.low_resolution
            step = math.lcm(scale, self.stage.model.downsampling)
            if crop % step:
                raise ValueError(f"data.crop {crop} must be a multiple of {step}")
        return self


def load_train_config(path: str | Path, assignments: Sequence[str] = ()) -> TrainConfig:
    """The training run described by a YAML file and `key=value` changes."""
    return parse(TrainConfig, override(read_yaml(path), assignments), str(path))
