"""Training works: a tiny stage overfits two pictures, and distinguishes them by caption."""

from pathlib import Path

import pytest
import torch
from helpers_training import SUPER_RESOLUTION, WordEncoder, micro_config, trainer, write_pictures
from PIL import Image, ImageDraw
from torch import Tensor

from cascade.conditioning import Conditioning
from cascade.diffusion.noise import log_snr_from_std, noise_like
from cascade.pictures.images import downsample, from_pil, to_float, upsample
from cascade.seeds import generator
from cascade.stage import Stage
from cascade.storage.stage import load_stage

CAPTIONS = ("a red circle", "a blue square")
LEARN = (
    "stage.parameterization=x",
    "training.batch_size=16",
    "training.log_every=100",
    "training.loss={space: velocity, max_weight: 400, levels: {kind: logit_normal}, stratified: true}",
    "training.optimizer={learning_rate: 3e-3, warmup_steps: 20, decay: cosine}",
    "training.ema.half_life_images=300",
)


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Two pictures of 8 px and their captions."""
    circle, square = (Image.new("RGB", (8, 8), "white") for _ in range(2))
    ImageDraw.Draw(circle).ellipse((1, 1, 6, 6), fill=(220, 30, 30))
    ImageDraw.Draw(square).rectangle((2, 0, 5, 3), fill=(30, 60, 220))
    return write_pictures(tmp_path / "pictures", dict(zip(CAPTIONS, (circle, square), strict=True)))


def truth(folder: Path) -> Tensor:
    """Both pictures in the order of their captions: (2, 3, 8, 8)."""
    return to_float(torch.stack([from_pil(Image.open(folder / f"{index}.png")) for index in range(2)]))


def text_of(captions: tuple[str, ...]) -> Conditioning:
    embeddings = WordEncoder().encode(captions)
    return Conditioning(embeddings.tokens, embeddings.mask)


def draw(stage: Stage, cond: Conditioning, null: Conditioning) -> Tensor:
    """One picture for each condition, from fixed noise."""
    rng = [generator(0, index) for index in range(len(cond))]
    with torch.inference_mode():
        return stage.sample(cond, null, noise_like(torch.empty(len(cond), 3, 8, 8), rng), rng)


def trained(tmp_path: Path, pictures: Path, *changes: str) -> Stage:
    source = f"data.sources=[{{kind: folder, path: {pictures}}}]"
    assert trainer(micro_config(tmp_path / "run", *LEARN, source, *changes)).run()
    return load_stage(tmp_path / "run" / "stage")


def test_a_base_stage_draws_the_two_pictures_it_saw_by_their_captions(tmp_path: Path, pictures: Path) -> None:
    widths = ("stage.model.channels=[16, 32]", "stage.model.blocks=[1, 1]", "stage.model.strides=[1, 2]")
    stage = trained(
        tmp_path,
        pictures,
        *widths,
        "stage.model.attention=[false, true]",
        "stage.model.embedding_dim=32",
        "stage.sampling={steps: 10, guidance: 1.0}",
        "training.steps=120",
    )
    drawn, expected = draw(stage, text_of(CAPTIONS), text_of(("", ""))), truth(pictures)
    right = (drawn - expected).abs().mean(dim=(1, 2, 3))
    wrong = (drawn - expected.flip(0)).abs().mean(dim=(1, 2, 3))
    # Of a range of 2. The two pictures differ by 0.5 on average, and their mean is 0.25 from each.
    assert right.max() < 0.05
    assert (right < wrong / 4).all()


def test_a_transformer_draws_the_two_pictures_it_saw_by_their_captions(tmp_path: Path, pictures: Path) -> None:
    stage = trained(
        tmp_path,
        pictures,
        "stage.model={kind: transformer, width: 32, depth: 2, patch: 2, bottleneck: 12, head_dim: 16,"
        " embedding_dim: 32, text_dim: 16}",
        "stage.sampling={steps: 10, guidance: 1.0}",
        "training.steps=200",
    )
    drawn, expected = draw(stage, text_of(CAPTIONS), text_of(("", ""))), truth(pictures)
    right = (drawn - expected).abs().mean(dim=(1, 2, 3))
    wrong = (drawn - expected.flip(0)).abs().mean(dim=(1, 2, 3))
    assert right.max() < 0.05  # as of the U-Net above
    assert (right < wrong / 4).all()


def test_a_super_resolution_stage_beats_bicubic_on_the_pictures_it_saw(tmp_path: Path, pictures: Path) -> None:
    stage = trained(
        tmp_path,
        pictures,
        *SUPER_RESOLUTION,
        "stage.model.channels=[32]",
        "stage.model.embedding_dim=32",
        "stage.sampling={steps: 4, aug_level: 0.05}",
        "data.max_aug_level=0.1",
        "training.steps=100",
    )
    expected = truth(pictures)
    low = downsample(expected, 4)
    level = log_snr_from_std(torch.full((2, 1, 1, 1), 0.0))  # a clean smaller picture
    text, null = text_of(CAPTIONS), text_of(("", ""))
    drawn = draw(
        stage,
        Conditioning(text.text, text.text_mask, low, level),
        Conditioning(null.text, null.text_mask, low, level),
    )
    assert psnr(drawn, expected) > psnr(upsample(low, 8), expected) + 10  # dB; 28 when this was written


def psnr(drawn: Tensor, expected: Tensor) -> float:
    """Peak signal-to-noise ratio in dB, for pictures in [-1, 1]."""
    error = (drawn.clamp(-1, 1) - expected).square().mean()
    return float(10 * torch.log10(4 / error))
