"""Comparisons, as pure functions: of two sets of pictures by their features, of an enlarged picture and the truth."""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from cascade.evaluation.tower import Tower
from cascade.pictures.images import downsample, upsample

NEIGHBOURS = 5
COPY_RATIO = 1 / 3
_DIRECTIONS = 512
_QUANTILES = 200


def sliced_wasserstein(one: Tensor, other: Tensor, rng: torch.Generator) -> float:
    """Root mean square, over random directions, of the Wasserstein-2 distance between the projected sets.

    In one dimension it is the distance between sorted values, here at 200 quantiles, so that the sets may have
    different sizes.  Source: Rabin et al. (2011); Bonneel et al. (2015) eq. 5.
    """
    directions = torch.randn(one.shape[1], _DIRECTIONS, generator=rng, dtype=one.dtype)
    directions = directions / directions.norm(dim=0)
    quantiles = [_quantiles(directions.T @ features.T) for features in (one, other)]
    return float((quantiles[0] - quantiles[1]).square().mean().sqrt())


def _quantiles(values: Tensor) -> Tensor:
    """200 quantiles of every row, linear between values: (rows, N) -> (rows, 200).

    NumPy sorts ten times as fast as torch, whose `quantile` has equal results and accepts at most 16 million values.
    """
    ordered = torch.from_numpy(np.sort(values.cpu().numpy(), axis=1))
    places = (torch.arange(_QUANTILES, dtype=values.dtype) + 0.5) / _QUANTILES * (values.shape[1] - 1)
    lower = places.long()
    upper = (lower + 1).clamp(max=values.shape[1] - 1)
    return ordered[:, lower].lerp(ordered[:, upper], places - lower)


def kernel_distance(one: Tensor, other: Tensor) -> float:
    """Unbiased squared maximum mean discrepancy with the kernel (x.y / D + 1)^3; around 0, also below, for equal sets.

    Source: Binkowski et al. (2018), arXiv:1801.01401, eq. 4.
    """
    return float(_mean_off_diagonal(_kernel(one, one)) + _mean_off_diagonal(_kernel(other, other))) - 2 * float(
        _kernel(one, other).mean()
    )


def _kernel(one: Tensor, other: Tensor) -> Tensor:
    return (one @ other.T / one.shape[1] + 1) ** 3


def _mean_off_diagonal(values: Tensor) -> Tensor:
    """The mean over pairs of different members, as required for an unbiased estimate."""
    count = len(values)
    return (values.sum() - values.diagonal().sum()) / (count * (count - 1))


def precision_and_recall(true: Tensor, drawn: Tensor, neighbours: int = NEIGHBOURS) -> tuple[float, float]:
    """Share of drawn members inside the true set's neighbourhoods, and share of true ones inside the drawn set's.

    A member's neighbourhood reaches to its k-th nearest neighbour in its own set, which must have more than k members.
    Source: Kynkaanniemi et al. (2019), arXiv:1904.06991, eq. 1 and 2.
    """
    between = torch.cdist(drawn, true)
    return (
        float((between <= _reach(true, neighbours)[None, :]).any(dim=1).double().mean()),
        float((between <= _reach(drawn, neighbours)[:, None]).any(dim=0).double().mean()),
    )


def _reach(members: Tensor, neighbours: int) -> Tensor:
    """Distance of each member to its k-th nearest other one: (N,)."""
    distances = torch.cdist(members, members, compute_mode="donot_use_mm_for_euclid_dist")
    return distances.kthvalue(neighbours + 1, dim=1).values  # itself is the first


def near_copies(drawn: Tensor, training: Tensor, groups: Tensor) -> list[bool]:
    """Whether each drawn member is a near-copy: less than a third as far from a training member as from the others.

    groups: (N,) subject of each training member. The second distance is to the nearest member of another subject,
    because two training pictures of one subject would hide a copy.
    Source: the criterion of Gu et al. (2023), arXiv:2310.02664; the groups are our change.
    """
    # By matrix products, ten times as fast: a copy's distance becomes 0.1 instead of 0, others are 40 and more.
    distances = torch.cdist(drawn, training)
    nearest, which = distances.min(dim=1)
    same = groups[None, :] == groups[which][:, None]
    second = distances.masked_fill(same, torch.inf).min(dim=1).values
    return (nearest < COPY_RATIO * second).tolist()


# --- fidelity --------------------------------------------------------------------------------------------------------
# Fidelity of an enlarged picture to the truth and to the smaller picture: pure functions of pictures.
#
# All pictures are float (1, C, H, W) in [-1, 1], of any channels unless a judge sees them; `low` is the smaller one,
# the truth's area mean. SSIM is implemented here in thirty lines, since scikit-image would also require SciPy.

_SSIM_WINDOW, _SSIM_SIGMA = 11, 1.5
_STRONGEST, _STRONGEST_SIDE = 0.05, 256
"""Share of the truth's pixels that count as edges in a square of this side. Outlines grow with the side, not the area:
a twentieth of 1024x1024 would include flat areas without edges."""
_FLAT = 2 * 6 / 255
"""A place is flat if the smaller picture varies by at most this among a pixel and its neighbours."""
_DEVIATION = 2 * 24 / 255
"""An output that differs from a flat place's value by more than this is an artefact."""
_FEWEST = 4
"""Number of artefact pixels from which a picture counts."""


def psnr(picture: Tensor, truth: Tensor) -> float:
    """Peak signal-to-noise ratio in dB, at most 99 for equal pictures."""
    error = (picture.double() - truth.double()).square().mean().item() / 4  # on a scale where the peak is 1
    return 99.0 if error == 0 else min(99.0, -10 * math.log10(error))


def ssim(picture: Tensor, truth: Tensor) -> float:
    """Structural similarity, averaged over pixels and channels.

    Source: Wang et al. (2004): Gaussian windows of 11 pixels and deviation 1.5, K = (0.01, 0.03).
    """
    x, y = (((image + 1) / 2).double().transpose(0, 1) for image in (picture, truth))  # channels as a batch
    places = torch.arange(_SSIM_WINDOW, dtype=torch.float64) - _SSIM_WINDOW // 2
    line = torch.exp(-places.square() / (2 * _SSIM_SIGMA**2))
    line = (line / line.sum()).to(x.device)

    def mean(image: Tensor) -> Tensor:
        return F.conv2d(F.conv2d(image, line[None, None, None, :]), line[None, None, :, None])

    mean_x, mean_y = mean(x), mean(y)
    variance_x, variance_y = mean(x * x) - mean_x**2, mean(y * y) - mean_y**2
    covariance = mean(x * y) - mean_x * mean_y
    c1, c2 = 0.01**2, 0.03**2
    likeness = (2 * mean_x * mean_y + c1) * (2 * covariance + c2)
    return float((likeness / ((mean_x**2 + mean_y**2 + c1) * (variance_x + variance_y + c2))).mean())


@torch.inference_mode()
def feature_distance(picture: Tensor, truth: Tensor, tower: Tower) -> float:
    """Distance in the features of `tower`, 0 for equal pictures, summed over the scales at which it halves the picture.

    LPIPS (Zhang et al. 2018) without its learned weights: unit vectors over channels, squared difference, mean over
    positions, sum over scales.
    """
    total, x, y = 0.0, picture, truth
    for layer in tower.image.layers:
        before = x.shape[-1]
        x, y = layer(x), layer(y)
        if x.shape[-1] < before:
            total += (F.normalize(x, dim=1) - F.normalize(y, dim=1)).square().sum(dim=1).mean().item()
    return total


def edge_strength(picture: Tensor, truth: Tensor) -> float:
    """Gradient relative to the truth's at the pixels where the truth's is strongest: 1 is equally sharp.

    These are a twentieth of the pixels up to 256x256, and a smaller share in larger pictures.
    """
    ours, true = gradient(picture).flatten(), gradient(truth).flatten()
    share = _STRONGEST * min(1.0, _STRONGEST_SIDE / true.numel() ** 0.5)
    edges = true.topk(max(1, round(share * true.numel()))).indices
    return float(ours[edges].mean() / true[edges].mean().clamp(min=1e-9))


def gradient(picture: Tensor) -> Tensor:
    """Length of the gradient of the mean colour at every pixel but the last: (H - 1, W - 1)."""
    gray = picture.mean(dim=1)[0]
    return ((gray[1:, :-1] - gray[:-1, :-1]).square() + (gray[:-1, 1:] - gray[:-1, :-1]).square()).sqrt()


def consistency(picture: Tensor, low: Tensor) -> float:
    """PSNR in dB of the picture's area mean against the smaller picture."""
    return psnr(downsample(picture, (low.shape[-2], low.shape[-1])), low)


def colour_shift(picture: Tensor, low: Tensor) -> float:
    """The largest difference of a channel's mean, in units of 1/255."""
    return float((picture.mean(dim=(2, 3)) - low.mean(dim=(2, 3))).abs().max() * 127.5)


def artefacts(picture: Tensor, low: Tensor) -> tuple[bool, bool]:
    """Whether a picture has isolated dots, and whether it has ringing, where the smaller picture is flat.

    The truth is almost certainly flat there too. A pixel that differs from the flat value by more than 24/255 is a dot
    if it also differs from its neighbours, otherwise part of a ring.
    """
    size = (picture.shape[-2], picture.shape[-1])
    spread = _largest(low) + _largest(-low)
    flat = F.interpolate((spread <= _FLAT).float().amin(dim=1, keepdim=True), size=size) > 0
    away = (picture - upsample(low, size)).abs().amax(dim=1, keepdim=True) > _DEVIATION
    alone = (picture - _median(picture)).abs().amax(dim=1, keepdim=True) > _DEVIATION / 2
    found = flat & away
    return int((found & alone).sum()) >= _FEWEST, int((found & ~alone).sum()) >= _FEWEST


def _largest(picture: Tensor) -> Tensor:
    """The largest value among a pixel and its neighbours."""
    return F.max_pool2d(picture, 3, stride=1, padding=1)


def _median(picture: Tensor) -> Tensor:
    """The median among a pixel and its neighbours."""
    around = F.unfold(F.pad(picture, (1, 1, 1, 1), mode="replicate").transpose(0, 1), 3)  # (C, 9, H W)
    return around.median(dim=1).values.view(1, -1, *picture.shape[-2:])
