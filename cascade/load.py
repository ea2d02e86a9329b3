"""From files to objects: a folder or hub id becomes a stage, a pipeline, a text encoder or a training run."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, get_args

import torch
from torch import Tensor

from cascade import deepfloyd, memory
from cascade.build import build_stage
from cascade.checkpoint import check_format, load_tensors, load_weights, read_json, read_stage_config
from cascade.config import StageConfig, TextConfig, TrainConfig
from cascade.errors import CascadeError
from cascade.hub import download, may_be_on_hub
from cascade.models.convolution import Convolution
from cascade.pipeline import CascadePipeline
from cascade.preflight import check_run
from cascade.settings import override, parse, read_yaml
from cascade.slots import StageSlot
from cascade.stage import Stage
from cascade.streaming import stored_bytes, stream
from cascade.text.cache import EmbeddingCache
from cascade.text.cached import CachedTextEncoder
from cascade.text.captions import Captions
from cascade.text.t5 import TextEncoder, TextEncoderProtocol, text_weights

if TYPE_CHECKING:
    from cascade.training.trainer import Trainer

logger = logging.getLogger("cascade.load")

BUNDLED = Path(__file__).parent / "pretrained"
"""The cascade that travels in the package."""


def load_pipeline(
    model: str | Path | None = None,
    *,
    super_resolution: str | Path | Sequence[str | Path] | None = None,
    device: str | torch.device | None = None,
    dtype: torch.dtype | str | None = None,
    low_memory: bool = False,
    captions: Captions | None = None,
    text_8bit: bool = False,
    adapters: Mapping[str, str | Path] | None = None,
) -> CascadePipeline:
    """See `CascadePipeline.from_pretrained`. Raises CascadeError naming the file that is missing or wrong."""
    index = read_index(model)
    stage_folders = list(index.stages)
    if super_resolution is not None:
        sources = [super_resolution] if isinstance(super_resolution, (str, Path)) else super_resolution
        stage_folders = stage_folders[:1] + [find_stage(source) for source in sources]
    target = choose_device(device)
    number_format = choose_dtype(dtype, target)
    text_format = torch.bfloat16 if index.halves_text and number_format != torch.float32 else torch.float32
    load_text = partial(
        TextEncoder.from_pretrained,
        index.text_encoder,
        max_length=index.max_text_length,
        padded=index.text_padded,
        captions=captions or index.captions,
        device=target,
        dtype=text_format,
        eight_bit=text_8bit,
        streamed=low_memory and not text_8bit and not _fits(text_weights(index.text_encoder), text_format),
    )
    slots = [
        _slot(stage_folder, target, number_format, low_memory, adapter)
        for stage_folder, adapter in _with_adapters(stage_folders, adapters or {})
    ]
    # Other people's weights, converted or not, come with other people's terms, of which whoever draws should hear.
    level = logging.WARNING if any(slot.config.model.kind == "if_unet" for slot in slots) else logging.DEBUG
    logger.log(level, "%s: the weights' licence is %s", index.name, index.license)
    pipeline = CascadePipeline(
        load_text(),
        slots,
        name=index.name,
        license=index.license,
        reload_text_encoder=load_text if low_memory else None,
    )
    pipeline.device, pipeline.dtype = target, number_format
    return pipeline


@dataclass(frozen=True)
class ModelIndex:
    """What a cascade's cascade.json says, its folders as paths."""

    name: str
    license: str
    text_encoder: Path
    stages: tuple[Path, ...]
    max_text_length: int
    text_padded: bool = False
    captions: Captions = "as_is"

    @property
    def halves_text(self) -> bool:
        """Whether the text encoder (4.8 billion weights in IF) is bfloat16 beside 16-bit stages; elsewhere float32."""
        return self.text_padded


def read_index(model: str | Path | None = None) -> ModelIndex:
    """The index of a model: bundled, folder or hub id. Raises CascadeError naming what is missing or wrong."""
    folder = find_model(model)
    if deepfloyd.is_diffusers(folder):
        return _read_diffusers_index(folder)
    path = folder / "cascade.json"
    data = read_json(path)
    check_format(path, data.get("format"))
    length = data.get("max_text_length", 64)
    if isinstance(length, bool) or not isinstance(length, int) or length < 1:
        raise CascadeError(f"{path}: max_text_length: expected a whole number of tokens, not {length!r}")
    return ModelIndex(
        name=str(data.get("name", folder.name)),
        license=str(data.get("license", "unstated")),
        text_encoder=folder / "text_encoder",
        stages=tuple(folder / name for name in _strings(data, "stages", path)),
        max_text_length=length,
        text_padded=bool(data.get("text_padded", False)),
        captions=_captions(data.get("captions", "as_is"), path),
    )


def _read_diffusers_index(folder: Path) -> ModelIndex:
    """DeepFloyd IF as diffusers lays it out: one stage and the text encoder."""
    return ModelIndex(
        name=folder.name,
        license=deepfloyd.read_license(folder),
        text_encoder=folder / "text_encoder",
        stages=(folder,),
        max_text_length=deepfloyd.TEXT_LENGTH,
        text_padded=True,
        captions="deepfloyd",
    )


def _captions(value: object, path: Path) -> Captions:
    known: tuple[Captions, ...] = get_args(Captions)
    for name in known:
        if value == name:
            return name
    raise CascadeError(f"{path}: captions: {value!r}; expected one of {', '.join(known)}")


def read_config(folder: str | Path) -> StageConfig:
    """The settings of a stage folder: ours, or DeepFloyd IF's in diffusers' layout."""
    return deepfloyd.read_stage(folder) if deepfloyd.is_diffusers(folder) else read_stage_config(folder)


def read_weights(folder: str | Path) -> tuple[dict[str, Tensor], Path]:
    """The network's weights in a stage folder, and the file or folder they came from."""
    folder = Path(folder)
    if deepfloyd.is_diffusers(folder):
        return deepfloyd.read_weights(folder), folder / "unet"
    path = folder / "model.safetensors"
    return load_tensors(path), path


def load_stage(folder: str | Path, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> Stage:
    """A stage from its folder (ours: stage.json, model.safetensors; or diffusers'), ready to draw."""
    return _load_stage(Path(folder), read_config(folder), device, dtype)


def load_text_encoder(config: TextConfig) -> TextEncoderProtocol:
    """The frozen encoder of a training run, behind its cache of embeddings if it has one.

    A cache that the same settings made is trusted: T5 is loaded, and compared with it, only for a missing caption.
    """
    if config.cache is None:
        return load_plain_text_encoder(config)
    if (Path(config.cache) / "index.json").exists():
        cache = EmbeddingCache.open(config.cache)
        if cache.settings == encoder_settings(config):
            return CachedTextEncoder(cache, lambda: load_plain_text_encoder(config))
    encoder = load_plain_text_encoder(config)
    return CachedTextEncoder(open_cache(config.cache, encoder), lambda: encoder)


def encoder_settings(config: TextConfig) -> dict[str, object]:
    """The settings that decide what the encoder gives; `cascade encode` writes them into the cache."""
    return config.model_dump(mode="json", exclude={"cache"})


def load_plain_text_encoder(config: TextConfig) -> TextEncoder:
    """The frozen encoder of a training run, without a cache."""
    source = text_encoder_source(config)
    dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16}[config.dtype]
    return TextEncoder.from_pretrained(
        source, max_length=config.max_length, padded=config.padded, captions=config.captions, dtype=dtype
    )


def text_encoder_source(config: TextConfig) -> str | Path:
    """Folder or hub id of the encoder of a training run."""
    return BUNDLED / "text_encoder" if config.encoder == "bundled" else config.encoder


def open_cache(folder: str | Path, encoder: TextEncoder) -> EmbeddingCache:
    """The embeddings of `encoder` in a folder, or a new cache there."""
    return EmbeddingCache(folder, encoder.fingerprint, encoder.dim)


def read_train_config(path: str | Path, assignments: Sequence[str] = ()) -> TrainConfig:
    """A training run's YAML file, in which `stage` may name a stage, such as bundled/base, for all of its settings."""
    settings = read_yaml(path)
    if isinstance(settings, dict) and isinstance(settings.get("stage"), str):
        settings = settings | {"stage": read_config(find_stage(settings["stage"])).model_dump(mode="json")}
    return parse(TrainConfig, override(settings, assignments), str(path))


def load_trainer(config: TrainConfig) -> Trainer:
    """Everything that a training run needs, with fresh weights or those of `training.init_from`.

    Raises CascadeError for a run that cannot reach its end on this machine.
    """
    from cascade.training.accelerator import expected_processes  # accelerate, which drawing does not need
    from cascade.training.trainer import Trainer

    check_run(config, *expected_processes())
    text = load_text_encoder(config.text)
    if config.stage.model.reads_text and config.stage.model.text_dim != text.dim:
        raise CascadeError(
            f"stage.model.text_dim is {config.stage.model.text_dim}, but {config.text.encoder} gives"
            f" embeddings of width {text.dim}; set stage.model.text_dim={text.dim}"
        )
    stage = build_stage(config.stage, seed=config.training.seed)
    if config.training.init_from is not None:
        load_weights(stage.network, *read_weights(find_stage(config.training.init_from)))
    return Trainer(config, stage, text)


def find_model(model: str | Path | None) -> Path:
    """The folder of a model: the bundled one, a local folder, or a hub id (downloaded once)."""
    if model is None or model == "bundled":
        return BUNDLED
    folder = Path(model)
    if folder.is_dir():
        return folder
    if may_be_on_hub(model):
        return download(str(model))
    raise CascadeError(f"{model}: no such model folder; give a folder with cascade.json, a hub id, or `bundled`")


def find_stage(source: str | Path) -> Path:
    """The folder of one stage: itself, `stage` of a training run, or `model/stage` of a cascade."""
    path = Path(source)
    for candidate in (path, path / "stage"):
        if (candidate / "stage.json").is_file() or deepfloyd.is_diffusers(candidate):
            return candidate
    parent, _, name = str(source).rpartition("/")
    reason = ""
    try:
        if parent != "bundled" and may_be_on_hub(source):
            candidate = download(str(source), text=False)
            if deepfloyd.is_diffusers(candidate):
                return candidate
        elif parent == "bundled" or Path(parent).is_dir() or may_be_on_hub(parent):
            candidate = find_model(parent) / name
            if (candidate / "stage.json").is_file():
                return candidate
    except CascadeError as error:
        reason = f" ({error})"
    raise CascadeError(
        f"{source}: no stage here; give a folder with stage.json, a training run, model/stage, or DeepFloyd IF in"
        f" diffusers' layout{reason}"
    )


def assemble(
    text_encoder: str | Path,
    stages: Iterable[str | Path],
    *,
    name: str,
    license: str,
    max_length: int = 64,
    adapters: Mapping[str, str | Path] | None = None,
) -> CascadePipeline:
    """Put trained stages behind a text encoder. Raises CascadeError when they do not chain.

    adapters: folders of low-rank adapters by the name of the stage that they are added to.
    """
    source = BUNDLED / "text_encoder" if str(text_encoder) == "bundled" else text_encoder
    encoder = TextEncoder.from_pretrained(source, max_length=max_length)
    folders = _with_adapters([find_stage(stage) for stage in stages], adapters or {})
    loaded = [_load_stage(folder, read_config(folder), "cpu", torch.float32, adapter) for folder, adapter in folders]
    return CascadePipeline(encoder, loaded, name=name, license=license)


def choose_device(device: str | torch.device | None) -> torch.device:
    """The device asked for, or a GPU if there is one. Raises CascadeError for one that is not there."""
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        target = torch.device(device)
        torch.empty(1, device=target).item()  # `meta` has no values
    except (RuntimeError, AssertionError, TypeError) as error:
        raise CascadeError(f"device: {device} cannot be used here: {str(error).splitlines()[0]}") from None
    return target


def choose_dtype(dtype: torch.dtype | str | None, device: torch.device) -> torch.dtype:
    """The number format asked for, or float32 on a CPU and bfloat16 on a GPU."""
    if dtype is None:
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    known = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    name = str(dtype).removeprefix("torch.")
    if name not in known:
        raise CascadeError(f"dtype: {name!r}; expected one of {', '.join(known)}")
    if name == "float16" and device.type == "cpu":
        raise CascadeError("dtype: float16 needs a GPU; on a CPU use bfloat16")
    return known[name]


def _with_adapters(folders: Sequence[Path], adapters: Mapping[str, str | Path]) -> list[tuple[Path, Path | None]]:
    """Stage folders, each with the adapter for it. Raises CascadeError for an adapter of a stage that there is not."""
    names = [read_config(folder).name for folder in folders] if adapters else [""] * len(folders)
    unknown = [name for name in adapters if name not in names]
    if unknown:
        raise CascadeError(f"adapters: {unknown[0]!r} is no stage of this model; it has {', '.join(names)}")
    return [
        (folder, Path(adapters[name]) if name in adapters else None)
        for folder, name in zip(folders, names, strict=True)
    ]


def _slot(folder: Path, device: torch.device, dtype: torch.dtype, low_memory: bool, adapter: Path | None) -> StageSlot:
    config = read_config(folder)
    if low_memory:
        return StageSlot(config, lambda: _load_sparing(folder, config, device, dtype, adapter))
    return StageSlot.holding(_load_stage(folder, config, device, dtype, adapter))


def _load_stage(
    folder: Path, config: StageConfig, device: torch.device | str, dtype: torch.dtype, adapter: Path | None = None
) -> Stage:
    """Built without memory on the meta device, then filled: the weights exist once. adapter: added to them."""
    stage = build_stage(config, device="meta")
    load_weights(stage.network, *read_weights(folder))
    if adapter is not None:
        from cascade.training.lora import merge_adapter  # brings peft, an extra

        merge_adapter(stage.network, adapter)
    stage.network.eval().requires_grad_(False)
    return stage.to(device, dtype)


def _load_sparing(
    folder: Path, config: StageConfig, device: torch.device, dtype: torch.dtype, adapter: Path | None
) -> Stage:
    """Without the transformed kernels that would make it faster; streamed from disk where it does not fit whole.

    An adapter is added to weights in memory: with one, nothing is streamed.
    """
    diffusers = deepfloyd.is_diffusers(folder)
    files = deepfloyd.weight_files(folder) if diffusers else [folder / "model.safetensors"]
    if adapter is None and not _fits(files, dtype):
        stage = build_stage(config, device="meta")
        stage.network.eval().requires_grad_(False).to(dtype)
        stream(stage.network, files, device)
    else:
        stage = _load_stage(folder, config, device, dtype, adapter)
    for module in stage.network.modules():
        if isinstance(module, Convolution):
            module.spare_memory = True
    return stage


def _fits(files: Sequence[Path], dtype: torch.dtype) -> bool:
    """Whether weights leave a fifth of the free memory for the rest."""
    return stored_bytes(files, dtype) < 0.8 * memory.free_bytes()


def _strings(index: dict[str, object], key: str, path: Path) -> list[str]:
    values = index.get(key)
    if not isinstance(values, list) or not values or not all(isinstance(value, str) for value in values):
        raise CascadeError(f"{path}: {key}: expected a list of stage names")
    return values
