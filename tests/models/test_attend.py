"""Softmax attention is the same with every algorithm."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from cascade.models import attention as module
from cascade.models.attention import attend

MANY = (2, 3, 256, 16)
"""(B, heads, M, d): with 333 keys enough scores to be taken head by head."""


def inputs(*query: int, keys: int = 333) -> tuple[Tensor, Tensor, Tensor]:
    rng = torch.Generator().manual_seed(0)
    batch, heads, _, width = query
    shapes = (query, (batch, heads, keys, width), (batch, heads, keys, width))
    one, two, three = (torch.randn(*shape, generator=rng).bfloat16() for shape in shapes)
    return one, two, three


def error(ours: Tensor, exact: Tensor) -> float:
    return float((ours.double() - exact).square().mean().sqrt() / exact.square().mean().sqrt())


def hidden_keys() -> Tensor:
    """(2, 1, 1, 333): the first picture sees 100 keys, the second all."""
    return (torch.arange(333) < torch.tensor([100, 333])[:, None])[:, None, None, :]


@pytest.mark.parametrize("hidden", [False, True])
@torch.inference_mode()
def test_attention_head_by_head_is_attention(hidden: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    query, key, value = inputs(*MANY)
    mask = hidden_keys() if hidden else None
    exact = F.scaled_dot_product_attention(query.double(), key.double(), value.double(), attn_mask=mask)
    fused = attend(query[:, :, :1], key, value)  # so few scores are left to torch
    assert torch.equal(fused, F.scaled_dot_product_attention(query[:, :, :1], key, value))
    monkeypatch.setattr(module.F, "scaled_dot_product_attention", None)  # from here on it is not asked
    assert error(attend(query, key, value, mask), exact) < 4 * 2**-9  # scores, their weights and the answer are rounded


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("hidden", [False, True])
@pytest.mark.parametrize("queries", [16, 512])
def test_the_gradient_is_that_of_torch_in_float64(
    queries: int, hidden: bool, autocast: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = [part.requires_grad_() for part in inputs(2, 3, queries, 16)]
    doubles = [part.detach().double().requires_grad_() for part in parts]
    mask, upstream = hidden_keys() if hidden else None, inputs(2, 3, queries, 16)[0].flip(2)
    F.scaled_dot_product_attention(*doubles, attn_mask=mask).backward(upstream.double())
    monkeypatch.setattr(module.F, "scaled_dot_product_attention", None)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        answer = attend(*parts, mask)
    assert answer.dtype == torch.bfloat16
    assert (type(answer.grad_fn).__name__ == "_HeadByHeadBackward") == (queries == 512)
    answer.backward(upstream)
    for part, double in zip(parts, doubles, strict=True):
        assert part.grad is not None
        assert double.grad is not None
        assert error(part.grad, double.grad) < 8 * 2**-9  # a chain of four roundings and sums of them
