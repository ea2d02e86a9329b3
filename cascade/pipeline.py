"""The cascade: prompts -> text -> stage -> stage -> stage -> pictures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from cascade.arguments import PerStage, check_chain, positive, prompts_of, seeds_of, stage_sizes, texts_of
from cascade.checkpoint import atomic_folder, save_stage, write_json
from cascade.config import FORMAT_VERSION, SamplingConfig
from cascade.diffusion.samplers import OnStep
from cascade.drawing import Picture, Texts, draw_batch, padded_batches
from cascade.errors import CascadeError
from cascade.images import to_uint8
from cascade.output import Callback, CascadeOutput, Watcher, as_type, check_output_type
from cascade.sampling import resolve_sampling
from cascade.slots import StageSlot, check_memory, not_finite, running
from cascade.stage import Stage
from cascade.text.captions import Captions
from cascade.text.t5 import TextEmbeddings, TextEncoder


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
        check_chain([slot.config for slot in self.slots], text_encoder.dim)

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
    ) -> CascadePipeline:
        """The bundled cascade (None), a folder, or a hub id; DeepFloyd IF's too, in diffusers' layout.

        super_resolution: stage folders or `model/stage` that follow the model's base stage in place of its own.
        device: default the GPU if there is one. dtype: default float32 on a CPU, bfloat16 on a GPU.
        low_memory: stages are loaded one at a time, and the text encoder is released after the prompts.
        captions: how prompts are cleaned, default as the model says: "as_is", "lower" or "deepfloyd".
        """
        from cascade.load import load_pipeline  # loading stands above; see docs/architecture.md

        return load_pipeline(
            model,
            super_resolution=super_resolution,
            device=device,
            dtype=dtype,
            low_memory=low_memory,
            captions=captions,
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
        check_output_type(output_type)
        prompts = prompts_of(prompt, prompt_embeds)
        seeds = seeds_of(seed, len(prompts))
        slots = self.slots_until(until)
        settings = resolve_sampling(
            [slot.config for slot in self.slots],
            preset,
            {"steps": steps, "guidance": guidance, "sampler": sampler, "aug_level": aug_level, "threshold": threshold},
        )
        sizes = stage_sizes([slot.config for slot in slots], height, width)
        texts = self._texts(prompts, prompt_embeds, negative_prompt)
        numbers = range(positive("num_images_per_prompt", num_images_per_prompt))
        pictures = [Picture(index, seeds[index], number) for index in range(len(prompts)) for number in numbers]
        batch_size = positive("batch_size", self.default_batch_size if batch_size is None else batch_size)
        drawn: dict[int, Tensor] = {}
        pixels: Tensor | None = None
        for slot, size in zip(slots, sizes, strict=True):
            with running(slot) as stage:
                check_memory(slot.config, size, batch_size, self.device, self.dtype)
                own = settings[stage.name]
                batches = -(-len(pictures) // batch_size)
                with Watcher(stage.name, stage.count_steps(own), batches, progress, callback) as watcher:
                    pixels = self._draw(stage, own, size, pictures, batch_size, texts, pixels, watcher.step)
                drawn[stage.config.resolution] = pixels
                del stage  # `--low-memory`: it must be gone before the next one is loaded
        return CascadeOutput(
            images=as_type(drawn[slots[-1].config.resolution], output_type),
            stages={resolution: as_type(pixels, output_type) for resolution, pixels in drawn.items()},
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
        texts: Texts,
        low: Tensor | None,
        on_step: OnStep | None = None,
    ) -> Tensor:
        """`cascade.drawing.draw_batch`, after a look at the memory that it needs. Raises MemoryError."""
        check_memory(stage.config, size, len(batch), self.device, self.dtype)
        return draw_batch(stage, settings, size, batch, texts, low, on_step)

    def _draw(
        self,
        stage: Stage,
        settings: SamplingConfig,
        size: tuple[int, int],
        pictures: Sequence[Picture],
        batch_size: int,
        texts: Texts,
        low: Tensor | None,
        on_step: OnStep,
    ) -> Tensor:
        """All pictures of one stage: (B, 3, H, W) uint8, on the CPU. Raises CascadeError for numbers not finite.

        Whole numbers pass from stage to stage: the next stage sees exactly the picture that can be saved, and the last
        bits of float arithmetic do not travel on.
        """
        parts = []
        for members, count in padded_batches(len(pictures), batch_size):
            batch = [pictures[index] for index in members]
            x = self.draw_batch(stage, settings, size, batch, texts, None if low is None else low[members], on_step)
            if not bool(torch.isfinite(x).all()):
                raise CascadeError(not_finite(stage.name))
            parts.append(to_uint8(x[:count]).cpu())
        return torch.cat(parts)

    def _texts(
        self,
        prompts: Sequence[str],
        embeds: TextEmbeddings | None,
        negative_prompt: str | Sequence[str] | None,
    ) -> Texts:
        """Embeddings of the prompts, and of what takes the null text's place for each."""
        negative = texts_of("negative_prompt", "" if negative_prompt is None else negative_prompt)
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
        return Texts(text.padded(length), null.padded(length))

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


def _may_be_replaced(path: Path) -> bool:
    """Whether `path` is a cascade or an empty folder."""
    return path.is_dir() and ((path / "cascade.json").is_file() or not any(path.iterdir()))
