"""Random numbers follow from their key alone, on every machine."""

from __future__ import annotations

import pytest
import torch

from cascade.seeds import MAX_SEED, derive_seed, fresh_seed, generator

KEY = (7, 0, "base", "noise")


def test_generator_is_seeded_by_sha256_of_the_key() -> None:
    """Known answer: sha256("(7, 0, 'base', 'noise')"), computed with sha256sum; Python's `hash` has no part in it."""
    assert generator(*KEY).initial_seed() == int.from_bytes(bytes.fromhex("c962cb2d55e0055d"), "little")


def test_noise_of_a_key_equals_the_recorded_values() -> None:
    drawn = torch.randn(3, generator=generator(*KEY))
    # Recorded: a change would change every picture of every seed.
    torch.testing.assert_close(drawn, torch.tensor([-0.839347, 1.868699, -0.327640]), rtol=0, atol=1e-6)


def test_same_key_same_numbers() -> None:
    assert torch.equal(torch.randn(8, generator=generator(*KEY)), torch.randn(8, generator=generator(*KEY)))
    assert derive_seed(*KEY) == derive_seed(*KEY)


@pytest.mark.parametrize(
    "other", [(8, 0, "base", "noise"), (7, 1, "base", "noise"), (7, 0, "sr256", "noise"), (7, 0, "base", "augment")]
)
def test_every_part_of_the_key_counts(other: tuple[int | str, ...]) -> None:
    assert generator(*other).initial_seed() != generator(*KEY).initial_seed()
    assert derive_seed(*other) != derive_seed(*KEY)


def test_a_number_and_its_text_are_different_keys_and_so_are_other_groupings() -> None:
    assert derive_seed(1) != derive_seed("1")
    assert derive_seed("ab", "c") != derive_seed("a", "bc")


def test_derived_and_fresh_seeds_are_in_range() -> None:
    assert all(0 <= derive_seed(index) <= MAX_SEED for index in range(100))
    fresh = {fresh_seed() for _ in range(20)}
    assert all(0 <= seed < 2**32 for seed in fresh)
    assert len(fresh) > 1


def test_generators_do_not_touch_torchs_own() -> None:
    before = torch.get_rng_state()
    torch.randn(3, generator=generator(*KEY))
    assert torch.equal(torch.get_rng_state(), before)
