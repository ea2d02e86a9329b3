"""Span corruption (Raffel et al. 2020, section 3.1.4): the encoder's input and the decoder's target."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from text_encoder.vocabulary import EOS, PAD, SENTINELS, UNK

Pair = tuple[list[int], list[int]]  # the encoder's input, the decoder's target


def partition(total: int, parts: int, rng: np.random.Generator) -> list[int]:
    """`parts` positive lengths that sum to `total`, every such split equally likely."""
    cuts = np.sort(rng.choice(total - 1, parts - 1, replace=False)) + 1
    return np.diff([0, *cuts.tolist(), total]).tolist()


def corrupt(ids: Sequence[int], rate: float, mean_span: int, first_sentinel: int, rng: np.random.Generator) -> Pair:
    """Replace spans by sentinels; the answer lists each sentinel with what it hides.

    ids: at least two tokens, without </s>. At least one span of the mean length is hidden, since 15 % of
    a short caption is less than a word, and at least one token is always kept.
    """
    hidden = min(max(mean_span, round(rate * len(ids))), len(ids) - 1)
    spans = max(1, min(round(hidden / mean_span), len(ids) - hidden, SENTINELS))
    hidden_lengths = partition(hidden, spans, rng)
    # One gap before each span and one after the last; only the outer two may be empty.
    gaps = np.array(partition(len(ids) - hidden + 2, spans + 1, rng))
    gaps[[0, -1]] -= 1
    source: list[int] = []
    answer: list[int] = []
    position = 0
    for i, (gap, length) in enumerate(zip(gaps[:-1].tolist(), hidden_lengths, strict=True)):
        start = position + gap
        source += [*ids[position:start], first_sentinel + i]
        position = start + length
        answer += [first_sentinel + i, *ids[start:position]]
    return [*source, *ids[position:], EOS], [*answer, EOS]


def collate(pairs: Sequence[Pair]) -> dict[str, torch.Tensor]:
    """Pad sources with <pad> and answers with -100, the label that the loss ignores."""
    width = max(len(source) for source, _ in pairs)
    answer_width = max(len(answer) for _, answer in pairs)
    ids = torch.tensor([source + [PAD] * (width - len(source)) for source, _ in pairs])
    labels = torch.tensor([answer + [-100] * (answer_width - len(answer)) for _, answer in pairs])
    return {"input_ids": ids, "attention_mask": (ids != PAD).long(), "labels": labels}


def batches(
    captions: Sequence[list[int]],
    batch_size: int,
    rate: float,
    mean_span: int,
    first_sentinel: int,
    rng: np.random.Generator,
) -> Iterator[dict[str, torch.Tensor]]:
    """Endless batches of captions of similar length, to limit padding: shuffle, sort within pools of
    32 batches, corrupt again in each epoch."""
    pool_size = 32 * batch_size
    while True:
        order = rng.permutation(len(captions))
        for pool in (order[i : i + pool_size] for i in range(0, len(order), pool_size)):
            by_length = sorted(pool.tolist(), key=lambda index: len(captions[index]))
            starts = rng.permutation(range(0, len(by_length), batch_size))
            for chosen in (by_length[start : start + batch_size] for start in starts.tolist()):
                yield collate([corrupt(captions[i], rate, mean_span, first_sentinel, rng) for i in chosen])


def bag_of_words(batch: dict[str, Tensor], vocab_size: int, first_sentinel: int) -> Tensor:
    """(B, vocab_size): for each caption, hidden tokens included, the share of each of its tokens."""
    tokens = torch.cat([batch["input_ids"], batch["labels"].clamp(min=0)], dim=1)
    bag = torch.zeros(len(tokens), vocab_size).scatter_add_(1, tokens, torch.ones(tokens.shape))
    bag[:, : UNK + 1] = 0
    bag[:, first_sentinel:] = 0
    return bag / bag.sum(1, keepdim=True).clamp(min=1)


def words_loss(states: Tensor, mask: Tensor, words: torch.nn.Linear, embedding: Tensor, bag: Tensor) -> Tensor:
    """Cross-entropy of all words of the caption, predicted from the mean of the encoder's states.

    With span corruption alone the states collapse to the decoder's grammar (see `build_model`), but a drawing network
    must distinguish words. The words are scored with the encoder's input embedding, held fixed here, because a separate
    output layer would have to learn each rare word from a few examples.
    """
    normalized = torch.nn.functional.layer_norm(states.float(), states.shape[-1:])
    mean = (normalized * mask[:, :, None]).sum(1) / mask.sum(1, keepdim=True)
    return -(bag * torch.log_softmax(words(mean) @ embedding.detach().T, dim=1)).sum(1).mean()
