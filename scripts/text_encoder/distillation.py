"""Distillation from the teacher: of whole texts into the mean state, of each word into its own states."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, log_softmax, normalize, softmax

from text_encoder.texts import Text
from text_encoder.vocabulary import EOS, PAD, normalizer

TEMPERATURE = 0.05  # of similarities: within a batch of texts a cosine difference of 0.05 counts


@dataclass(frozen=True)
class Lesson:
    """A batch: token ids and mask (B, L); `word_of` (B, L) numbers the batch's words from 1, 0 for none;
    `meanings` (B, D) of the texts, `word_meanings` (W, D) of the words."""

    ids: Tensor
    mask: Tensor
    word_of: Tensor
    meanings: Tensor
    word_meanings: Tensor


class Lessons:
    """Texts as tokens with the teacher's embedding of each text, and of each word that is a text itself."""

    def __init__(
        self,
        texts: Sequence[Text],
        meanings: dict[str, int],
        embeddings: Tensor,
        tokenizer: Any,
        directions: tuple[Tensor, Tensor],
    ) -> None:
        """meanings: text -> row of `embeddings`, (N, D), of length 1, with their `principal_directions`."""
        self.embeddings, self.directions = embeddings, directions
        self.rows = [meanings[meaning] for _, meaning in texts]
        self.ids = tokenizer([text for text, _ in texts], add_special_tokens=False)["input_ids"]
        pieces = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
        self.starts_word = np.array([piece.startswith("▁") for piece in pieces])
        normalize_text = normalizer().normalize_str
        self.words = [
            [meanings.get(word.strip(",.!?()'\""), -1) for word in normalize_text(meaning).split(" ")]
            for _, meaning in texts
        ]

    def batches(self, batch_size: int, rng: np.random.Generator) -> Iterator[Lesson]:
        """Endless batches of texts of similar length, in a new order each epoch."""
        pool_size = 16 * batch_size
        while True:
            order = rng.permutation(len(self.ids))
            for pool in (order[i : i + pool_size] for i in range(0, len(order), pool_size)):
                by_length = sorted(pool.tolist(), key=lambda index: len(self.ids[index]))
                starts = rng.permutation(range(0, len(by_length), batch_size))
                yield from (self.lesson(by_length[start : start + batch_size]) for start in starts.tolist())

    def lesson(self, chosen: Sequence[int]) -> Lesson:
        """The texts with these indices as one batch."""
        width = max(len(self.ids[i]) for i in chosen) + 1
        ids = torch.full((len(chosen), width), PAD)
        word_of = torch.zeros(len(chosen), width, dtype=torch.long)
        rows: list[int] = []
        for place, i in enumerate(chosen):
            length = len(self.ids[i])
            ids[place, : length + 1] = torch.tensor([*self.ids[i], EOS])
            ordinal = np.cumsum(self.starts_word[self.ids[i]]) - 1
            number = np.zeros(len(self.words[i]), dtype=np.int64)
            for word, row in enumerate(self.words[i]):
                if row >= 0:
                    rows.append(row)
                    number[word] = len(rows)
            word_of[place, :length] = torch.from_numpy(number[ordinal])
        meanings = self.embeddings[[self.rows[i] for i in chosen]].float()
        return Lesson(ids, (ids != PAD).long(), word_of, meanings, self.embeddings[rows].float())


def text_mean(states: Tensor, mask: Tensor) -> Tensor:
    """(B, L, d) -> (B, d): the mean of the states without padding, including </s>."""
    return (states.float() * mask[:, :, None]).sum(1) / mask.sum(1, keepdim=True)


def word_means(states: Tensor, word_of: Tensor, words: int) -> Tensor:
    """(B, L, d) -> (words, d): the mean of each word's states."""
    flat, number = states.float().flatten(0, 1), word_of.flatten()
    sums = torch.zeros(words + 1, flat.shape[1]).index_add(0, number, flat)
    counts = torch.zeros(words + 1).index_add(0, number, torch.ones(len(number)))
    return (sums / counts.clamp(min=1)[:, None])[1:]


def similarity_loss(ours: Tensor, theirs: Tensor) -> Tensor:
    """Cross-entropy of each text's neighbours in the batch with the teacher's: (B, d), (B, D) -> scalar.

    Computed on the states themselves instead of a discarded layer's output, so that the shipped encoder learns it.
    """
    own = torch.eye(len(ours), dtype=torch.bool)
    ours, theirs = normalize(ours, dim=1), normalize(theirs, dim=1)
    truth = softmax((theirs @ theirs.T / TEMPERATURE).masked_fill(own, -1e4), dim=1)
    return -(truth * log_softmax((ours @ ours.T / TEMPERATURE).masked_fill(own, -1e4), dim=1)).sum(1).mean()


def teaching_loss(states: Tensor, lesson: Lesson, head: torch.nn.Linear, word_weight: float) -> Tensor:
    """Sum of: 1 - cosine of the mean state behind `head` and the teacher's embedding; the contrast of that
    prediction with the batch's other texts; the similarities among the mean states; and the same cosine for each word.

    The last is needed because a drawing network attends to single states: the state of "red" must itself mean red.
    """
    mean = text_mean(states, lesson.mask)
    predicted = head(mean)
    cosine = cosine_similarity(predicted, lesson.meanings, dim=1)
    logits = normalize(predicted, dim=1) @ lesson.meanings.T / TEMPERATURE
    truth = softmax(lesson.meanings @ lesson.meanings.T / TEMPERATURE, dim=1)
    contrast = -(truth * log_softmax(logits, dim=1)).sum(1).mean()
    similarity = similarity_loss(mean, lesson.meanings)
    words = word_means(states, lesson.word_of, len(lesson.word_meanings))
    word_cosine = cosine_similarity(head(words), lesson.word_meanings, dim=1)
    return 2 * (1 - cosine).mean() + 0.3 * contrast + 0.3 * similarity + word_weight * (1 - word_cosine).mean()


def principal_directions(embeddings: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Mean (D,) and the `count` directions (D, count) of greatest variance of (N, D) embeddings."""
    mean = embeddings.mean(0)
    centred = embeddings - mean
    _, directions = torch.linalg.eigh(centred.T @ centred)
    return mean, directions[:, -count:].flip(1)
