"""Drawings of a trained base stage: a sheet for inspection, and training pictures for the next stage."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from cascade.conditioning import Conditioning
from cascade.config.stage import StageConfig
from cascade.diffusion import denoisers
from cascade.diffusion.noise import diffuse
from cascade.diffusion.samplers import sample_dpmpp
from cascade.pictures.images import to_pil, to_uint8
from cascade.stage import Stage, build_stage
from gpu import pictures
from gpu.network import autocast, with_weights

FINISHING_STEPS = 6
"""Steps from a log SNR in [-1, 3] to a picture."""
PROMPTS = (
    "a red apple, noto style",
    "a fox, twemoji style",
    "a blue car, fluent flat style",
    "smiling face, fluent 3d style",
    "dog face, fluent color style",
    "black cat, fluent mono style",
    "pizza, noto style",
    "house, twemoji style",
    "a cat",
    "a dog",
    "a robot",
    "a castle at night",
    "two cats",
    "an astronaut riding a horse",
    "a red car",
    "a tree",
    "rocket, noto style",
    "octopus, fluent 3d style",
    "guitar, twemoji style",
    "a bird, noto style",
    "two yellow stars, drawn shapes",
    "a red circle left of a blue triangle, drawn shapes",
    "a lion, clip art style",
    "a birthday cake, fluent 3d style",
    "a cat, noto style",
    "a dog, emojione style",
    "a robot, fluent 3d style",
    "a castle, noto style",
    "a bear, blob style",
    "a red car, noto style",
    "a house, fluent color style",
    "an owl, twemoji style",
)


def drawing(config: StageConfig, device: torch.device, weights: Sequence[Tensor]) -> Stage:
    """The stage with these weights, ready to draw."""
    return Stage(config, with_weights(config, device, weights), build_stage(config, device="meta").schedule)


@torch.inference_mode()
def sheet(stage: Stage, words: pictures.Words, path: Path) -> None:
    """The fixed prompts, seed 0, as the stage draws by default. words: of the null text, then of PROMPTS."""
    count, device = len(PROMPTS), words.tokens.device
    rows = torch.arange(1, count + 1, device=device)
    cond, null = Conditioning(*words.rows(rows)), Conditioning(*words.rows(torch.zeros_like(rows)))
    size = stage.config.resolution
    z = torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(0)).to(device)
    with autocast(device):
        drawn = to_pil(stage.sample(cond, null, z, []))
    columns = 8
    whole = Image.new("RGB", (columns * 2 * size, -(-count // columns) * 2 * size), "white")
    for k, own in enumerate(drawn):
        large = own.resize((2 * size, 2 * size), Image.Resampling.NEAREST)
        whole.paste(large, (k % columns * 2 * size, k // columns * 2 * size))
    whole.save(path)


@torch.inference_mode()
def finished(stage: Stage, library: pictures.Library, batch: int, most: int | None) -> tuple[Tensor, Tensor]:
    """Pictures noised to a log SNR in [-1, 3] and redrawn by the base: (N, 3, 64, 64) uint8, and their indices (N,).

    most: maximum number of pictures, chosen at random. The next stage learns from these to repair the base's errors.
    Below a log SNR of -1 the content would change.
    """
    art, words = library.art, library.words
    device = art.pixels.device
    generator = torch.Generator(device).manual_seed(5)
    settings = stage.config.sampling
    size = stage.config.resolution
    order = torch.randperm(len(art.pixels), device=device, generator=generator)[:most]
    out = torch.zeros(len(art.pixels), 3, size, size, dtype=torch.uint8, device=device)
    drawn = torch.zeros(len(art.pixels), dtype=torch.bool, device=device)
    drawn[order] = True
    parts = order.split(batch)
    for number, who in enumerate(parts):
        low = F.avg_pool2d(art.pixels[who].float() / 127.5 - 1, pictures.SIZE // size)
        start = -1 + 4 * (number + 0.5) / len(parts)
        level = torch.full((len(who), 1, 1, 1), start, device=device)
        z = diffuse(low, torch.randn(low.shape, device=device, generator=generator), level)
        cond = Conditioning(*words.rows(art.captions.rows[art.captions.first[who]]))
        null = Conditioning(*words.rows(torch.zeros_like(who)))
        with autocast(device):
            guided = denoisers.guide(stage, cond, null, settings.guidance, settings.guidance_interval)
            x = sample_dpmpp(denoisers.clip(guided), z, torch.linspace(start, 8.0, FINISHING_STEPS + 1), [])
        out[who] = to_uint8(x)
    return out, drawn


def save_few(own: Tensor, drawn: Tensor, library: pictures.Library, path: Path) -> None:
    """Save thirty-two of the base's pictures below their originals."""
    who = drawn.nonzero().flatten()
    who = who[torch.linspace(0, len(who) - 1, 32, device=who.device).long()]
    true = F.avg_pool2d(library.art.pixels[who].float(), pictures.SIZE // own.shape[-1]).round().byte()
    pairs = torch.cat([true, own[who]], dim=2)  # (32, 3, 128, 64)
    rows = [torch.cat(list(pairs[k : k + 16]), dim=2) for k in (0, 16)]
    to_pil(torch.cat(rows, dim=1)[None])[0].save(path)
