"""Upscaling a user's picture: stages, sizes, preserved properties, and refusals."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers_model import make_tiny_cascade, tiny_configs, tiny_stage, tiny_stage_config
from PIL import Image

import cascade
from cascade import CascadeError, CascadePipeline
from cascade.config.stage import StageConfig
from cascade.drawing.batches import Inputs, Picture, Texts, draw_batch
from cascade.drawing.edit import padded, read_picture, route, target_size
from cascade.evaluation.distances import consistency
from cascade.pictures.images import back_project, downsample, to_float
from cascade.storage.stage import load_stage
from cascade.text.t5 import TextEmbeddings

BUNDLED_MODEL = Path(cascade.__file__).parent / "pretrained"
BUNDLED = [
    StageConfig(name="base", resolution=64),
    StageConfig(name="sr256", resolution=256, low_resolution=64),
    StageConfig(name="sr1024", resolution=1024, low_resolution=256),
]


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> CascadePipeline:
    return CascadePipeline.from_pretrained(make_tiny_cascade(tmp_path_factory.mktemp("models") / "tiny"), device="cpu")


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


# --- sizes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("longest", "to", "stages"),
    [
        (64, 256, ["sr256"]),
        (64, 1024, ["sr256", "sr1024"]),
        (100, 1024, ["sr256", "sr1024"]),
        (200, 800, ["sr1024"]),
        (256, 1024, ["sr1024"]),
        (256, 4096, ["sr1024", "sr1024"]),
        (1024, 4096, ["sr1024"]),
        (3, 100, ["sr256", "sr256", "sr256"]),
    ],
)
def test_each_time_the_stage_nearest_in_size_enlarges_until_it_is_enough(
    longest: int, to: int, stages: list[str]
) -> None:
    assert [BUNDLED[place].name for place in route(BUNDLED, longest, to)] == stages


def test_the_default_size_is_the_last_stages_or_once_its_factor() -> None:
    assert target_size(BUNDLED, (64, 32), None) == (1024, 512)
    assert target_size(BUNDLED, (300, 200), None) == (1024, 683)
    assert target_size(BUNDLED, (512, 1024), None) == (2048, 4096)
    assert target_size(BUNDLED, (1, 1000), 1100) == (1, 1100)


@pytest.mark.parametrize(("width", "height"), list(itertools.product((5, 8, 13), (1, 8, 17))))
def test_any_size_is_possible_and_the_aspect_ratio_stays(pipeline: CascadePipeline, width: int, height: int) -> None:
    result = pipeline.upscale(picture(width, height), to=31, seed=0)
    longest = max(width, height)
    assert result.images[0].size == (max(1, round(width * 31 / longest)), max(1, round(height * 31 / longest)))
    assert max(result.stages) == 31


def test_padding_repeats_the_last_pixels_and_is_the_least_that_the_network_divides() -> None:
    stage = tiny_configs()[1]  # enlarges twice and divides by two: any size
    assert padded(torch.zeros(1, 3, 5, 7, dtype=torch.uint8), stage).shape == (1, 3, 5, 7)
    coarse = stage.model_copy(update={"model": stage.model.model_copy(update={"patch": 4})})  # divides by eight
    pixels = torch.arange(5 * 7, dtype=torch.uint8).view(1, 1, 5, 7).expand(1, 3, 5, 7)
    wide = padded(pixels, coarse)
    assert wide.shape == (1, 3, 8, 8)
    assert torch.equal(wide[..., :5, :7], pixels)
    assert torch.equal(wide[..., 7, :7], pixels[..., 4, :])
    assert torch.equal(wide[..., :5, 7], pixels[..., 6])


# --- what the picture depends on ---------------------------------------------------------------------------


def test_a_drawn_picture_continues_to_the_same_larger_ones(pipeline: CascadePipeline) -> None:
    result = pipeline("a red apple", seed=7)
    again = pipeline.upscale(result.stages[8][0], prompt="a red apple", seed=7)
    for resolution in (16, 32):
        assert again.stages[resolution][0].tobytes() == result.stages[resolution][0].tobytes()


def test_prompt_and_seed_count_and_a_missing_seed_is_reported(pipeline: CascadePipeline) -> None:
    image = picture(16, 16)
    drawn = pipeline.upscale(image)
    assert pipeline.upscale(image, seed=drawn.seeds[0]).images[0].tobytes() == drawn.images[0].tobytes()
    others = [
        pipeline.upscale(image, seed=drawn.seeds[0] + 1),
        pipeline.upscale(image, seed=drawn.seeds[0], prompt="a fox"),
    ]
    assert all(other.images[0].tobytes() != drawn.images[0].tobytes() for other in others)


def test_the_same_stage_draws_other_noise_the_second_time(pipeline: CascadePipeline) -> None:
    seen: list[torch.Tensor] = []
    pipeline.upscale(picture(32, 32), to=128, seed=0, callback=lambda *_a: seen.append(_a[-1]))
    first, *_, last = seen
    assert first.shape[-1] == 64
    assert last.shape[-1] == 128


def test_transparency_is_laid_over_white_and_paths_and_arrays_are_pictures(
    pipeline: CascadePipeline, tmp_path: Path
) -> None:
    clear = Image.new("RGBA", (8, 8), (255, 0, 0, 0))
    white = Image.new("RGB", (8, 8), "white")
    white.save(tmp_path / "white.png")
    results = {
        pipeline.upscale(image, to=16, seed=1).images[0].tobytes()
        for image in (
            clear,
            white,
            tmp_path / "white.png",
            str(tmp_path / "white.png"),
            np.asarray(white),
            np.asarray(clear),
        )
    }
    assert len(results) == 1


@pytest.fixture
def with_enlargers(pipeline: CascadePipeline, tmp_path: Path) -> CascadePipeline:
    """The tiny cascade with another first enlarger, `up16`, of other weights; from its folder."""
    config = tiny_stage_config("up16", 16, 8)
    stages = [slot.load() for slot in pipeline.slots]
    enlargers = [tiny_stage(config, seed=7), stages[2]]
    made = CascadePipeline(pipeline.text_encoder, stages, name="two ways", license="CC0-1.0", enlargers=enlargers)
    made.save_pretrained(tmp_path / "model")
    return CascadePipeline.from_pretrained(tmp_path / "model", device="cpu")


def test_a_cascade_may_enlarge_pictures_with_other_stages_than_it_draws_with(
    pipeline: CascadePipeline, with_enlargers: CascadePipeline
) -> None:
    assert [slot.config.name for slot in with_enlargers.enlargers] == ["up16", "sr32"]
    assert with_enlargers.enlargers[1] is with_enlargers.slots[2], "a stage of both is loaded once"
    own, other = (model.upscale(picture(8, 8), seed=1).stages for model in (pipeline, with_enlargers))
    assert own[16][0].tobytes() != other[16][0].tobytes()
    drawn, again = (model("a red star", seed=1).images[0].tobytes() for model in (pipeline, with_enlargers))
    assert drawn == again


def test_options_for_a_stage_name_the_stages_that_enlarge(with_enlargers: CascadePipeline) -> None:
    with_enlargers.upscale(picture(8, 8), seed=1, steps={"up16": 1})
    with pytest.raises(CascadeError, match="sr16"):
        with_enlargers.upscale(picture(8, 8), seed=1, steps={"sr16": 1})


@pytest.mark.usefixtures("with_enlargers")
def test_another_super_resolution_enlarges_pictures_too(tmp_path: Path) -> None:
    model = tmp_path / "model"
    chosen = CascadePipeline.from_pretrained(model, super_resolution=[f"{model}/sr16"], device="cpu")
    assert chosen.enlargers is chosen.slots


def test_a_moved_pipeline_keeps_its_enlargers(with_enlargers: CascadePipeline) -> None:
    moved = with_enlargers.to(dtype=torch.bfloat16)
    assert [slot.config.name for slot in moved.enlargers] == ["up16", "sr32"]
    assert moved.enlargers[1] is moved.slots[2]


def test_low_memory_gives_the_same_bytes(pipeline: CascadePipeline, tmp_path: Path) -> None:
    pipeline.save_pretrained(tmp_path / "model")
    frugal = CascadePipeline.from_pretrained(tmp_path / "model", device="cpu", low_memory=True)
    image = picture(8, 8)
    for _ in range(2):
        assert frugal.upscale(image, seed=1).images[0].tobytes() == pipeline.upscale(image, seed=1).images[0].tobytes()


def test_back_projection_brings_the_area_mean_to_the_smaller_picture() -> None:
    rng = torch.Generator().manual_seed(0)
    low = torch.rand(1, 3, 8, 8, generator=rng) - 0.5
    images = torch.rand(1, 3, 32, 32, generator=rng) - 0.5
    errors = [(downsample(back_project(images, low, rounds), 8) - low).abs().max() for rounds in range(4)]
    assert all(after < 0.5 * before for before, after in itertools.pairwise(errors))
    consistent = torch.nn.functional.interpolate(low, scale_factor=4)
    assert torch.allclose(back_project(consistent, low, 3), consistent, atol=1e-6)


# --- what is refused ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("image", "options", "message"),
    [
        (picture(40, 8), {"to": 40}, "to: 40; the picture's longer side already has 40 px, give more"),
        (picture(8, 8), {"to": 0}, "to: 0; expected at least 1"),
        (picture(8, 8), {"tile": 0}, "tile: 0; expected at least 1"),
        (picture(8, 8), {"tile": 8}, "tile: stage sr16 sees the whole picture at once; draw it without tiles"),
        (picture(8, 8), {"steps": {"sr64": 2}}, "no stage is called 'sr64'"),
        (picture(8, 8), {"prompt": 3}, "prompt: 3 is not text"),
        (picture(8, 8), {"output_type": "jpeg"}, "output_type: 'jpeg'"),
        (b"abc", {}, "image: bytes; expected a PIL picture, a path or a NumPy array"),
        (np.zeros((8, 8)), {}, r"image: an array float64 of shape \(8, 8\); expected uint8"),
        ("nowhere.png", {}, "nowhere.png: no such file"),
        (__file__, {}, "not a readable picture"),
        (str(Path(__file__).parent), {}, "not a readable picture"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_wrong_calls_say_what_is_wrong(
    pipeline: CascadePipeline, image: Any, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(CascadeError, match=message):
        pipeline.upscale(image, **options)


def test_a_model_without_super_resolution_cannot_upscale(pipeline: CascadePipeline) -> None:
    alone = CascadePipeline(pipeline.text_encoder, [pipeline.slots[0]])
    with pytest.raises(CascadeError, match="no super-resolution stage"):
        alone.upscale(picture(8, 8), to=16)


def test_sixteen_bit_and_palette_pictures_are_read(tmp_path: Path) -> None:
    Image.new("I;16", (4, 4), 0xFFFF).save(tmp_path / "deep.png")
    Image.new("P", (4, 4)).save(tmp_path / "palette.gif")
    assert bool((read_picture(tmp_path / "deep.png") == 255).all())
    assert read_picture(tmp_path / "palette.gif").shape == (1, 3, 4, 4)


# --- the bundled stages --------------------------------------------------------------------------------------


def bars(side: int, across: bool) -> torch.Tensor:
    """Wide bars of two colours, as uint8 (1, 3, side, side)."""
    colours = torch.tensor([[230, 40, 60], [250, 240, 90]], dtype=torch.uint8)
    lines = colours[torch.arange(side) // 8 % 2].T[None, :, :, None].expand(1, 3, side, side)
    return lines if across else lines.mT


@pytest.mark.parametrize("name", ["upscale256", "sr1024"])
def test_a_bundled_stage_draws_the_picture_that_it_is_given(name: str) -> None:
    stage = load_stage(BUNDLED_MODEL / name)
    empty = TextEmbeddings.from_rows([torch.zeros(1, stage.config.model.text_dim)])
    lows = [bars(32, across) for across in (False, True)]
    with torch.inference_mode():
        drawn = [
            draw_batch(stage, Inputs(stage.config.sampling, (128, 128), [Picture(0, 0, 0)], Texts(empty, empty), low))
            for low in lows
        ]
    for picture, own, other in zip(drawn, lows, reversed(lows), strict=True):
        assert consistency(picture, to_float(own)) > 30
        assert consistency(picture, to_float(other)) < 15
