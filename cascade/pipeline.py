"""The cascade: prompts -> text -> stage -> stage -> stage -> pictures."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, TypeAlias, TypeVar

import numpy as np
import psutil
import torch
from torch import Tensor
from tqdm import tqdm

from cascade.checkpoint import atomic_folder, save_stage, write_json
from cascade.conditioning import Conditioning
from cascade.config import FORMAT_VERSION, SamplingConfig, StageConfig
from cascade.diffusion.noise import diffuse, log_snr_from_std, noise_like
from cascade.diffusion.samplers import OnStep
from cascade.errors import CascadeError
from cascade.images import to_float, to_pil, to_uint8
from cascade.sampling import resolve_sampling
from cascade.seeds import MAX_SEED, fresh_seed, generator
from cascade.stage import Stage
from cascade.text.captions import Captions
from cascade.text.t5 import TextEmbeddings, TextEncoder

T = TypeVar("T")
PerStage: TypeAlias = T | Mapping[str, T] | None
"""One value for all stages, or {stage name: value}; None or a missing stage: the stage's own default."""

Callback = Callable[[str, int, int, Tensor], None]
"""callback(stage, step, steps, x_hat) after each step, x_hat (B, 3, H, W) in about [-1, 1]."""


@dataclass(frozen=True)
class StageSlot:
    """A stage of a pipeline: in memory, or (`--low-memory`) loaded when its turn comes and dropped after it."""

    config: StageConfig
    load: Callable[[], Stage]
    held: bool = False

    @classmethod
    def holding(cls, stage: Stage) -> StageSlot:
        """A slot whose stage stays in memory."""
        return cls(stage.config, lambda: stage, held=True)

    def moved(self, device: torch.device, dtype: torch.dtype) -> StageSlot:
        """The same slot, its stage on a device and in a number format: at once, or whenever it is loaded."""
        if self.held:
            self.load().to(device, dtype)
            return self
        return replace(self, load=lambda: self.load().to(device, dtype))


@dataclass(frozen=True)
class CascadeOutput:
    """What a call drew, one entry a picture: all pictures of the first prompt, then of the second, and so on.

    images: of the last stage that ran. stages: {resolution: pictures}, the last stage included. `seeds` and
    `prompts` repeat for the pictures of one prompt. Types follow `output_type`.
    """

    images: Any
    stages: dict[int, Any]
    seeds: list[int]
    prompts: list[str]


@dataclass(frozen=True)
class Picture:
    """One picture to draw: which text it has, and (seed, number), from which all its noise follows."""

    text: int
    seed: int
    number: int


class CascadePipeline:
    """A text encoder and the stages of a cascade, from the smallest picture to the largest."""

    def __init__(
        self,
        text_encoder: TextEncoder,
        stages: Sequence[Stage | StageSlot],
        *,
        name: str = "unnamed",
        license: str = "unstated",
        reload_text_encoder: Callable[[], TextEncoder] | None = None,
    ) -> None:
        """Raises CascadeError when the sizes of the stages or the width of the text do not fit together.

        reload_text_encoder: the encoder is released once it has read the prompts, and loaded again for the next ones.
        """
        self.text_encoder = text_encoder
        self._reload_text_encoder = reload_text_encoder
        self._text_encoder_released = False
        self.slots = [StageSlot.holding(stage) if isinstance(stage, Stage) else stage for stage in stages]
        self.name, self.license = name, license
        self.device, self.dtype = torch.device("cpu"), torch.float32
        for slot in self.slots:
            if slot.held:
                weight = next(slot.load().network.parameters())
                self.device, self.dtype = weight.device, weight.dtype
                break
        _check_chain([slot.config for slot in self.slots], text_encoder.dim)

    @classmethod
    def from_pretrained(
        cls,
        model: str | Path | None = None,
        *,
        super_resolution: str | Path | Sequence[str | Path] | None = None,
        device: str | torch.device | None = None,
        dtype: torch.dtype | str | None = None,
        low_memory: bool = False,
        captions: Captions | None = None,
        adapters: Mapping[str, str | Path] | None = None,
    ) -> CascadePipeline:
        """The bundled cascade (None), a folder, or a hub id; DeepFloyd IF's too, in diffusers' layout.

        super_resolution: stage folders or `model/stage` that follow the model's base stage in place of its own.
        device: default the GPU if there is one. dtype: default float32 on a CPU, bfloat16 on a GPU.
        low_memory: stages are loaded one at a time, and the text encoder is released after the prompts.
        captions: how prompts are cleaned, default as the model says: "as_is", "lower" or "deepfloyd".
        adapters: folders of low-rank adapters by the name of the stage that they are added to, e.g. {"base": folder}.
        """
        from cascade.load import load_pipeline  # loading stands above; see docs/architecture.md

        return load_pipeline(
            model,
            super_resolution=super_resolution,
            device=device,
            dtype=dtype,
            low_memory=low_memory,
            captions=captions,
            adapters=adapters,
        )

    @property
    def stage_names(self) -> list[str]:
        """Names for per-stage arguments, in order."""
        return [slot.config.name for slot in self.slots]

    @property
    def default_batch_size(self) -> int:
        """Pictures per network call unless the caller says otherwise."""
        return 1 if self.device.type == "cpu" else 8

    @torch.inference_mode()
    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        *,
        prompt_embeds: TextEmbeddings | None = None,
        negative_prompt: str | Sequence[str] | None = None,
        num_images_per_prompt: int = 1,
        seed: int | Sequence[int] | None = None,
        until: int | None = None,
        height: int | None = None,
        width: int | None = None,
        steps: PerStage[int] = None,
        guidance: PerStage[float] = None,
        sampler: PerStage[str] = None,
        aug_level: PerStage[float] = None,
        threshold: PerStage[float | str] = None,
        preset: str | None = None,
        batch_size: int | None = None,
        output_type: Literal["pil", "np", "pt"] = "pil",
        progress: bool = False,
        callback: Callback | None = None,
    ) -> CascadeOutput:
        """Draw pictures for prompts (or for embeddings in their place).

        seed: one for all prompts, one for each, or None: drawn and reported. until: resolution of the last stage
        to run. height, width: of that stage, in pixels. threshold: a quantile, "clip" or "none" (None: the default of
        the stage). preset: "fast", "default" or "best". batch_size: pictures per network call, default 1 on a CPU and
        8 on a GPU; a short last batch is padded. output_type: PIL, NumPy (B, H, W, 3) uint8, or torch (B, 3, H, W)
        float32 in [-1, 1]. Raises CascadeError for arguments that do not fit.
        """
        _check_output_type(output_type)
        prompts = _prompts(prompt, prompt_embeds)
        seeds = _seeds(seed, len(prompts))
        slots = self.slots_until(until)
        settings = resolve_sampling(
            [slot.config for slot in self.slots],
            preset,
            {"steps": steps, "guidance": guidance, "sampler": sampler, "aug_level": aug_level, "threshold": threshold},
        )
        sizes = stage_sizes([slot.config for slot in slots], height, width)
        text, null = self._texts(prompts, prompt_embeds, negative_prompt)
        pictures = [
            Picture(index, seeds[index], number)
            for index in range(len(prompts))
            for number in range(_positive("num_images_per_prompt", num_images_per_prompt))
        ]
        batch_size = _positive("batch_size", self.default_batch_size if batch_size is None else batch_size)
        drawn: dict[int, Tensor] = {}
        previous: Tensor | None = None
        for slot, size in zip(slots, sizes, strict=True):
            with self.running(slot) as stage:
                self._check_memory(slot.config, size, batch_size)
                steps_count = len(stage.noise_levels(settings[stage.name])) - 1
                watch = _watcher(stage.name, steps_count, len(pictures), batch_size, progress, callback)
                parts = []
                for members, count in _padded_batches(len(pictures), batch_size):
                    batch = [pictures[index] for index in members]
                    low = None if previous is None else previous[members]
                    x = self._draw(stage, settings[stage.name], size, batch, text, null, low, watch.step)
                    parts.append(x[:count])
                previous = torch.cat(parts)
                drawn[stage.config.resolution] = previous
                watch.close()
                del stage  # `--low-memory`: it must be gone before the next one is loaded
        return CascadeOutput(
            images=_as_type(drawn[slots[-1].config.resolution], output_type),
            stages={resolution: _as_type(pixels, output_type) for resolution, pixels in drawn.items()},
            seeds=[picture.seed for picture in pictures],
            prompts=[prompts[picture.text] for picture in pictures],
        )

    def save_pretrained(self, folder: str | Path, dtype: torch.dtype | None = None) -> None:
        """Write one folder: cascade.json, text_encoder/ and a folder a stage, safetensors; atomically.

        dtype: number format of the stage weights, default the one they have. A cascade that stood there is replaced;
        raises CascadeError if anything else stands there.
        """
        folder = Path(folder)
        if folder.exists() and not _may_be_replaced(folder):
            raise CascadeError(f"{folder}: holds other files; name a new or empty folder for the cascade")
        with atomic_folder(folder) as temporary:
            self._loaded_text_encoder().save_pretrained(temporary / "text_encoder")
            for slot in self.slots:
                stage = slot.load()
                save_stage(temporary / slot.config.name, slot.config, stage.network.state_dict(), dtype)
            write_json(
                temporary / "cascade.json",
                {
                    "format": FORMAT_VERSION,
                    "name": self.name,
                    "license": self.license,
                    "stages": self.stage_names,
                    "max_text_length": self.text_encoder.max_length,
                    "text_padded": self.text_encoder.padded,
                    "captions": self.text_encoder.captions,
                },
            )

    def push_to_hub(self, repo: str, *, private: bool = False) -> None:
        """Upload what `save_pretrained` writes to a model repository of the Hugging Face hub."""
        import tempfile

        from huggingface_hub import HfApi

        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary) / "model"
            self.save_pretrained(folder)
            api = HfApi()
            api.create_repo(repo, private=private, exist_ok=True)
            api.upload_folder(repo_id=repo, folder_path=folder)

    def to(self, device: str | torch.device | None = None, dtype: torch.dtype | None = None) -> CascadePipeline:
        """Move the stages to a device and number format. The text encoder moves too, but keeps its own format."""
        self.device = torch.device(device) if device is not None else self.device
        self.dtype = dtype or self.dtype
        self._loaded_text_encoder().to(device=self.device)
        self.slots = [slot.moved(self.device, self.dtype) for slot in self.slots]
        return self

    def _draw(self, stage: Stage, *arguments: Any) -> Tensor:
        """`draw_batch` as (B, 3, H, W) uint8, on the CPU. Raises CascadeError for numbers that are not finite.

        Whole numbers pass from stage to stage: the next stage sees exactly the picture that can be saved, and the last
        bits of float arithmetic do not travel on.
        """
        x = self.draw_batch(stage, *arguments)
        if not bool(torch.isfinite(x).all()):
            raise CascadeError(not_finite(stage.name))
        return to_uint8(x).cpu()

    def encode(self, texts: Sequence[str]) -> TextEmbeddings:
        """Embeddings of texts, each encoded alone and padded to the longest allowed; `low_memory` then releases T5."""
        encoder = self._loaded_text_encoder()
        embeddings = encoder.encode(texts)
        if self._reload_text_encoder is not None:
            encoder.release()
            self._text_encoder_released = True
        return embeddings.padded(max(encoder.max_length, embeddings.tokens.shape[1]))

    def draw_batch(
        self,
        stage: Stage,
        settings: SamplingConfig,
        size: tuple[int, int],
        batch: Sequence[Picture],
        text: TextEmbeddings,
        null: TextEmbeddings,
        low: Tensor | None,
        on_step: OnStep | None = None,
    ) -> Tensor:
        """One batch of one stage: (B, 3, H, W) float32, in about [-1, 1].

        text, null: from which each picture takes the row `picture.text`. low: (B, 3, h, w) uint8, the smaller pictures.
        """

        def rng(purpose: str) -> list[torch.Generator]:
            return [generator(picture.seed, picture.number, stage.name, purpose) for picture in batch]

        self._check_memory(stage.config, size, len(batch))
        low = None if low is None else stage.unnoised(to_float(low))
        cond = _conditioning(batch, text, low, settings.aug_level, rng("augment")).to(self.device)
        null_text = null.select([picture.text for picture in batch])
        null_cond = cond.with_text(null_text.tokens.to(self.device), null_text.mask.to(self.device))
        z = noise_like(torch.empty(len(batch), 3, *size, device=self.device), rng("start"))
        return stage.sample(cond, null_cond, z, rng("step"), settings, on_step)

    def _texts(
        self,
        prompts: Sequence[str],
        embeds: TextEmbeddings | None,
        negative_prompt: str | Sequence[str] | None,
    ) -> tuple[TextEmbeddings, TextEmbeddings]:
        """Embeddings of the prompts, and of what takes the null text's place for each."""
        negative = _texts_of("negative_prompt", "" if negative_prompt is None else negative_prompt)
        if len(negative) not in (1, len(prompts)):
            raise CascadeError(f"negative_prompt: {len(negative)} for {len(prompts)} prompts; give one or each its own")
        encoder = self._loaded_text_encoder()
        text = embeds if embeds is not None else encoder.encode(prompts)
        if text.tokens.shape[-1] != self.text_encoder.dim:
            raise CascadeError(
                f"prompt_embeds: width {text.tokens.shape[-1]}, this cascade reads {self.text_encoder.dim}"
            )
        null = encoder.encode(negative).select([index % len(negative) for index in range(len(prompts))])
        if self._reload_text_encoder is not None:
            encoder.release()
            self._text_encoder_released = True
        # Always to the same length: sums over more tokens, masked or not, may differ in their last bits, and a
        # picture should not depend on how long the other prompts are.
        length = max(encoder.max_length, text.tokens.shape[1], null.tokens.shape[1])
        return text.padded(length), null.padded(length)

    def _loaded_text_encoder(self) -> TextEncoder:
        if self._text_encoder_released and self._reload_text_encoder is not None:
            self.text_encoder = self._reload_text_encoder()
            self._text_encoder_released = False
        return self.text_encoder

    def slots_until(self, until: int | None) -> list[StageSlot]:
        """The stages up to the one that draws `until` px; all of them for None. Raises CascadeError."""
        resolutions = [slot.config.resolution for slot in self.slots]
        if until is None:
            return self.slots
        if until not in resolutions:
            raise CascadeError(f"until: no stage draws {until} px; choose one of {', '.join(map(str, resolutions))}")
        return self.slots[: resolutions.index(until) + 1]

    def _check_memory(self, stage: StageConfig, size: tuple[int, int], batch_size: int) -> None:
        """Raises MemoryError for pictures that certainly do not fit, before any noise for them is drawn."""
        needed = batch_size * math.prod(size) * stage.model.least_activations * self.dtype.itemsize
        free = _free_bytes(self.device)
        if needed > free:
            raise MemoryError(f": needs more than {needed / 1e9:.3g} GB, {free / 1e9:.3g} GB are free")

    @contextmanager
    def running(self, slot: StageSlot) -> Iterator[Stage]:
        """The slot's stage; running out of memory inside is told with the stage's name."""
        try:
            yield slot.load()
        except (RuntimeError, MemoryError) as error:
            if is_out_of_memory(error):
                numbers = str(error) if isinstance(error, MemoryError) else ""
                raise _out_of_memory(slot.config.name, numbers) from error
            raise


def _free_bytes(device: torch.device) -> int:
    """Memory for tensors on a device: of a GPU also what torch has reserved there and does not use."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    return psutil.virtual_memory().available


def not_finite(stage: str) -> str:
    """What is said of NaN in a picture."""
    return f"stage {stage}: the network gave numbers that are not finite; try dtype float32, or check its weights"


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error means that a smaller batch could help."""
    if isinstance(error, RuntimeError) and ("not enough memory" in str(error) or "out of memory" in str(error)):
        return True
    return isinstance(error, (torch.OutOfMemoryError, MemoryError))


def _out_of_memory(stage: str, numbers: str = "") -> CascadeError:
    return CascadeError(
        f"out of memory in stage {stage}{numbers}; use a smaller batch_size, low_memory=True, dtype bfloat16,"
        " a smaller height and width, or stop earlier with until"
    )


def _conditioning(
    batch: Sequence[Picture],
    text: TextEmbeddings,
    low: Tensor | None,
    aug_level: float,
    rng: Sequence[torch.Generator],
) -> Conditioning:
    """The text of each picture and, for super-resolution, its smaller picture (B, 3, h, w), noised."""
    own = text.select([picture.text for picture in batch])
    if low is None:
        return Conditioning(own.tokens, own.mask)
    level = log_snr_from_std(torch.full((len(batch), 1, 1, 1), aug_level))
    return Conditioning(own.tokens, own.mask, diffuse(low, noise_like(low, rng), level), level)


class _Watcher:
    """Progress of one stage: a bar, the caller's callback, or neither."""

    def __init__(self, stage: str, steps: int, bar: tqdm[Any] | None, callback: Callback | None) -> None:
        self._stage, self._steps, self._bar, self._callback = stage, steps, bar, callback

    def step(self, step: int, x_hat: Tensor) -> None:
        if self._bar is not None:
            self._bar.update()
        if self._callback is not None:
            self._callback(self._stage, step, self._steps, x_hat)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


def _watcher(
    stage: str, steps: int, pictures: int, batch_size: int, progress: bool, callback: Callback | None
) -> _Watcher:
    total = steps * -(-pictures // batch_size)
    bar = tqdm(total=total, desc=stage, unit="step") if progress else None
    return _Watcher(stage, steps, bar, callback)


def _may_be_replaced(path: Path) -> bool:
    """Whether `path` is a cascade or an empty folder."""
    return path.is_dir() and ((path / "cascade.json").is_file() or not any(path.iterdir()))


def _padded_batches(count: int, batch_size: int) -> Iterator[tuple[list[int], int]]:
    """(members, how many of them are real): a short last batch repeats its last member.

    So that every network call has the same shape, and a picture the same bytes wherever it stands.
    """
    for start in range(0, count, batch_size):
        members = list(range(start, min(start + batch_size, count)))
        yield members + [members[-1]] * (batch_size - len(members)), len(members)


def _prompts(prompt: str | Sequence[str] | None, embeds: TextEmbeddings | None) -> list[str]:
    if (prompt is None) == (embeds is None):
        raise CascadeError("give either prompt or prompt_embeds")
    if embeds is not None:
        if not isinstance(embeds, TextEmbeddings) or not len(embeds):
            raise CascadeError("prompt_embeds: expected TextEmbeddings(tokens, mask) of at least one prompt")
        return [""] * len(embeds)
    prompts = _texts_of("prompt", prompt)
    if not prompts:
        raise CascadeError("prompt: the list is empty; give at least one prompt")
    return prompts


def _texts_of(name: str, value: Any) -> list[str]:
    texts: list[Any] = [value] if isinstance(value, str) else list(value) if isinstance(value, Iterable) else [value]
    for text in texts:
        if not isinstance(text, str):
            raise CascadeError(f"{name}: {text!r} is no text; expected a string, or a list of strings")
    return texts


def _seeds(seed: int | Sequence[int] | None, count: int) -> list[int]:
    if seed is None:
        return [fresh_seed() for _ in range(count)]
    given: list[Any] = list(seed) if isinstance(seed, (Sequence, np.ndarray)) else [seed] * count
    if len(given) != count:
        raise CascadeError(f"seed: {len(given)} seeds for {count} prompts; give one, or one for each prompt")
    # Plain numbers, because noise follows from how a seed is written: NumPy's 1 and ours must be the same.
    seeds = [_whole_number("seed", value) for value in given]
    for value in seeds:
        if not 0 <= value <= MAX_SEED:
            raise CascadeError(f"seed: {value}; expected a whole number in 0..{MAX_SEED}")
    return seeds


def _whole_number(name: str, value: Any) -> int:
    try:
        return operator.index(value)
    except TypeError:
        raise CascadeError(f"{name}: {value!r}; expected a whole number") from None


def _positive(name: str, value: Any) -> int:
    number = _whole_number(name, value)
    if number < 1:
        raise CascadeError(f"{name}: {value}; expected at least 1")
    return number


def stage_sizes(stages: Sequence[StageConfig], height: int | None, width: int | None) -> list[tuple[int, int]]:
    """(height, width) of each stage, so that the last has the size asked for."""
    last = stages[-1].resolution
    sizes = []
    for stage in stages:
        pair = []
        for name, wanted in (("height", height), ("width", width)):
            pixels, rest = divmod((last if wanted is None else _whole_number(name, wanted)) * stage.resolution, last)
            if rest or pixels % stage.model.downsampling or pixels < 1:
                step = _common_step(stages)
                raise CascadeError(f"{name}: {wanted} is not possible; expected a multiple of {step}")
            pair.append(pixels)
        sizes.append((pair[0], pair[1]))
    return sizes


def _common_step(stages: Sequence[StageConfig]) -> int:
    last = stages[-1].resolution
    steps = [stage.model.downsampling * last // stage.resolution for stage in stages]
    return math.lcm(*steps)


def _check_chain(stages: Sequence[StageConfig], text_dim: int) -> None:
    if not stages:
        raise CascadeError("a cascade needs at least one stage")
    if stages[0].low_resolution is not None:
        raise CascadeError(f"stage {stages[0].name}: the first stage must be a base stage, without low_resolution")
    names = [stage.name for stage in stages]
    if len(set(names)) != len(names):
        raise CascadeError(f"stages {', '.join(names)}: every stage needs a name of its own")
    for before, after in pairwise(stages):
        if after.low_resolution != before.resolution:
            raise CascadeError(
                f"stage {after.name} starts from {after.low_resolution} px, but stage {before.name} before it draws"
                f" {before.resolution} px; choose stages whose sizes chain"
            )
    for stage in stages:
        if stage.model.reads_text and stage.model.text_dim != text_dim:
            raise CascadeError(
                f"stage {stage.name}: reads text of width {stage.model.text_dim}, the text encoder gives {text_dim};"
                " use the encoder that it was trained with"
            )


def _as_type(pixels: Tensor, output_type: str) -> Any:
    """uint8 (B, 3, H, W) as PIL pictures, NumPy (B, H, W, 3) uint8, or torch float32 in [-1, 1]."""
    match output_type:
        case "pil":
            return to_pil(pixels)
        case "np":
            return pixels.permute(0, 2, 3, 1).contiguous().numpy()
        case _:
            return to_float(pixels)


def _check_output_type(output_type: str) -> None:
    if output_type not in ("pil", "np", "pt"):
        raise CascadeError(f'output_type: {output_type!r}; expected "pil", "np" or "pt"')
