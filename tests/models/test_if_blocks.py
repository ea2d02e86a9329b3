"""The parts of DeepFloyd IF's network that are computed in more than one way."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from cascade.models import if_blocks
from cascade.models.if_blocks import attend


@torch.inference_mode()
def test_attention_head_by_head_is_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(2, 3, count, 16, generator=rng).bfloat16() for count in (256, 333, 333))
    exact = F.scaled_dot_product_attention(query.double(), key.double(), value.double())
    fused = attend(query[:, :, :1], key, value)  # so few scores are left to torch
    assert torch.equal(fused, F.scaled_dot_product_attention(query[:, :, :1], key, value))
    monkeypatch.setattr(if_blocks.F, "scaled_dot_product_attention", None)  # from here on it is not asked
    ours = attend(query, key, value)
    error = (ours.double() - exact).square().mean().sqrt() / exact.square().mean().sqrt()
    assert error < 4 * 2**-9  # scores, their weights and the answer are rounded
