"""A training run: loss, optimizer, weight average; the content of its YAML file."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from cascade.conditions.settings import ClassCondition, NumberCondition, PictureCondition
from cascade.config.data import (
    DataConfig,
    FolderSource,
    Fraction,
    PathText,
    ScenesSource,
    SourceConfig,
    TextConfig,
    has_masks,
    own_lows,
)
from cascade.config.sampling import SamplingConfig, StepCount
from cascade.config.stage import StageConfig
from cascade.diffusion.noise import Prediction
from cascade.settings import COUNT, WIDTH, Batches, Pictures, PositiveInt, Settings

Momentum = Annotated[float, Field(ge=0, lt=1)]
LowRankLayers = Literal["attention", "all"]
"""Layers that get a low-rank adapter: the linear ones of attention, or all linear and convolutional ones."""
LowRankKind = Literal["lora", "rslora", "dora", "lokr"]
_LEAST_FACTOR = 0.05  # a smaller one is meant as the rate of another optimizer


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

    space: Prediction = "eps"
    """The squared error is between true and predicted eps, v, x or velocity, whatever the network predicts."""
    min_snr_gamma: Annotated[float, Field(gt=0)] | None = None
    """Weight min(SNR, gamma) on the squared error in x (Hang et al. 2023), instead of `space`."""
    max_weight: Annotated[float, Field(gt=0)] | None = None
    """Cap on the weight in x, for spaces whose weight grows without bound as the noise vanishes."""
    variance_weight: Annotated[float, Field(ge=0)] = 1.0
    """`if_unet`: weight of the variational bound, in bits per dimension; it alone trains the predicted variance."""
    unmasked_weight: Fraction = 0.0
    """Weight of the parts that a picture's mask leaves black, for sources with masks; white parts have 1."""
    levels: Annotated[UniformLevels | LogitNormalLevels, Field(discriminator="kind")] = UniformLevels()
    """Distribution of the noise levels."""
    stratified: bool = False
    """Spread the noise levels of a step evenly over their distribution: same mean, less variance."""


class OptimizerConfig(Settings):
    """Optimizer and learning-rate schedule, counted in optimizer steps."""

    kind: Literal["adamw", "adafactor", "muon", "schedule_free", "prodigy"] = "adamw"
    """`adamw`; `adafactor` (hardly any memory; Imagen's base stage); `muon` (orthogonal steps for the hidden layers'
    matrices and kernels, AdamW for the first and last layers, biases, norms and embeddings). With the extra
    `optimizers`: `schedule_free` (AdamW whose own average is drawn with, in place of `ema`; no decay, Defazio et al.
    2024); `prodigy` (finds the learning rate itself: set `learning_rate: 1`, Mishchenko & Defazio 2023)."""
    learning_rate: Annotated[float, Field(gt=0)] = 1e-4
    """Peak learning rate."""
    betas: tuple[Momentum, Momentum] = (0.9, 0.99)
    """AdamW's averaging factors; Muon's momentum is 0.95."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """Decoupled weight decay, on matrices and kernels only."""
    warmup_steps: Annotated[int, Field(ge=0), COUNT.validator] = 100
    """Steps over which the learning rate rises from 0."""
    decay: Literal["constant", "linear", "cosine"] = "constant"
    """Shape of the decrease at the end."""
    decay_steps: Annotated[int, Field(ge=0), COUNT.validator] = 0
    """Steps of the decrease; it ends at 0 with the last step of the run. 0 with a decay: all after the warm-up."""
    clip_norm: Annotated[float, Field(gt=0)] | None = 1.0
    """Gradients are scaled down to this norm. None: never."""

    @model_validator(mode="after")
    def _suits_its_kind(self) -> Self:
        if self.kind == "schedule_free" and self.decay != "constant":
            raise ValueError("schedule_free averages in place of a decay; leave out optimizer.decay")
        if self.kind == "schedule_free" and self.betas[0] == 0:
            raise ValueError("schedule_free needs momentum; set the first of optimizer.betas above 0")
        if self.kind == "prodigy" and self.learning_rate < _LEAST_FACTOR:
            raise ValueError(
                f"prodigy finds the rate itself, and learning_rate is a factor on it; with {self.learning_rate:g} it"
                " would stand still: set optimizer.learning_rate=1"
            )
        return self


class EMAConfig(Settings):
    """Average of the weights over the recent past; the average is saved for drawing."""

    half_life_images: PositiveInt = 50_000
    """Pictures after which a weight's contribution has halved."""
    warmup: bool = True
    """Shorten the half-life to a fifth of the pictures seen so far, so that early weights are forgotten."""


class DistillConfig(Settings):
    """Learn to draw in stage.sampling.steps steps from a trained stage that takes more (multistep consistency
    distillation, Heek et al. 2024)."""

    teacher: PathText
    """The trained stage: a stage folder, such as MODEL/base of a model, or a run's folder. Its sampling settings,
    guidance and threshold included, are what is learned. Without init_from the run starts from its weights, if it has
    the same model."""
    teacher_steps: StepCount = 64
    """Steps of the teacher's path, a multiple of stage.sampling.steps."""


class PriorConfig(Settings):
    """Prior preservation (Ruiz et al. 2023): a base stage learns a new subject beside pictures that it drew before of
    other things, and so forgets less of them."""

    prompts: Annotated[tuple[str, ...], Field(min_length=1)]
    """What the start (`init_from`) draws, and the captions of these pictures; alternatives in braces and wildcards
    stand for several, as with `--prompt-sets`. Name what must not be forgotten, above all the subject's like."""
    count: Pictures = 200
    """Pictures, the prompts in turn."""
    share: Annotated[float, Field(gt=0, lt=1)] = 0.5
    """Their share of the views."""
    folder: PathText | None = None
    """Folder of these pictures, which are drawn once; other runs with the same settings may share it. None: `prior` in
    the run's folder."""


class ValidationConfig(Settings):
    """The averaged weights' loss on held-out pictures, always with the same noise."""

    sources: Annotated[tuple[SourceConfig, ...], Field(min_length=1)]
    """The held-out pictures, as in data.sources."""
    every: PositiveInt = 1000
    """Steps between validations; one more follows the last step."""
    batches: Batches = 8
    """Batches of batch_size pictures, shared by the processes."""


class TrainingConfig(Settings):
    """Settings of the optimization."""

    steps: PositiveInt = 1000
    """Optimizer steps."""
    batch_size: Pictures = 16
    """Pictures per optimizer step, over all processes and accumulation."""
    accumulation: Pictures = 1
    """Passes per optimizer step; each holds batch_size / accumulation / processes pictures in memory."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "fp32"
    """Arithmetic inside the network; weights stay float32. `auto`: bf16 on GPUs that support it, on a CPU if it is
    faster there than fp32. A run keeps its first choice. fp16 needs a GPU."""
    seed: Annotated[int, Field(ge=0, le=2**63 - 1)] = 0
    """Seed of all randomness."""
    init_from: PathText | None = None
    """Initial weights: a stage folder, such as MODEL/base of a model, or a run's folder."""
    frozen: tuple[str, ...] = ()
    """Parts that are not trained, by name or pattern: `levels.0`, `*.attention`, `*.bias`."""
    trained: tuple[str, ...] = ()
    """Parts that are trained although `frozen` or `lora_rank` freezes them, such as `conditions`."""
    lora_rank: Annotated[int, Field(ge=0), WIDTH.validator] = 0
    """Train only a low-rank adapter of this rank (needs the extra `peft`); the finished stage includes it, the folder
    `adapter` holds it separately. 0: train all weights."""
    lora_kind: LowRankKind = "lora"
    """The adapter's form: `lora`; `rslora` (a factor that keeps high ranks effective, Kalajdzievski 2023); `dora` (each
    output's length learns apart from its direction, Liu et al. 2024; slower); `lokr` (a Kronecker product of two small
    matrices, Yeh et al. 2024: smaller files)."""
    lora_layers: LowRankLayers = "attention"
    """Layers that get an adapter: the linear ones of attention, or all linear and convolutional ones."""
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
    distill: DistillConfig | None = None
    """Distillation of a trained stage. None: train on the pictures themselves."""
    prior: PriorConfig | None = None
    """Prior preservation, for fine-tuning. None: the pictures of data.sources alone."""
    validation: ValidationConfig | None = None
    """A validation loss. None: no validation."""
    log_every: PositiveInt = 50
    """Steps between log entries."""
    sample_every: Annotated[int, Field(ge=0), COUNT.validator] = 0
    """Steps between grids of sample pictures; 0: none."""
    sample_prompts: tuple[str, ...] = ()
    """Prompts of the grids; empty: captions of held-out pictures (`validation`), or else of the first pictures."""
    sample_count: Pictures = 8
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


def _check_conditions(stage: StageConfig, data: DataConfig, sources: Sequence[SourceConfig]) -> None:
    """Raises ValueError for conditions that the data cannot have."""
    conditions = stage.conditions
    pictures = [name for name, config in conditions.items() if isinstance(config, PictureCondition)]
    if pictures and (data.jitter or data.tiles):
        way = "jitter: 0" if data.jitter else "tiles: false"
        raise ValueError(f"data: condition {pictures[0]} is a picture and must lie on the other; set data.{way}")
    unstored = [
        *pictures,
        *(name for name, config in conditions.items() if isinstance(config, NumberCondition) and config.measure),
    ]
    if unstored and data.decoded is not None:
        raise ValueError(
            f"data.decoded stores pictures alone, at one size; leave it out with condition {unstored[0]}, which is"
            " another picture or measured from the original"
        )
    read = [name for name, config in conditions.items() if not (isinstance(config, NumberCondition) and config.measure)]
    for source in sources:
        folder = source.folder_condition if isinstance(source, FolderSource) else None
        if folder is not None and not isinstance(conditions.get(folder), ClassCondition):
            raise ValueError(f"folder_condition: {folder} is not a condition of kind class in stage.conditions")
        if isinstance(source, ScenesSource) and read:
            raise ValueError(f"drawn scenes have no value of condition {read[0]}; use other data sources")
        for name in getattr(source, "columns", {}):
            if name not in read:
                raise ValueError(f"columns: {name} is not a condition in stage.conditions that is read from a column")


class TrainConfig(Settings):
    """One stage's training run: a YAML file of `configs/`."""

    format: Literal[1] = 1
    """Version of this file's layout."""
    output: PathText
    """Folder of the run: checkpoints, samples, log and the finished stage."""
    stage: StageConfig
    """The stage to train."""
    text: TextConfig = TextConfig()
    """The text encoder."""
    data: DataConfig
    """The training data."""
    training: TrainingConfig = TrainingConfig()
    """Settings of the optimization."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.training.distill is not None:
            _check_few_steps(self.training.distill, self.stage.sampling)
        if self.training.prior is not None:
            _check_prior(self)
        crop = self.data.crop
        validation = self.training.validation
        sources = (*self.data.sources, *(validation.sources if validation else ()))
        _check_conditions(self.stage, self.data, sources)
        if self.data.decoded is not None and has_masks(sources):
            raise ValueError("data.decoded stores pictures without their masks; leave it out, or the sources' masks")
        if not self.stage.pictures.is_rgb and any(source.kind == "scenes" for source in self.data.sources):
            raise ValueError(f"data.sources: drawn scenes are rgb of uint8, not {self.stage.pictures}; give files")
        learns = self.stage.model.predicts_variance and self.training.loss.variance_weight
        if learns and self.stage.values != "uint8":
            raise ValueError("training.loss.variance_weight counts the levels of 8 bits; set it 0 for other values")
        if self.stage.low_resolution is None and own_lows(self.data.sources):
            raise ValueError("low_column is for super-resolution stages; this stage has no low_resolution")
        if crop is not None:
            if self.stage.low_resolution is None:
                raise ValueError("data.crop is for super-resolution stages; this stage has no low_resolution")
            if crop > self.stage.resolution:
                raise ValueError(f"data.crop {crop} is larger than stage.resolution {self.stage.resolution}")
            scale = self.stage.resolution // self.stage.low_resolution
            step = math.lcm(scale, self.stage.geometry.divisor, *map(self.stage.detail, self.stage.conditions))
            if crop % step:
                raise ValueError(f"data.crop {crop} must be a multiple of {step}")
        return self


def _check_prior(config: TrainConfig) -> None:
    """Raise ValueError for a run that has no start, or one that cannot draw pictures to learn from."""
    stage = config.stage
    if config.training.init_from is None:
        raise ValueError("training.prior: nothing to preserve without training.init_from; set it, or leave prior out")
    if stage.low_resolution is not None or stage.conditions or not stage.model.reads_text:
        what = "conditions" if stage.conditions else "a smaller picture" if stage.low_resolution else "no text"
        raise ValueError(f"training.prior is for stages that draw from text alone; {stage.name} reads {what}")
    if any(getattr(source, "repeats", None) is not None for source in config.data.sources):
        raise ValueError("training.prior mixes by weight; give the data.sources a weight in place of repeats")


def _check_few_steps(distill: DistillConfig, sampling: SamplingConfig) -> None:
    """Raise ValueError unless the stage is drawn as it is taught: in whole steps of the path, without guidance."""
    if distill.teacher_steps % sampling.steps:
        raise ValueError(
            f"training.distill: teacher_steps {distill.teacher_steps} is not a multiple of stage.sampling.steps"
            f" {sampling.steps}, the steps to learn"
        )
    wrong = {
        "sampler": sampling.sampler.kind != "ddim" or bool(sampling.sampler.own.get("eta")),
        "guidance": sampling.guidance != 1,
        "timesteps": sampling.timesteps is not None,
        "spacing": sampling.spacing in ("leading", "trailing"),
    }
    names = [name for name, is_wrong in wrong.items() if is_wrong]
    if names:
        raise ValueError(
            f"stage.sampling.{names[0]}: a distilled stage is drawn with stage.sampling: {{sampler: ddim,"
            f" steps: {sampling.steps}, guidance: 1, spacing: t}}; its teacher's guidance is part of what it learns"
        )
