"""Comparison of two sets of pictures as sets of feature vectors: pure functions on float tensors (N, D)."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

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
