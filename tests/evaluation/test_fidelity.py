"""Measures of enlarged pictures: exact where the answer can be computed, monotonic elsewhere."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from cascade.evaluation.distances import (
    artefacts,
    colour_shift,
    consistency,
    edge_strength,
    feature_distance,
    psnr,
    ssim,
)
from cascade.evaluation.tower import Tower
from cascade.pictures.images import downsample, upsample

SIDE = 64


def disc() -> Tensor:
    """A red disc on white, its edge one pixel wide: (1, 3, 64, 64)."""
    places = torch.arange(SIDE) - SIDE / 2 + 0.5
    inside = (20.5 - (places[:, None] ** 2 + places[None, :] ** 2).sqrt()).clamp(0, 1)
    colour = torch.tensor([0.8, -0.6, -0.6])[:, None, None]
    return (inside * colour + (1 - inside))[None]


def blurred(picture: Tensor) -> Tensor:
    return upsample(downsample(picture, SIDE // 4), SIDE)


def test_psnr_of_a_constant_error_is_its_formula() -> None:
    picture = disc() * 0.5
    assert psnr(picture + 0.02, picture) == pytest.approx(-20 * math.log10(0.01), abs=1e-3)
    assert psnr(picture, picture) == 99.0


def test_ssim_is_one_for_equal_pictures_and_its_formula_for_plain_ones() -> None:
    assert ssim(disc(), disc()) == pytest.approx(1.0, abs=1e-9)
    gray, white = torch.zeros(1, 3, 32, 32), torch.ones(1, 3, 32, 32)
    assert ssim(gray, white) == pytest.approx((2 * 0.5 + 1e-4) / (0.25 + 1 + 1e-4), abs=1e-6)
    noise = torch.randn(1, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    assert ssim(noise.clamp(-1, 1), -noise.clamp(-1, 1)) < -0.9  # anticorrelated


def test_blur_weakens_edges_and_sharpening_beyond_the_truth_shows() -> None:
    truth = disc()
    assert edge_strength(truth, truth) == pytest.approx(1)
    assert edge_strength(blurred(truth), truth) < 0.6
    assert edge_strength(1.5 * truth, truth) == pytest.approx(1.5, abs=1e-5)


def test_edge_strength_does_not_depend_on_how_much_flat_ground_there_is() -> None:
    small, large = (torch.ones(1, 3, side, side) for side in (256, 1024))
    for picture in (small, large):
        picture[..., 100:110, 100:110] = -1  # far fewer edges than a twentieth of either
    weakened = [edge_strength(0.5 * picture + 0.5, picture) for picture in (small, large)]
    assert weakened == pytest.approx([0.5, 0.5], abs=1e-5)
    lines = torch.ones(1, 3, 1024, 1024)
    lines[..., ::32, :] = -1  # a gradient in a sixteenth of the rows, and a drift of the ground that is no edge
    ground = torch.linspace(0, 0.2, 1024)[None, None, None, :]
    assert edge_strength(0.5 * lines + ground, lines + ground) == pytest.approx(0.5, abs=0.01)


def test_consistency_and_colour_shift_look_at_the_area_mean() -> None:
    truth = disc() * 0.5
    low = downsample(truth, SIDE // 4)
    assert consistency(truth, low) == 99.0
    shifted = truth + torch.tensor([0.0, 2 / 127.5, 0.0])[:, None, None]
    assert colour_shift(shifted, low) == pytest.approx(2, abs=1e-3)
    # What averages out within the cells of the smaller picture is seen by neither.
    checks = 0.1 * (1 - 2 * (torch.arange(SIDE) % 2)).float()
    assert consistency(truth + checks, low) > 90
    assert colour_shift(truth + checks, low) == pytest.approx(0, abs=1e-3)


def test_features_are_equal_for_equal_pictures_and_differ_more_with_more_blur() -> None:
    torch.manual_seed(0)
    tower, truth = Tower().eval(), disc()
    half = upsample(downsample(truth, SIDE // 2), SIDE)
    assert feature_distance(truth, truth, tower) == 0
    assert 0 < feature_distance(half, truth, tower) < feature_distance(blurred(truth), truth, tower)


def test_dots_and_rings_are_found_where_the_smaller_picture_is_flat_and_not_at_edges() -> None:
    truth = disc()
    low = downsample(truth, SIDE // 4)
    assert artefacts(truth, low) == (False, False)
    dotted = truth.clone()
    dotted[..., [4, 10, 52, 58, 30, 33], [5, 40, 12, 50, 30, 34]] = 0.0
    assert artefacts(dotted, low) == (True, False)
    ringing = truth.clone()
    ringing[..., 2:6, :] -= 0.3  # a faint band beside nothing, which the median keeps
    assert artefacts(ringing, low) == (False, True)


def test_a_few_pixels_are_no_artefact_and_noise_below_the_threshold_is_none() -> None:
    truth = disc()
    low = downsample(truth, SIDE // 4)
    dotted = truth.clone()
    dotted[..., [4, 58], [5, 50]] = 0.0
    assert artefacts(dotted, low) == (False, False)
    noise = torch.rand(truth.shape, generator=torch.Generator().manual_seed(0)) * 0.1
    assert artefacts(truth - noise, F.avg_pool2d(truth - noise, 4)) == (False, False)
