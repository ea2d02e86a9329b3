"""The encoder, its temporary decoder, and the training of both."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import click
import numpy as np
import torch
from torch import Tensor

from text_encoder.corruption import bag_of_words, batches, collate, corrupt, words_loss
from text_encoder.distillation import Lesson, Lessons, teaching_loss
from text_encoder.scene_reading import Reading, reading_head, reading_loss
from text_encoder.vocabulary import EOS, PAD, SENTINELS


@dataclass(frozen=True)
class Sizes:
    """The encoder's shape in T5 v1.1's terms, and the depth of the temporary decoder."""

    vocab_size: int
    d_model: int
    d_kv: int
    num_heads: int
    d_ff: int
    num_layers: int
    num_decoder_layers: int


@dataclass(frozen=True)
class Recipe:
    """Length and rates of training: the run ends at `steps` or after `minutes`, whichever is first."""

    steps: int | None
    minutes: float | None
    batch_size: int
    learning_rate: float
    embedding_rate: float
    warmup_steps: int
    corruption: float
    mean_span: int
    words_weight: float
    lesson_size: int
    lesson_words_weight: float
    reading_size: int
    reading_weight: float
    scenes: int
    seed: int

    def progress(self, step: int, started: float) -> float:
        """The elapsed share of the run; may exceed 1."""
        by_steps = step / self.steps if self.steps else 0.0
        by_clock = (time.monotonic() - started) / (60 * self.minutes) if self.minutes else 0.0
        return max(by_steps, by_clock)


def build_model(sizes: Sizes) -> Any:
    """T5 v1.1: gated GELU, no biases, relative positions shared by all layers; no dropout."""
    from transformers import T5Config, T5ForConditionalGeneration

    model = T5ForConditionalGeneration(
        T5Config(
            **asdict(sizes),
            feed_forward_proj="gated-gelu",
            tie_word_embeddings=False,  # here: the decoder's output is not scaled
            dropout_rate=0.0,
            pad_token_id=PAD,
            eos_token_id=EOS,
            decoder_start_token_id=PAD,
        )
    )
    # transformers 5 ties the output layer to the embedding whatever the config says; T5 v1.1 has its own.
    # After 350 steps, one seed each, held-out loss was 1.31 with its own, 1.36 tied, and the effective rank
    # of 531 one-token captions 47 against 23 (of 192): words are easier to tell apart.
    model.lm_head = torch.nn.Linear(sizes.d_model, sizes.vocab_size, bias=False)
    torch.nn.init.normal_(model.lm_head.weight, std=sizes.d_model**-0.5)
    torch.nn.init.normal_(model.shared.weight, std=0.5)
    return model


@torch.no_grad()
def start_from_meanings(model: Any, rows: Sequence[int], meanings: Tensor, directions: tuple[Tensor, Tensor]) -> None:
    """Initialize as a bag of words: the state of a word is the teacher's embedding of it, unchanged by the layers.

    rows: N token ids. meanings: (N, D), the teacher's embeddings of their words. directions: its mean and principal
    directions, (D,) and (D, d_model). A word that occurs ten times in training cannot move its embedding far, so it
    starts at the target; the layers start by adding zero, since they would otherwise hide it.
    """
    mean, axes = directions
    projected = (meanings.float() - mean) @ axes
    model.shared.weight[list(rows)] = projected / projected.std()
    model.shared.weight[EOS] = 0
    for block in model.encoder.block:
        block.layer[0].SelfAttention.o.weight.zero_()
        block.layer[1].DenseReluDense.wo.weight.zero_()


@torch.no_grad()
def meaning_head(directions: tuple[Tensor, Tensor]) -> torch.nn.Linear:
    """From the states of `start_from_meanings` back to the teacher's embeddings: d_model -> D."""
    mean, axes = directions
    head = torch.nn.Linear(axes.shape[1], axes.shape[0])
    head.weight.copy_(axes)
    head.bias.copy_(mean)
    return head


@torch.no_grad()
def held_out_loss(model: Any, captions: Sequence[list[int]], recipe: Recipe, first_sentinel: int) -> float:
    """Mean loss per hidden token on captions never trained on, corrupted alike at every call."""
    rng = np.random.default_rng(0)
    total, tokens = 0.0, 0
    ordered = sorted(captions, key=len)
    for start in range(0, len(ordered), 256):
        batch = collate(
            [
                corrupt(ids, recipe.corruption, recipe.mean_span, first_sentinel, rng)
                for ids in ordered[start : start + 256]
            ]
        )
        count = int((batch["labels"] != -100).sum())
        total += float(model(**batch).loss) * count
        tokens += count
    return total / tokens


def caption_losses(
    model: Any, batch: dict[str, Tensor], words: torch.nn.Linear, first_sentinel: int
) -> dict[str, Tensor]:
    """Losses of a batch of corrupted captions: hidden tokens, and words of the caption."""
    with torch.autocast("cpu", torch.bfloat16):  # 0.26 instead of 0.41 s a step on one core
        output = model(**batch)
    bag = bag_of_words(batch, model.config.vocab_size, first_sentinel)
    states, mask = output.encoder_last_hidden_state, batch["attention_mask"]
    return {"loss": output.loss, "words": words_loss(states, mask, words, model.shared.weight, bag)}


def lesson_loss(model: Any, lesson: Lesson, head: torch.nn.Linear, word_weight: float) -> Tensor:
    """Loss of a batch of texts against the teacher's embeddings."""
    with torch.autocast("cpu", torch.bfloat16):
        states = model.encoder(input_ids=lesson.ids, attention_mask=lesson.mask).last_hidden_state
    return teaching_loss(states, lesson, head, word_weight)


def scene_loss(model: Any, reading: Reading, head: torch.nn.Linear) -> Tensor:
    """Loss of the objects' attributes, predicted from the states of their words."""
    with torch.autocast("cpu", torch.bfloat16):
        states = model.encoder(input_ids=reading.ids, attention_mask=reading.mask).last_hidden_state
    return reading_loss(states, reading, head)


def build_optimizer(model: Any, heads: torch.nn.ModuleDict, recipe: Recipe) -> tuple[torch.optim.Optimizer, Any]:
    """AdamW and its schedule, a function of the step's number and the run's progress that sets the learning rates.

    The embedding has a higher rate than the rest, since a row is trained only when its piece occurs.
    """
    embedding = model.shared.weight
    others = [each for each in [*model.parameters(), *heads.parameters()] if each is not embedding]
    optimizer = torch.optim.AdamW([{"params": others}, {"params": [embedding]}], 0.0, (0.9, 0.98), weight_decay=0.01)

    def schedule(step: int, progress: float) -> None:
        rate = recipe.learning_rate * min(1.0, (step + 1) / recipe.warmup_steps) * (1 - progress)
        for group, factor in zip(optimizer.param_groups, (1.0, recipe.embedding_rate), strict=True):
            group["lr"] = rate * factor

    return optimizer, schedule


def train(
    model: Any,
    training: Sequence[list[int]],
    held_out: Sequence[list[int]],
    lessons: Lessons | None,
    scenes: Iterator[Reading] | None,
    recipe: Recipe,
) -> dict[str, float]:
    """AdamW with linear warm-up and linear decay to zero. Returns the run's values for training.json.

    training, held_out: captions as token ids, to corrupt. lessons: texts of the teacher. scenes: batches of scenes.
    """
    first_sentinel = model.config.vocab_size - SENTINELS
    rng = np.random.default_rng(recipe.seed)
    width = model.config.d_model
    heads = torch.nn.ModuleDict({"words": torch.nn.Linear(width, width)})  # discarded after training
    if lessons:
        heads["teacher"] = meaning_head(lessons.directions)
    if scenes:
        heads["reading"] = reading_head(width)
    optimizer, schedule = build_optimizer(model, heads, recipe)
    stream = batches(training, recipe.batch_size, recipe.corruption, recipe.mean_span, first_sentinel, rng)
    lesson_stream = lessons.batches(recipe.lesson_size, rng) if lessons else None
    smoothed: dict[str, float] = {}
    step, started = 0, time.monotonic()
    while (progress := recipe.progress(step, started)) < 1:
        schedule(step, progress)
        losses = caption_losses(model, next(stream), heads["words"], first_sentinel)
        total = losses["loss"] + recipe.words_weight * losses["words"]
        if lesson_stream:
            losses["teacher"] = lesson_loss(model, next(lesson_stream), heads["teacher"], recipe.lesson_words_weight)
            total = total + losses["teacher"]
        if scenes:
            losses["reading"] = scene_loss(model, next(scenes), heads["reading"])
            total = total + recipe.reading_weight * losses["reading"]
        total.backward()
        torch.nn.utils.clip_grad_norm_([each for group in optimizer.param_groups for each in group["params"]], 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        for name, loss in losses.items():
            smoothed[name] = 0.98 * smoothed.get(name, loss.item()) + 0.02 * loss.item()
        step += 1
        if step % 100 == 0:
            click.echo(f"step {step}  {progress:4.0%}  " + "  ".join(f"{k} {v:.3f}" for k, v in smoothed.items()))
    seconds = time.monotonic() - started
    final = held_out_loss(model, held_out, recipe, first_sentinel)
    click.echo(f"step {step}  held-out loss {final:.3f}  {seconds:.0f} s")
    return {"steps_done": step, "seconds": seconds, **smoothed, "held_out_loss": final}
