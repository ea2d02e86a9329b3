"""The transformer on patches: positions, masks, sizes, and that no other file of the package names it."""

from __future__ import annotations

import ast
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import cascade
from cascade.conditioning import Conditioning, pad_text
from cascade.models.transformer import (
    Transformer,
    TransformerConfig,
    centres,
    places,
    rotate,
    rotations,
)

PACKAGE = Path(cascade.__file__).parent
TINY: dict[str, Any] = {"width": 16, "depth": 2, "patch": 2, "bottleneck": 8, "head_dim": 8}
TINY |= {"embedding_dim": 16, "text_dim": 12}
VARIANTS: dict[str, dict[str, Any]] = {
    "text in the sequence": {},
    "pooled text": {"text": "pooled"},
    "no text": {"text": "none"},
    "one pixel a token": {"patch": 1},
}


def transformer(low_res_channels: int = 0, **changes: Any) -> Transformer:
    """Without zeros, so that every layer takes part."""
    network = TransformerConfig(**{**TINY, **changes}).build(3, low_res_channels)
    rng = torch.Generator().manual_seed(0)
    for weight in network.parameters():
        weight.data.copy_(torch.randn(weight.shape, generator=rng) / max(weight[0].numel(), 4) ** 0.5)
    return network.eval()


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def conditions(low: tuple[int, int] | None = None) -> Conditioning:
    """Two texts, one of them shorter."""
    mask = torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
    cond = Conditioning(normal(2, 5, 12, seed=1), mask)
    if low is None:
        return cond
    return replace(cond, low_res=normal(2, 3, *low, seed=5), low_res_log_snr=torch.full((2, 1, 1, 1), 2.0))


LEVELS = torch.tensor([-3.0, 4.0])[:, None, None, None]


# --- what it computes ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", VARIANTS)
def test_a_fresh_network_returns_zero(name: str) -> None:
    network = TransformerConfig(**{**TINY, **VARIANTS[name]}).build(3)
    assert not network(normal(2, 3, 8, 8), LEVELS, conditions()).any()


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("low_res_channels", [0, 3])
def test_gradients_reach_every_parameter(name: str, low_res_channels: int) -> None:
    network = transformer(low_res_channels, **VARIANTS[name])
    network(normal(2, 3, 8, 12), LEVELS, conditions((8, 12) if low_res_channels else None)).square().sum().backward()
    for weight_name, weight in network.named_parameters():
        assert weight.grad is not None, weight_name
        assert weight.grad.abs().max() > 0, weight_name


def test_what_is_prepared_once_gives_what_the_conditions_give() -> None:
    network, cond = transformer(3), conditions((8, 8))
    z = normal(2, 3, 8, 8)
    assert torch.equal(network(z, LEVELS, network.prepare(cond)), network(z, LEVELS, cond))


@pytest.mark.parametrize("text", ["attention", "pooled"])
def test_padding_the_text_changes_nothing(text: str) -> None:
    network, cond = transformer(text=text), conditions()
    padded, mask = pad_text(cond.text, cond.text_mask, 9)
    rubbish = Conditioning(torch.where(mask[:, :, None], padded, 1e3), mask)
    z = normal(2, 3, 8, 8)
    torch.testing.assert_close(network(z, LEVELS, rubbish), network(z, LEVELS, cond), rtol=1e-5, atol=1e-5)


def test_a_text_without_a_real_token_gives_numbers() -> None:
    cond = replace(conditions(), text_mask=torch.zeros(2, 5, dtype=torch.bool))
    assert transformer()(normal(2, 3, 8, 8), LEVELS, cond).isfinite().all()


def test_a_picture_does_not_depend_on_its_batch() -> None:
    network, cond, z = transformer(), conditions(), normal(2, 3, 8, 8)
    alone = network(z[1:], LEVELS[1:], Conditioning(cond.text[1:], cond.text_mask[1:]))
    torch.testing.assert_close(network(z, LEVELS, cond)[1:], alone, rtol=1e-5, atol=1e-5)


def test_the_text_and_the_smaller_picture_are_seen() -> None:
    network, cond, z = transformer(3), conditions((8, 8)), normal(2, 3, 8, 8)
    plain = network(z, LEVELS, cond)
    for other in (replace(cond, text=-cond.text), replace(cond, low_res=-cond.low_res)):  # type: ignore[operator]
        assert (network(z, LEVELS, other) - plain).abs().amax(dim=(1, 2, 3)).min() > 1e-3


# --- where a patch lies ----------------------------------------------------------------------------------------------


def test_a_query_and_a_key_know_their_distance_and_nothing_else_of_their_places() -> None:
    """Moved together by whole patches, their product stays; moved apart, along either axis, it changes."""
    query, key = normal(8, seed=1), normal(8, seed=2)

    def product(asks: tuple[float, float], answers: tuple[float, float]) -> float:
        turns = rotations(torch.tensor([asks, answers]), 8)
        both = rotate(torch.stack([query, key])[None, None], turns)[0, 0]
        return float(both[0] @ both[1])

    here = product((0.0, 0.0), (2.0, 1.0))
    assert product((5.0, -3.5), (7.0, -2.5)) == pytest.approx(here, abs=1e-4)
    assert product((0.0, 0.0), (3.0, 1.0)) != pytest.approx(here, abs=1e-2)
    assert product((0.0, 0.0), (2.0, 2.0)) != pytest.approx(here, abs=1e-2)


def test_rotation_keeps_lengths() -> None:
    heads = normal(1, 2, 6, 8)
    turned = rotate(heads, rotations(centres(2, 3, torch.device("cpu")), 8))
    torch.testing.assert_close(turned.norm(dim=-1), heads.norm(dim=-1))


def test_a_picture_twice_as_large_has_the_places_of_the_smaller_one_in_twice_the_detail() -> None:
    at = centres(16, 16, torch.device("cpu"))
    torch.testing.assert_close(places(at, 16, 16), places(at / 2, 8, 8))


def test_places_are_those_of_the_pictures_own_shape_and_tell_all_patches_apart() -> None:
    for rows, columns in ((8, 8), (4, 16), (16, 4)):
        found = places(centres(rows, columns, torch.device("cpu")), rows, columns)
        distances = torch.cdist(found, found) + 10 * torch.eye(rows * columns)
        assert distances.min() > 0.05
    wide = centres(4, 16, torch.device("cpu"))
    assert wide[:, 1].max() / math.sqrt(64) == pytest.approx(7.5 / 8), "further to the right than a square reaches"


def test_a_wide_picture_is_not_its_own_transpose() -> None:
    """Rows and columns are told apart: the network that ignores positions would give the same numbers, turned."""
    network, z = transformer(), normal(2, 3, 8, 16)
    across = network(z.mT.contiguous(), LEVELS, conditions()).mT
    assert (network(z, LEVELS, conditions()) - across).abs().max() > 1e-2


# --- settings, and the rest of the package ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"head_dim": 12}, "head_dim 12 does not divide width 16"),
        ({"head_dim": 2}, "head_dim 2 must be a multiple of 4"),
        ({"embedding_dim": 15}, "embedding_dim 15 must be even"),
    ],
)
def test_settings_that_do_not_fit_are_named(changes: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TransformerConfig(**{**TINY, **changes})


def test_nothing_in_the_package_but_one_union_names_the_transformer() -> None:
    """An architecture is one file and one line: no other file has its names, or the word that settings give it."""
    own = PACKAGE / "models" / "transformer.py"
    names = {node.name for node in ast.walk(ast.parse(own.read_text())) if isinstance(node, ast.ClassDef)}
    assert "TransformerConfig" in names
    knowing = set()
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            words = {getattr(node, "id", None), getattr(node, "attr", None), getattr(node, "name", None)}
            words |= {node.value} if isinstance(node, ast.Constant) and isinstance(node.value, str) else set()
            words |= {str(node.module).rpartition(".")[2]} if isinstance(node, ast.ImportFrom) else set()
            if words & (names | {"transformer"}):
                knowing.add(path.relative_to(PACKAGE).as_posix())
    assert knowing == {"models/transformer.py", "config/stage.py"}
