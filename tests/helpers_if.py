"""Small random DeepFloyd IF pipelines, built and saved by diffusers: 8 and 32 px, a tiny T5."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_text import make_tiny_t5
from torch import Tensor

from cascade.conditioning import Conditioning
from cascade.diffusion.editing import Known
from cascade.stage import Stage
from cascade.text.t5 import TextEncoder

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what a peer's import deprecates is not ours
    diffusers = pytest.importorskip("diffusers")
    from diffusers import DDPMScheduler, IFPipeline, IFSuperResolutionPipeline, UNet2DConditionModel
    from diffusers.pipelines.deepfloyd_if import (
        pipeline_if,
        pipeline_if_img2img,
        pipeline_if_img2img_superresolution,
        pipeline_if_inpainting,
        pipeline_if_inpainting_superresolution,
        pipeline_if_superresolution,
    )
    from diffusers.schedulers import scheduling_ddpm

TEXT_DIM = 32
MODULES = (
    pipeline_if,
    pipeline_if_img2img,
    pipeline_if_img2img_superresolution,
    pipeline_if_inpainting,
    pipeline_if_inpainting_superresolution,
    pipeline_if_superresolution,
    scheduling_ddpm,
)
"""Where diffusers draws noise."""


def make_unet(super_resolution: bool, **changes: Any) -> Any:
    """The network of a stage; the first level without attention, the others with it."""
    settings: dict[str, Any] = {
        "sample_size": 32 if super_resolution else 8,
        "in_channels": 6 if super_resolution else 3,
        "out_channels": 6,
        "block_out_channels": [32, 64],
        "layers_per_block": [1, 2],
        "down_block_types": ["ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"],
        "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
        "up_block_types": ["SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"],
        "cross_attention_dim": 64,
        "encoder_hid_dim": TEXT_DIM,
        "encoder_hid_dim_type": "text_proj",
        "attention_head_dim": 8,
        "addition_embed_type": "text",
        "addition_embed_type_num_heads": 2,
        "cross_attention_norm": "group_norm",
        "resnet_time_scale_shift": "scale_shift",
        "act_fn": "gelu",
    }
    if super_resolution:
        settings |= {
            "class_embed_type": "timestep",
            "mid_block_scale_factor": 1.41423,
            "resnet_out_scale_factor": 1.41423,
            "resnet_skip_time_act": True,
            "time_embedding_act_fn": "gelu",
            "time_embedding_dim": 64,
        }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(super_resolution))
        return UNet2DConditionModel(**(settings | changes)).eval()


def scheduler(**changes: Any) -> Any:
    """The scheduler that the published pipelines have."""
    settings = {
        "num_train_timesteps": 1000,
        "beta_schedule": "squaredcos_cap_v2",
        "variance_type": "learned_range",
        "prediction_type": "epsilon",
        "clip_sample": False,
        "thresholding": True,
        "dynamic_thresholding_ratio": 0.95,
    }
    return DDPMScheduler(**(settings | changes))


def make_if(folder: Path, super_resolution: bool = False, save: bool = True, **how: Any) -> Any:
    """A pipeline of diffusers, saved into `folder`. how: passed on to diffusers' `save_pretrained`."""
    from transformers import AutoTokenizer, T5EncoderModel

    t5 = make_tiny_t5(folder.with_name(f"{folder.name}-t5"), TEXT_DIM)
    parts: dict[str, Any] = {
        "tokenizer": AutoTokenizer.from_pretrained(t5),
        "text_encoder": T5EncoderModel.from_pretrained(t5),
        "unet": make_unet(super_resolution),
        "scheduler": scheduler(sample_max_value=1.0 if super_resolution else 1.5),
        "safety_checker": None,
        "feature_extractor": None,
        "watermarker": None,
        "requires_safety_checker": False,
    }
    if super_resolution:
        noising = DDPMScheduler(beta_schedule="squaredcos_cap_v2")
        pipeline = IFSuperResolutionPipeline(**parts, image_noising_scheduler=noising)
    else:
        pipeline = IFPipeline(**parts)
    pipeline.set_progress_bar_config(disable=True)
    if save:
        pipeline.save_pretrained(folder, **how)
    return pipeline


PROMPT, NEGATIVE = "a red Apple", "two blue stars"


def draw_float32_noise(shape: Any, generator: Any = None, device: Any = None, dtype: Any = None, **_: Any) -> Tensor:
    """In place of diffusers' `randn_tensor`, which draws other noise in another dtype."""
    return torch.randn(shape, generator=generator).to(device, dtype)


def peer_picture(peer: Any, low: Tensor | None = None, **how: Any) -> Tensor:
    """What a pipeline of diffusers draws for PROMPT and against NEGATIVE, in ten steps unless `how` says otherwise.

    low: (1, 3, h, w), for the second stage. how: also the arguments of a pipeline that edits. Returns float32
    (1, 3, H, W) in about [-1, 1]. The networks calculate in float64, as in `own_picture`: guidance enlarges round-off
    so far that in float32 diffusers differs by 1e-4 from itself with another number of threads.
    """
    steps = {} if "timesteps" in how else {"num_inference_steps": 10}
    second = {} if low is None else {"image": low, "noise_level": 250}
    with pytest.MonkeyPatch.context() as patch:
        for module in MODULES:
            patch.setattr(module, "randn_tensor", draw_float32_noise)
        peer.to(torch.float64)
        try:
            drawn = peer(
                prompt=PROMPT,
                negative_prompt=NEGATIVE,
                guidance_scale=7.0 if low is None else 4.0,
                generator=torch.Generator().manual_seed(5),
                output_type="pt",
                clean_caption=False,
                **steps,
                **second,
                **how,
            ).images
        finally:
            peer.to(torch.float32)
    return drawn.float()


def own_picture(
    stage: Stage, text_encoder: Path, low: Tensor | None = None, known: Known | None = None, **changes: Any
) -> Tensor:
    """What a stage of ours draws in its place: the noise comes from the generator in the same order.

    Its network stays in float64. known: the picture to edit.
    """
    stage.network.double()
    encoder = TextEncoder.from_pretrained(text_encoder, max_length=77, padded=True, captions="lower")
    cond, null = (
        Conditioning(text.tokens, text.mask) for text in (encoder.encode([PROMPT]), encoder.encode([NEGATIVE]))
    )
    rng, size = torch.Generator().manual_seed(5), stage.config.resolution
    settings = stage.config.sampling.model_copy(update={"steps": 10} | changes)
    z = torch.randn(1, 3, size, size, generator=rng)
    if low is not None:
        cond = stage.see(cond, low, torch.tensor([settings.aug_level]), torch.randn(1, 3, size, size, generator=rng))
    return stage.knowing(known).sample(cond, cond.with_text(null.text, null.text_mask), z, [rng], settings)
