"""Attention from each pixel of a feature map to all pixels and the text tokens, or to the text tokens alone.

`attend` is softmax attention. On a CPU in bfloat16 it uses plain matrix products, since torch's fused kernel is no
faster there than in float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from cascade.models.blocks import Normalize, zero_init

KeysValues = tuple[Tensor, Tensor]
"""Keys and values of the text, each (B, heads, N, d)."""


@runtime_checkable
class ReadsText(Protocol):
    """A layer with attention to the text, whose shares a trace shows."""

    def text_shares(self, *args: Any, **kwargs: Any) -> Tensor | None:
        """The share of each position's attention that each text token receives: (B, heads, positions, tokens).

        Arguments as for `forward`. None without text.
        """


class Attention(nn.Module):
    """Pixels are the queries, pixels and text tokens the keys and values; the result is added to the feature map.

    Source: Imagen (Saharia et al. 2022) sec. D.1: text is concatenated to the keys and values of self-attention.
    Without `sees_picture` the text provides all keys and values, as in Imagen's 1024 stage.
    """

    def __init__(
        self,
        channels: int,
        head_dim: int,
        text_dim: int | None,
        norm: str,
        groups: int,
        sees_picture: bool = True,
    ) -> None:
        super().__init__()
        self.heads = channels // head_dim
        self.sees_picture = sees_picture
        self.norm = Normalize(channels, norm, groups)
        self.qkv = nn.Linear(channels, (3 if sees_picture else 1) * channels, bias=False)  # or the queries alone
        self.text_key_value = nn.Linear(text_dim, 2 * channels, bias=False) if text_dim else None
        self.out = zero_init(nn.Linear(channels, channels))

    def read_text(self, text: Tensor) -> KeysValues | None:
        """Keys and values of normalized text (B, N, D); they do not depend on the picture."""
        if self.text_key_value is None:
            return None
        key, value = self.text_key_value(text).unflatten(-1, (2 * self.heads, -1)).transpose(1, 2).chunk(2, dim=1)
        return key, value

    def forward(self, h: Tensor, text: KeysValues | None, visible: Tensor | None) -> Tensor:
        """h: (B, C, H, W); visible: (B, 1, 1, N) bool, None when every text token is real -> (B, C, H, W)."""
        batch, channels, height, width = h.shape
        query, *own = self._asked(h)
        answer = attend(query, *self._answers(own, text, visible))  # (B, heads, HW, d)
        update = self.out(answer.transpose(1, 2).flatten(2))  # (B, HW, C)
        return h + update.reshape(batch, height, width, channels).permute(0, 3, 1, 2)

    def text_shares(self, h: Tensor, text: KeysValues | None, visible: Tensor | None) -> Tensor | None:
        """The share of each pixel's attention that each text token receives: (B, heads, HW, N); None without text.

        Arguments as for `forward`.
        """
        if text is None:
            return None
        query, *own = self._asked(h)
        key, _, mask = self._answers(own, text, visible)
        return shares(query, key, slice(-text[0].shape[2], None), mask)

    def _asked(self, h: Tensor) -> tuple[Tensor, ...]:
        """Queries, and keys and values of the pixels where these answer, too: each (B, heads, HW, d)."""
        tokens = self.norm(h).permute(0, 2, 3, 1).flatten(1, 2)  # (B, HW, C)
        asked = self.qkv(tokens).unflatten(-1, (-1, h.shape[1] // self.heads)).transpose(1, 2)
        return asked.split(self.heads, dim=1)

    def _answers(
        self, own: Sequence[Tensor], text: KeysValues | None, visible: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Keys and values (B, heads, N, d), and the mask of visible ones. own: keys and values of the pixels, or []."""
        if not own:
            assert text is not None, "attention to neither the picture nor the text"
            return *text, None if visible is None else visible | ~visible.any(-1, keepdim=True)  # all if none is
        key, value = own
        if text is None:
            return key, value, None
        mask = None if visible is None else F.pad(visible, (key.shape[2], 0), value=True)  # pixels are always visible
        return torch.cat([key, text[0]], dim=2), torch.cat([value, text[1]], dim=2), mask


def shares(query: Tensor, key: Tensor, kept: slice, mask: Tensor | None = None) -> Tensor:
    """The share of each query's attention that the `kept` keys receive: (B, heads, M, kept). Arguments as for `attend`.

    Attention to rows of the identity matrix in place of the values.
    """
    rows = torch.eye(key.shape[2], dtype=key.dtype, device=key.device)[:, kept]
    return F.scaled_dot_product_attention(query, key, rows.expand(*key.shape[:2], -1, -1), attn_mask=mask)


FEW_QUERIES = 256
"""Up to this many queries, the scores of all heads are computed together."""
LEAST_SCORES, MOST_SCORES = 50_000, 8_000_000
"""Scores per head. Below this range torch's kernel is faster; above it the scores do not fit into the cache."""


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
    """softmax(q k^T / sqrt(d)) v for each head.

    query: (B, heads, M, d); key, value: (B, heads, N, d); mask: (B, 1, 1, N) bool, True where a key is visible, None
    when all are -> (B, heads, M, d).

    With 64 queries, the backward pass of torch's fused kernel takes four times as long as its forward pass; two plain
    products take a third of the two together. With 1,024 queries, head by head, both passes take seven tenths of
    torch's time. The gradient of the softmax is written out: torch's takes more than twice as long in bfloat16.
    """
    slow = query.device.type == "cpu" and query.dtype == torch.bfloat16 and not torch.compiler.is_compiling()
    moderate = LEAST_SCORES <= query.shape[2] * key.shape[2] <= MOST_SCORES
    if slow and query.requires_grad and query.shape[2] <= FEW_QUERIES:
        together: Tensor = _AllHeads.apply(query, key, value, mask)  # type: ignore[no-untyped-call]
        return together
    if slow and moderate:
        answer: Tensor = _HeadByHead.apply(query, key, value, mask)  # type: ignore[no-untyped-call]
        return answer
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask)


class _AllHeads(torch.autograd.Function):
    """Attention that computes the scores of all heads together and keeps them for the backward pass."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        with torch.autocast("cpu", enabled=False):  # autocast would compute the softmax in float32
            query = query * query.shape[-1] ** -0.5
            scores = _scores(query, key, mask)
            answer = scores @ value
        ctx.save_for_backward(query, key, value, scores, answer)
        return answer

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        query, key, value, scores, answer = ctx.saved_tensors
        along = (gradients[0] * answer).sum(-1, keepdim=True)
        to_query, to_key, to_value = _gradients(query, key, value, scores, gradients[0], along)
        return to_query * query.shape[-1] ** -0.5, to_key, to_value, None


class _HeadByHead(torch.autograd.Function):
    """Attention one head at a time; the backward pass recomputes the scores, as in flash attention (Dao 2022)."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        answer = torch.empty_like(query)
        query = query * query.shape[-1] ** -0.5
        with torch.autocast("cpu", enabled=False):  # autocast would compute the softmax in float32
            for one in _heads(query):
                answer[one] = _scores(query[one], key[one], None if mask is None else mask[one[0], 0]) @ value[one]
        ctx.save_for_backward(query, key, value, mask, answer)
        return answer

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        query, key, value, mask, answer = ctx.saved_tensors
        to_query, to_key, to_value = torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)
        along = (gradients[0] * answer).sum(-1, keepdim=True)  # (B, heads, M, 1)
        for one in _heads(query):
            scores = _scores(query[one], key[one], None if mask is None else mask[one[0], 0])
            to_query[one], to_key[one], to_value[one] = _gradients(
                query[one], key[one], value[one], scores, gradients[0][one], along[one]
            )
        return to_query * query.shape[-1] ** -0.5, to_key, to_value, None


def _heads(query: Tensor) -> list[tuple[int, int]]:
    """(picture, head) of every head in the batch."""
    return [(picture, head) for picture in range(query.shape[0]) for head in range(query.shape[1])]


def _scores(query: Tensor, key: Tensor, mask: Tensor | None) -> Tensor:
    """(..., M, d), (..., N, d) -> (..., M, N): softmax of the products of query and key."""
    products = query @ key.mT
    if mask is not None:
        products = products.masked_fill_(~mask, float("-inf"))
    return products.softmax(dim=-1)


def _gradients(
    query: Tensor, key: Tensor, value: Tensor, scores: Tensor, gradient: Tensor, along: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the scaled query, the key and the value. gradient: of the answer; along: (..., M, 1), its products
    with the answer, summed over d."""
    to_products = (gradient @ value.mT).sub_(along).mul_(scores)  # (..., M, N)
    return to_products @ key, to_products.mT @ query, scores.mT @ gradient
