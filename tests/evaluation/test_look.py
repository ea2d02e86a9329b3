"""Measures of appearance: each figure on pictures with a known answer, and the order true, blurred, smeared, noise."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

from cascade.data.scenes import draw, random_scene
from cascade.evaluation import look
from cascade.evaluation.art_look import Seen, View, measure, summary
from cascade.evaluation.tower import load_tower
from cascade.pictures.images import downsample, from_pil, to_float, to_uint8, upsample
from cascade.seeds import generator

SIDE = 128


def scenes(first: int, count: int, side: int = SIDE) -> Tensor:
    """Drawn shapes, anti-aliased: true pictures of a style."""
    drawn = [from_pil(draw(random_scene(random.Random(number)), 4 * side)) for number in range(first, first + count)]
    return to_uint8(downsample(to_float(torch.stack(drawn)), side))


def smeared(pictures: Tensor) -> Tensor:
    """Soft as a picture of a quarter of the side, and mottled by 4 of 255."""
    side = pictures.shape[-1]
    small = downsample(to_float(pictures), side // 4)
    mottle = torch.randn(small.shape, generator=generator("mottle"))
    return to_uint8(upsample(small + 0.03 * mottle, side))


def noise_like(pictures: Tensor) -> Tensor:
    return torch.randint(0, 256, pictures.shape, generator=generator("noise"), dtype=torch.uint8)


@pytest.fixture(scope="module")
def ladder() -> dict[str, dict[str, Seen]]:
    """Every figure by name, of true pictures and of three kinds of worse ones."""
    # Half of the others are the true pictures: else another choice of subjects would be as far as so light a blur.
    true, others = scenes(0, 6), scenes(0, 12)
    nothing = (torch.zeros(0, 3, SIDE, SIDE, dtype=torch.uint8), ())
    kinds = {"true": true, "blurred": look.blurred(true), "smeared": smeared(true), "noise": noise_like(true)}
    tower = load_tower()
    return {
        kind: {seen.name: seen for seen in measure(View("shapes", drawn, true, others, nothing), tower, 0)}
        for kind, drawn in kinds.items()
    }


@pytest.mark.parametrize("name", ["patch distance, 32 px", "patch distance, 64 px", "patch distance, pixels"])
def test_patch_distances_order_true_blurred_smeared_noise(ladder: dict[str, dict[str, Seen]], name: str):
    true, blurred, smeared_, noise = (ladder[kind][name].value for kind in ("true", "blurred", "smeared", "noise"))
    assert true < blurred < smeared_ < noise
    assert true == ladder["true"][name].reference
    assert blurred == ladder["true"][name].blurred


def test_flat_pixels_and_colours_order_true_blurred_smeared_noise(ladder: dict[str, dict[str, Seen]]):
    flat = [ladder[kind]["flat pixels"].value for kind in ("true", "blurred", "smeared", "noise")]
    assert flat == sorted(flat, reverse=True)
    many = [ladder[kind]["colours"].value for kind in ("true", "blurred", "smeared", "noise")]
    assert many == sorted(many)


def test_edges_are_wider_the_softer_a_picture_is(ladder: dict[str, dict[str, Seen]]):
    true, blurred, smeared_ = (ladder[kind]["edge width"].value for kind in ("true", "blurred", "smeared"))
    assert 0.8 <= true < blurred < smeared_


def half_and_half(profile: list[float], side: int = 64) -> Tensor:
    """Dark on the left, bright on the right, with a given profile between: (1, 3, side, side)."""
    left = (side - len(profile)) // 2
    row = torch.tensor([0.0] * left + profile + [1.0] * (side - left - len(profile)))
    return (row * 200).round().to(torch.uint8).expand(1, 3, side, side).contiguous()


@pytest.mark.parametrize(
    ("profile", "width"),
    [
        ([], 0.8),  # one step from 0 to 1 covers 10 to 90 % in 0.8 of it
        ([0.5], 1.6),  # two equal steps
        ([0.25, 0.5, 0.75], 3.2),
        ([0.1, 0.9], 1.0),  # the middle step alone
    ],
)
def test_edge_width_is_that_of_a_known_edge_either_way_round(profile: list[float], width: float):
    picture = half_and_half(profile)
    for turned in (picture, picture.flip(-1), picture.transpose(-1, -2), 200 - picture):
        assert float(look.edge_width(turned)) == pytest.approx(width, abs=0.02)


def test_a_gaussian_edge_has_the_width_that_its_integral_says():
    places = torch.arange(-15, 16) - 0.5
    profile = 0.5 * (1 + torch.erf(places / (3 * 2**0.5)))
    # From -1.2816 to 1.2816 deviations of 3 px; whole gray levels and straight lines between pixels blur that a little.
    assert float(look.edge_width(half_and_half(profile.tolist()))) == pytest.approx(2 * 1.2816 * 3, rel=0.03)


def test_a_picture_without_edges_has_no_edge_width():
    assert look.edge_width(torch.full((1, 3, 64, 64), 77, dtype=torch.uint8)).isnan().all()
    faint = half_and_half([]) // 10  # 20 gray levels are below what counts
    assert look.edge_width(faint).isnan().all()


def test_flatness_is_the_share_of_pixels_that_do_not_differ_by_two():
    picture = torch.full((3, 3, 65, 65), 100, dtype=torch.uint8)
    picture[1, :, :, 32:] += 1  # one level is flat
    picture[2, 0, :, 32:] += 2  # two in a single colour are not: one of 64 columns
    assert look.flatness(picture).tolist() == [1, 1, 1 - 1 / 64]


def test_colours_counts_those_that_cover_nine_tenths():
    picture = torch.full((1, 3, 10, 10), 252, dtype=torch.uint8)
    assert look.colours(picture).tolist() == [1]
    picture[0, :, 0] = 0  # a tenth in another one: the first still covers nine
    assert look.colours(picture).tolist() == [1]
    picture[0, 0, 1, 0] = 100
    assert look.colours(picture).tolist() == [2]
    assert look.colours(picture + 3).tolist() == [2]  # within the same steps of 8: 255, 3 and 103


def test_patches_show_something_and_no_picture_gives_more_than_its_share():
    pictures = torch.cat([torch.full((1, 3, 128, 128), 255, dtype=torch.uint8), scenes(0, 2)])
    found = look.patches(pictures, 32, 4, generator("patches"))
    assert found.shape == (8, 3, 32, 32)
    assert all(patch.amax() - patch.amin() >= 16 for patch in found)


def test_neighbourhoods_of_a_pyramid_hold_the_picture_s_values_on_the_last_level_alone():
    pictures = torch.full((2, 3, 64, 64), 255, dtype=torch.uint8)
    levels = look.neighbourhoods(pictures, 5, generator("places"))
    assert [level.shape for level in levels] == [(10, 147)] * 4
    assert all(level.abs().max() < 1e-5 for level in levels[:-1])
    assert torch.equal(levels[-1], torch.ones(10, 147))


def test_blurring_keeps_flat_pictures_and_widens_an_edge_by_the_said_deviation():
    flat = torch.full((1, 3, 256, 256), 33, dtype=torch.uint8)
    assert torch.equal(look.blurred(flat), flat)
    # 200 levels rise by way of 1, 34, 166 and 199, as the sums of the kernel's weights say: 1 + 2 (34 - 20) / 33.
    soft = float(look.edge_width(look.blurred(half_and_half([]))))
    assert soft == pytest.approx(1 + 28 / 33, abs=0.01)


def test_the_whole_set_s_figure_counts_a_style_by_its_drawings_and_tells_how_many_styles_are_near():
    rows = {
        "noto": [Seen("colours", 11, 10, "", "as true", 30)],
        "twemoji": [Seen("colours", 12, 6, "", "as true", 10)],
    }
    figures = {figure.name: figure for figure in summary(rows, "at 256 px")}
    assert figures["colours at 256 px"].value == pytest.approx((11 * 30 + 12 * 10) / 40)
    assert figures["colours at 256 px"].reference == pytest.approx(9)
    assert figures["colours at 256 px, of the true pictures'"].value == pytest.approx((1.1 * 30 + 2 * 10) / 40)
    assert figures["colours at 256 px, styles within 15%"].value == 0.5
    assert figures["colours at 256 px: twemoji"].value == 12


@pytest.mark.slow
def test_drawings_of_the_bundled_cascade_stand_between_true_pictures_and_noise():
    """The scale holds for what it is meant for: shapes that the bundled cascade draws from words, at 256 px."""
    from cascade import CascadePipeline
    from cascade.data.scenes import describe

    numbers = range(12)
    prompts = [describe(random_scene(random.Random(number)), random.Random(number)) for number in numbers]
    drawn = CascadePipeline.from_pretrained()(prompts, seed=0, until=256).images
    true, others = scenes(0, 12, 256), scenes(0, 36, 256)
    nothing = (torch.zeros(0, 3, 256, 256, dtype=torch.uint8), ())
    tower = load_tower()
    pictures = torch.stack([from_pil(picture) for picture in drawn])
    ours = {seen.name: seen for seen in measure(View("shapes", pictures, true, others, nothing), tower, 0)}
    noise = {seen.name: seen for seen in measure(View("shapes", noise_like(true), true, others, nothing), tower, 0)}
    for name in ("patch distance, 32 px", "patch distance, 64 px", "patch distance, pixels", "colours"):
        assert ours[name].reference < ours[name].value < noise[name].value, name
    assert ours["flat pixels"].reference > ours["flat pixels"].value > noise["flat pixels"].value
