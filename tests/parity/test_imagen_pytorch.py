"""The Gaussian identities and the cosine schedule of imagen-pytorch."""

from __future__ import annotations

import importlib.util
import math
import sys
import types
import warnings
from typing import Any

import pytest
import torch

from cascade.diffusion.noise import diffuse, posterior, to_x
from cascade.diffusion.schedules import CosineSchedule

pytestmark = pytest.mark.slow

TIMES = torch.tensor([0.1, 0.3, 0.5, 0.9])


@pytest.fixture(scope="module")
def peer() -> Any:
    """Its diffusion.

    The package asks a hub for T5's settings when it is imported, and wants libraries for pictures: in their place are
    empty modules meanwhile.
    """
    spec = importlib.util.find_spec("imagen_pytorch")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("needs imagen-pytorch")
    stubs = {name: types.ModuleType(name) for name in ("torchvision", "kornia", "imagen_pytorch", "imagen_pytorch.t5")}
    for name, part in (("torchvision", "transforms"), ("kornia", "augmentation")):
        stubs[f"{name}.{part}"] = types.ModuleType(f"{name}.{part}")
        setattr(stubs[name], part, stubs[f"{name}.{part}"])
    stubs["imagen_pytorch"].__path__ = list(spec.submodule_search_locations)
    stubs["imagen_pytorch.t5"].__dict__.update(t5_encode_text=None, get_encoded_dim=lambda _: 768, DEFAULT_T5_NAME="")
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what a peer's import deprecates is not ours
        for name, module in stubs.items():
            patch.setitem(sys.modules, name, module)
        package = pytest.importorskip("imagen_pytorch.imagen_pytorch", exc_type=ImportError)
    return package.GaussianDiffusionContinuousTimes(noise_schedule="cosine")


def normal(seed: int) -> torch.Tensor:
    return torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


def test_its_cosine_schedule_is_ours_with_nichols_offset_but_for_the_division_by_its_beginning(peer: Any) -> None:
    """It leaves the noise of time 0, 1.6e-4 of the variance, in every picture; eq. 17 divides it out."""
    ours, theirs = (torch.sigmoid(of.log_snr(TIMES)) for of in (CosineSchedule(offset=0.008), peer))
    torch.testing.assert_close(ours * math.cos(0.008 / 1.008 * math.pi / 2) ** 2, theirs, rtol=0, atol=1e-6)


def test_noising_the_posterior_and_both_ways_back_to_x_are_the_same(peer: Any) -> None:
    x, eps = normal(0).clamp(-1, 1), normal(1)
    log_snr_t, log_snr_s = (peer.log_snr(times)[:, None, None, None] for times in (TIMES, TIMES - 0.05))
    z = diffuse(x, eps, log_snr_t)
    torch.testing.assert_close(z, peer.q_sample(x, TIMES, noise=eps)[0], rtol=0, atol=1e-6)
    mean, variance = posterior(x, z, log_snr_t, log_snr_s)
    their_mean, their_variance, _ = peer.q_posterior(x, z, TIMES, t_next=TIMES - 0.05)
    torch.testing.assert_close(mean, their_mean, rtol=0, atol=2e-6)
    torch.testing.assert_close(variance, their_variance, rtol=1e-5, atol=0)
    # x is divided by sqrt(alpha), 0.15 at the last of the times
    torch.testing.assert_close(
        to_x("eps", eps, z, log_snr_t), peer.predict_start_from_noise(z, TIMES, eps), rtol=0, atol=1e-5
    )
    torch.testing.assert_close(
        to_x("v", eps, z, log_snr_t), peer.predict_start_from_v(z, TIMES, eps), rtol=0, atol=1e-6
    )
