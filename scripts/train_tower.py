"""Train the judge of the art suite: an image tower, a text tower and a reader of styles, on the training split alone.

    python scripts/train_tower.py --data data --out cascade/pretrained/tower

Pictures and words of one concept are pulled together, those of different concepts pushed apart (CLIP, Radford et al.
2021, figure 3, with all pictures of one concept in a batch counted as right), and a temporary linear layer keeps the
style in the features. A separate shallow network learns to recognize the style. One thread, about ten minutes on one
core, with bit-reproducible results on one machine.
"""

from __future__ import annotations

import random
import time
from pathlib import Path

import click
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cascade._version import __version__
from cascade.evaluation.art_data import Art, Concept, read_art
from cascade.evaluation.tower import FEATURES, STYLES, StyleReader, Tower, buckets, save_tower
from cascade.pictures.images import WHITE, downsample, to_float

BATCH = 192
LEARNING_RATE = 2e-3
WEIGHT_DECAY = 0.05
SHIFT = 5  # largest shift of a picture in each direction, in pixels
WORD_DROPOUT = 0.3
STYLE_WEIGHT = 0.3
FEATURE_DROPOUT = 0.2
STYLE_BATCH, STYLE_LEARNING_RATE, STYLE_STEPS = 128, 3e-3, 3  # steps: per step of the towers
EARLY_SHARE, EARLY_RESOLUTION = 2 / 3, 32
"""The first steps use smaller pictures, for a quarter of the arithmetic; the network works at any size."""


def moved(pixels: Tensor, rng: torch.Generator) -> Tensor:
    """Each picture moved and resized a little over white: (B, 3, 64, 64) -> the same shape."""
    count = len(pixels)
    limit = 2 * SHIFT / pixels.shape[-1]
    shift = (2 * torch.rand(count, 2, generator=rng) - 1) * limit
    scale = 1 + 0.24 * (torch.rand(count, generator=rng) - 0.5)
    affine = torch.zeros(count, 2, 3)
    affine[:, 0, 0] = affine[:, 1, 1] = scale
    affine[:, :, 2] = shift
    grid = F.affine_grid(affine, list(pixels.shape), align_corners=False)
    # grid_sample pads with zero, so white must be zero here.
    return F.grid_sample(pixels - 1, grid, align_corners=False) + 1


def some_words(concept: Concept, rng: random.Random) -> list[int]:
    """Buckets of the name, or of the name and the keywords, some words left out."""
    text = concept.name if rng.random() < 0.5 else concept.words
    kept = [word for word in text.split() if rng.random() >= WORD_DROPOUT]
    return buckets(" ".join(kept) or text)


def contrast(tower: Tower, features: Tensor, concepts: list[Concept], rng: random.Random) -> Tensor:
    """Symmetric cross-entropy between pictures and words; every pair of one concept is right."""
    texts = F.normalize(tower.text([some_words(concept, rng) for concept in concepts]), dim=1)
    logits = tower.scale * F.normalize(tower.project(features), dim=1) @ texts.T
    number = {concept.key: index for index, concept in enumerate(concepts)}
    numbers = torch.tensor([number[concept.key] for concept in concepts])
    right = (numbers[:, None] == numbers[None, :]).float()
    right = right / right.sum(dim=1, keepdim=True)
    return (F.cross_entropy(logits, right) + F.cross_entropy(logits.T, right)) / 2


def train(art: Art, steps: int, seed: int) -> Tower:
    """A tower after `steps` batches; the learning rate rises over 5 % of them and falls to zero along a cosine."""
    torch.manual_seed(seed)
    tower = Tower().to(memory_format=torch.channels_last)
    hint = nn.Linear(FEATURES, len(STYLES))
    pixels, styles = to_float(art.pixels), style_numbers(art)
    trained = [*tower.image.parameters(), *tower.project.parameters(), *tower.text.parameters(), tower.log_scale]
    trained += hint.parameters()
    optimizer = torch.optim.AdamW(trained, LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps, pct_start=0.05)
    tensors, words = torch.Generator().manual_seed(seed), random.Random(seed)
    start = time.perf_counter()
    for step in range(steps):
        chosen = torch.randint(len(pixels), (BATCH,), generator=tensors)
        batch = moved(pixels[chosen], tensors)
        if step < EARLY_SHARE * steps:
            batch = downsample(batch, EARLY_RESOLUTION)
        batch = batch.contiguous(memory_format=torch.channels_last)
        features = F.dropout(tower.image(batch), FEATURE_DROPOUT)
        matched = contrast(tower, features, [art.concepts[index] for index in chosen.tolist()], words)
        styled = F.cross_entropy(hint(features), styles[chosen])
        optimizer.zero_grad()
        (matched + STYLE_WEIGHT * styled).backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        if step % 50 == 49:
            seconds = time.perf_counter() - start
            click.echo(f"step {step + 1}: words {matched:.3f}, style {styled:.3f}, {seconds:.0f} s")
    return tower.eval()


def style_numbers(art: Art) -> Tensor:
    """(N,): the style index of each picture."""
    return torch.tensor([STYLES.index(style) for style in art.styles])


def train_style(tower: Tower, art: Art, steps: int, seed: int) -> None:
    """Train the reader of styles. Pictures move by whole pixels, since interpolated edges would hide the style."""
    torch.manual_seed(seed)
    tower.style.load_state_dict(StyleReader().state_dict())
    reader = tower.style.train().to(memory_format=torch.channels_last)
    pixels = F.pad(art.pixels, (SHIFT, SHIFT, SHIFT, SHIFT), value=WHITE)
    styles, side = style_numbers(art), art.pixels.shape[-1]
    optimizer = torch.optim.AdamW(reader.parameters(), STYLE_LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, STYLE_LEARNING_RATE, total_steps=steps, pct_start=0.1)
    rng = torch.Generator().manual_seed(seed)
    for step in range(steps):
        chosen = torch.randint(len(pixels), (STYLE_BATCH,), generator=rng)
        corners = torch.randint(2 * SHIFT + 1, (STYLE_BATCH, 2), generator=rng).tolist()
        batch = torch.stack(
            [
                pixels[index, :, top : top + side, left : left + side]
                for index, (top, left) in zip(chosen.tolist(), corners, strict=True)
            ]
        )
        flipped = torch.rand(STYLE_BATCH, generator=rng) < 0.5
        batch[flipped] = batch[flipped].flip(-1)
        scores = reader(to_float(batch).contiguous(memory_format=torch.channels_last))
        loss = F.cross_entropy(scores, styles[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 50 == 49:
            click.echo(f"style step {step + 1}: {loss:.3f}")
    tower.eval()


@click.command(help="Train the tower that judges the art suite.")
@click.option("--data", required=True, help="Folder of scripts/prepare_data.py; only train-64-*.parquet is read.")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Folder for the weights.")
@click.option("--steps", default=800, show_default=True, help="Batches of the towers.")
@click.option("--seed", default=0, show_default=True)
def main(data: str, out: Path, steps: int, seed: int) -> None:
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    art = read_art(data, "train")
    tower = train(art, steps, seed)
    train_style(tower, art, STYLE_STEPS * steps, seed)
    facts = {"seed": seed, "steps": steps, "batch": BATCH, "data_sha256": art.digest, "cascade": __version__}
    save_tower(tower, out, facts)
    click.echo(f"{len(art.pixels)} pictures, {steps} steps; weights in {out}")


if __name__ == "__main__":
    main()
