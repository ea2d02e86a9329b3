"""DeepFloyd IF in the folder layout of diffusers: read as stages of cascade, and written back.

    model_index.json   unet/   scheduler/   image_noising_scheduler/   text_encoder/   tokenizer/

The network's parameters have the same names on both sides, so only the settings are translated.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from cascade.config.data import TextReading
from cascade.config.sampling import SamplingConfig
from cascade.config.stage import SquaredCosineSchedule, StageConfig
from cascade.diffusion.noise import one_minus_alpha
from cascade.errors import CascadeError, quoted
from cascade.files.atomic import read_json, write_json
from cascade.files.paths import HALVES
from cascade.files.tensors import load_tensors, save_tensors
from cascade.files.text import open_regular
from cascade.models.if_unet import IF_NOISE, IFUNetConfig
from cascade.settings import parse

LICENSE = "DeepFloyd IF License Agreement (gated, for non-commercial research)"
READING = TextReading(max_length=77, padded=True, captions="deepfloyd")
"""How IF reads text: its networks have no mask and read every token."""

SCALE = 4
"""Factor from the picture of the first stage to that of the second."""

NOISE_LEVEL = 250
"""Step of the squared cosine schedule whose noise the smaller picture carries by default."""

_UNET_TYPES = {"ResnetDownsampleBlock2D": False, "SimpleCrossAttnDownBlock2D": True}
_UP_TYPES = {False: "ResnetUpsampleBlock2D", True: "SimpleCrossAttnUpBlock2D"}
_EXPECTED: dict[str, tuple[Any, ...]] = {
    "mid_block_type": ("UNetMidBlock2DSimpleCrossAttn",),
    "act_fn": ("gelu",),
    "resnet_time_scale_shift": ("scale_shift",),
    "cross_attention_norm": ("group_norm",),
    "addition_embed_type": ("text",),
    "encoder_hid_dim_type": (None, "text_proj"),
    "norm_eps": (1e-5,),
    "flip_sin_to_cos": (True,),
    "freq_shift": (0,),
    "center_input_sample": (False, None),
    "out_channels": (6,),
    "class_embed_type": (None, "timestep"),
}
"""Settings that every IF network shares, in its unet/config.json."""
_SCHEDULER_DEFAULTS: dict[str, Any] = {
    "num_train_timesteps": 1000,
    "beta_schedule": "linear",
    "prediction_type": "epsilon",
    "timestep_spacing": "leading",
    "variance_type": "fixed_small",
    "clip_sample": True,
    "thresholding": False,
    "dynamic_thresholding_ratio": 0.995,
    "sample_max_value": 1.0,
}
"""diffusers' defaults for settings of DDPMScheduler that are missing in a file."""
_REQUIRED = (
    "block_out_channels",
    "layers_per_block",
    "down_block_types",
    "attention_head_dim",
    "encoder_hid_dim",
    "cross_attention_dim",
    "addition_embed_type_num_heads",
    "norm_num_groups",
)
"""Sizes, which differ from network to network."""


def is_diffusers(folder: str | Path) -> bool:
    """Whether a folder has diffusers' layout."""
    return (Path(folder) / "model_index.json").is_file()


def read_license(folder: Path) -> str:
    """The licence in the model card's header, or else the licence of the published weights."""
    card = folder / "README.md"
    # A card may have any encoding; the line that matters is ASCII.
    text = card.read_bytes().decode("utf-8", "replace") if card.is_file() else ""
    found = re.search(r"^license(?:_name)?:\s*(\S.*)$", text, re.M)
    return found[1].strip() if found and found[1].strip() != "other" else LICENSE


def read_stage(folder: str | Path) -> StageConfig:
    """The stage in a diffusers folder. Raises CascadeError naming a file and setting that IF does not have."""
    folder = Path(folder)
    index = read_json(folder / "model_index.json")
    if index.get("_class_name") not in ("IFPipeline", "IFSuperResolutionPipeline"):
        raise CascadeError(
            f"{folder / 'model_index.json'}: _class_name: {quoted(index.get('_class_name'))}; expected IFPipeline or"
            " IFSuperResolutionPipeline, the stages of DeepFloyd IF"
        )
    path = folder / "unet" / "config.json"
    unet = read_json(path)
    _check_unet(unet, path)
    resolution = unet["sample_size"]
    enlarges = unet.get("class_embed_type") == "timestep"
    values = {
        "name": f"sr{resolution}" if enlarges else "base",
        "resolution": resolution,
        "low_resolution": resolution // SCALE if enlarges else None,
        "parameterization": "eps",
        "model": _network(unet, _stored_names(folder), path),
        **_noise(read_json(folder / "scheduler" / "scheduler_config.json"), folder, enlarges),
    }
    return parse(StageConfig, values, str(path))


def read_weights(folder: str | Path) -> dict[str, Tensor]:
    """The network's weights, from one file or several."""
    return {name: tensor for file in weight_files(Path(folder)) for name, tensor in load_tensors(file).items()}


def write_stage(
    folder: Path, config: StageConfig, weights: Mapping[str, Tensor], tokenizer: str = "T5Tokenizer"
) -> None:
    """Write unet/, scheduler/ and model_index.json; the caller adds the text encoder and its tokenizer.

    Raises CascadeError for a network that is not IF's.
    """
    settings = unet_settings(config)
    if not isinstance(config.schedule, SquaredCosineSchedule):
        raise CascadeError(f"stage {config.name}: schedule {config.schedule.kind}; IF's in diffusers is squared_cosine")
    (folder / "unet").mkdir(parents=True)
    write_json(folder / "unet" / "config.json", settings)
    save_tensors(folder / "unet" / "diffusion_pytorch_model.safetensors", weights)
    enlarges = config.low_resolution is not None
    # Our samplers without a `variance` setting use the variance that the network predicts; so does diffusers.
    variance = config.sampling.sampler.own.get("variance", "learned")
    schedulers = {"scheduler": _scheduler(config.schedule, config.sampling, variance)}
    if enlarges:
        schedulers["image_noising_scheduler"] = _scheduler(config.schedule, SamplingConfig(threshold=None), "posterior")
    for name, scheduler in schedulers.items():
        (folder / name).mkdir()
        write_json(folder / name / "scheduler_config.json", scheduler)
    pipeline = "IFSuperResolutionPipeline" if enlarges else "IFPipeline"
    write_json(folder / "model_index.json", _model_index(pipeline, list(schedulers), tokenizer))


def _check_unet(unet: Mapping[str, Any], path: Path) -> None:
    defaults = {"norm_eps": 1e-5, "flip_sin_to_cos": True, "freq_shift": 0}
    for setting, allowed in _EXPECTED.items():
        value = unet.get(setting, defaults.get(setting))
        if value not in allowed:
            wanted = " or ".join(repr(one) for one in allowed)
            raise CascadeError(f"{path}: {setting}: {quoted(value)}; a network of DeepFloyd IF has {wanted}")
    if (unet.get("time_embedding_act_fn") == "gelu") != bool(unet.get("resnet_skip_time_act")):
        raise CascadeError(
            f"{path}: time_embedding_act_fn: {quoted(unet.get('time_embedding_act_fn'))}, but resnet_skip_time_act:"
            f" {quoted(unet.get('resnet_skip_time_act'))}; expected both or neither, else the embedding passes no GELU,"
            " or two"
        )
    if unet.get("resnet_out_scale_factor", 1.0) != unet.get("mid_block_scale_factor", 1.0):
        raise CascadeError(f"{path}: resnet_out_scale_factor and mid_block_scale_factor differ; in IF they are equal")
    missing = [setting for setting in _REQUIRED if unet.get(setting) is None]
    if missing:
        raise CascadeError(f"{path}: {missing[0]} is missing; download the file again")
    if not isinstance(unet.get("sample_size"), int):
        raise CascadeError(f"{path}: sample_size: {quoted(unet.get('sample_size'))}; expected the size of the pictures")


def _network(unet: Mapping[str, Any], names: Iterable[str], path: Path) -> dict[str, Any]:
    channels = unet["block_out_channels"]
    blocks = unet["layers_per_block"]
    types = unet["down_block_types"]
    unknown = [name for name in types if name not in _UNET_TYPES]
    if unknown:
        raise CascadeError(f"{path}: down_block_types: {quoted(unknown[0])}; expected {' or '.join(_UNET_TYPES)}")
    heads = unet["attention_head_dim"]
    if isinstance(heads, list) and len(set(heads)) > 1:
        raise CascadeError(f"{path}: attention_head_dim: {heads}; in IF all heads have the same width")
    return {
        "kind": "if_unet",
        "channels": channels,
        "blocks": [blocks] * len(channels) if isinstance(blocks, int) else blocks,
        "attention": [_UNET_TYPES[name] for name in types],
        # `only_cross_attention` is not reliable: some converters set it wrongly. The weights' names are.
        "self_attention": any(name.endswith("attentions.0.to_k.weight") for name in names),
        "embedding_dim": unet.get("time_embedding_dim") or 4 * channels[0],
        "block_scale": float(unet.get("resnet_out_scale_factor", 1.0)),
        "text_dim": unet["encoder_hid_dim"],
        "context_dim": unet["cross_attention_dim"],
        "head_dim": heads[0] if isinstance(heads, list) else heads,
        "pooling_heads": unet["addition_embed_type_num_heads"],
        "groups": unet["norm_num_groups"],
    }


def _noise(scheduler: Mapping[str, Any], folder: Path, enlarges: bool) -> dict[str, Any]:
    """Schedule and sampling settings from scheduler_config.json."""
    path = folder / "scheduler" / "scheduler_config.json"
    variances = {"learned_range": "learned", "fixed_small": "posterior", "fixed_large": "beta"}
    scheduler = {**_SCHEDULER_DEFAULTS, **scheduler}
    for setting, allowed in (
        ("beta_schedule", ("squaredcos_cap_v2",)),
        ("prediction_type", ("epsilon",)),
        ("timestep_spacing", ("leading", "trailing")),
        ("variance_type", tuple(variances)),
    ):
        value = scheduler[setting]
        if value not in allowed:
            raise CascadeError(f"{path}: {setting}: {quoted(value)}; expected {' or '.join(map(str, allowed))}")
    dynamic, clips = scheduler["thresholding"], scheduler["clip_sample"]
    return {
        "schedule": {"kind": "squared_cosine", "steps": scheduler["num_train_timesteps"]},
        "sampling": {
            "sampler": {"kind": "ddpm", "variance": variances[scheduler["variance_type"]]},
            "steps": 50 if enlarges else 100,
            "spacing": scheduler["timestep_spacing"],
            "guidance": 4.0 if enlarges else 7.0,
            "threshold": scheduler["dynamic_thresholding_ratio"] if dynamic else "clip" if clips else None,
            "threshold_maximum": float(scheduler["sample_max_value"]) if dynamic else None,
            "aug_level": _aug_level(NOISE_LEVEL) if enlarges else 0.0,
        },
        "presets": {"fast": {"sampler": "dpm++", "steps": 20}},
    }


def _aug_level(step: int) -> float:
    """Standard deviation of the noise at a step, numbered from 0."""
    return float(one_minus_alpha(IF_NOISE.table[step + 1]).sqrt())


def unet_settings(config: StageConfig) -> dict[str, Any]:
    """The content of unet/config.json for an IF network. Raises CascadeError for another network."""
    model = config.model
    if not isinstance(model, IFUNetConfig):
        raise CascadeError(f"stage {config.name}: diffusers has no {model.kind} network; only IF's can be written")
    enlarges = config.low_resolution is not None
    attends = list(model.attention)
    names = {attention: name for name, attention in _UNET_TYPES.items()}
    return {
        "_class_name": "UNet2DConditionModel",
        "sample_size": config.resolution,
        "in_channels": 6 if enlarges else 3,
        "out_channels": 6,
        "block_out_channels": list(model.channels),
        "layers_per_block": list(model.blocks),
        "down_block_types": [names[attention] for attention in attends],
        "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
        "up_block_types": [_UP_TYPES[attention] for attention in reversed(attends)],
        "only_cross_attention": not model.self_attention,
        "mid_block_only_cross_attention": None,
        "attention_head_dim": model.head_dim,
        "norm_num_groups": model.groups,
        "norm_eps": 1e-5,
        "act_fn": "gelu",
        "resnet_time_scale_shift": "scale_shift",
        "resnet_skip_time_act": enlarges,
        "resnet_out_scale_factor": model.block_scale,
        "mid_block_scale_factor": model.block_scale,
        "time_embedding_dim": model.embedding_dim,
        "time_embedding_act_fn": "gelu" if enlarges else None,
        "class_embed_type": "timestep" if enlarges else None,
        "encoder_hid_dim": model.text_dim,
        "encoder_hid_dim_type": "text_proj",
        "cross_attention_dim": model.context_dim,
        "cross_attention_norm": "group_norm",
        "addition_embed_type": "text",
        "addition_embed_type_num_heads": model.pooling_heads,
        "flip_sin_to_cos": True,
        "freq_shift": 0,
        "center_input_sample": False,
    }


def _scheduler(schedule: SquaredCosineSchedule, sampling: SamplingConfig, variance: str) -> dict[str, Any]:
    """scheduler_config.json."""
    variances = {"learned": "learned_range", "posterior": "fixed_small", "beta": "fixed_large"}
    if variance not in variances:
        raise CascadeError(f"sampler.variance: diffusers has no {variance}; choose {', '.join(variances)}")
    dynamic = isinstance(sampling.threshold, float)
    return {
        "_class_name": "DDPMScheduler",
        "num_train_timesteps": schedule.steps,
        "beta_schedule": "squaredcos_cap_v2",
        "prediction_type": "epsilon",
        "variance_type": variances[variance],
        "clip_sample": sampling.threshold == "clip",
        "thresholding": dynamic,
        "dynamic_thresholding_ratio": sampling.threshold if dynamic else 0.995,
        "sample_max_value": sampling.threshold_maximum if dynamic and sampling.threshold_maximum else 1.0,
        "timestep_spacing": "trailing" if sampling.spacing == "trailing" else "leading",
    }


def _model_index(pipeline: str, schedulers: Sequence[str], tokenizer: str) -> dict[str, Any]:
    """The content of model_index.json, without the safety filters of the published pipelines, which are not copied."""
    return {
        "_class_name": pipeline,
        "_diffusers_version": "0.35.0",
        "text_encoder": ["transformers", "T5EncoderModel"],
        "tokenizer": ["transformers", tokenizer],
        "unet": ["diffusers", "UNet2DConditionModel"],
        **{name: ["diffusers", "DDPMScheduler"] for name in schedulers},
        "safety_checker": [None, None],
        "feature_extractor": [None, None],
        "watermarker": [None, None],
        "requires_safety_checker": False,
    }


def weight_files(folder: Path) -> list[Path]:
    """The network's safetensors files, one or the shards of an index: full precision if present, else half."""
    for variant in ("", *(f".{half}" for half in HALVES)):
        whole = folder / "unet" / f"diffusion_pytorch_model{variant}.safetensors"
        if whole.is_file():
            return [whole]
        index = folder / "unet" / f"diffusion_pytorch_model.safetensors.index{variant}.json"
        if index.is_file():
            weight_map = read_json(index).get("weight_map")
            if not isinstance(weight_map, dict):
                raise CascadeError(f"{index}: weight_map is missing; download the file again")
            return [folder / "unet" / name for name in sorted(set(weight_map.values()))]
    raise CascadeError(f"{folder / 'unet'}: no diffusion_pytorch_model.safetensors; download the safetensors weights")


def _stored_names(folder: Path) -> list[str]:
    """Names of all weights, without reading them."""
    names: list[str] = []
    for path in weight_files(folder):
        try:
            open_regular(path).close()
            with safe_open(path, framework="pt") as file:
                names += file.keys()
        except (SafetensorError, OSError, RuntimeError) as error:
            raise CascadeError(f"{path}: damaged, or not safetensors ({error}); download it again") from None
    return names
