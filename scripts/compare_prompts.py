"""Influence of the prompt on a super-resolution stage: the same smaller pictures with four texts.

    python scripts/compare_prompts.py STAGE --data data/test-256.parquet --text-encoder ENCODER

Texts: the picture's own caption; that caption with the next drawing style; another picture's caption; none. Figures
as in docs/super-resolution.md, means over held-out pictures; `changed` is the mean absolute difference from the
picture drawn with its own caption, and `where it changed most` that of the hundredth of pixels that changed most, both
in 1/255.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import click
import torch
from compare_super_resolution import drawn
from torch import Tensor

from cascade.drawing.engine import Engine
from cascade.evaluation.super_resolution import measure, read_pairs
from cascade.evaluation.tower import load_tower
from cascade.storage.pipeline import load_encoder
from cascade.storage.stage import load_stage

STYLES = ("noto", "twemoji", "fluent flat", "fluent color", "fluent 3d", "fluent mono")
FIGURES = ("PSNR", "SSIM", "edge strength", "consistency")


def other_style(caption: str) -> str:
    """`lemon, noto style` as `lemon, twemoji style`: the next style of the list."""
    for style, following in zip(STYLES, (*STYLES[1:], STYLES[0]), strict=True):
        if caption.endswith(f"{style} style"):
            return caption.removesuffix(f"{style} style") + f"{following} style"
    raise click.ClickException(f"{caption!r}: ends in none of the styles {', '.join(STYLES)}")


def difference(picture: Tensor, own: Tensor) -> tuple[float, float]:
    """Mean absolute difference in 1/255: of all pixels, and of the hundredth that differs most."""
    each = (picture - own).abs().flatten() * 127.5
    return each.mean().item(), each.topk(max(1, len(each) // 100)).values.mean().item()


@click.command()
@click.argument("path")
@click.option("--data", required=True, help="Parquet file of held-out pictures.")
@click.option("--text-encoder", required=True, help="Folder of the encoder that the stage was trained with.")
@click.option("--count", default=24, show_default=True, help="Pictures.")
def main(path: str, data: str, text_encoder: str, count: int) -> None:
    """Print the table."""
    stage, encoder, tower = load_stage(path), load_encoder(text_encoder, [Path(path)]), load_tower()
    config = stage.config
    if config.low_resolution is None:
        raise click.ClickException(f"{path}: a base stage; name a super-resolution stage")
    pairs = read_pairs(Path(data), (config.resolution, config.low_resolution), count, seed=0)
    engine = Engine(encoder.encode, torch.device("cpu"))
    own = drawn(engine, stage, pairs, [pair.caption for pair in pairs])
    ways: dict[str, Callable[[int], str]] = {
        "its own caption": lambda index: pairs[index].caption,
        "another style": lambda index: other_style(pairs[index].caption),
        "another picture's": lambda index: pairs[index - 1].caption,
        "none": lambda _index: "",
    }
    columns = ("text", *FIGURES, "changed", "where it changed most")
    print(f"{len(pairs)} pictures of {data}\n\n| " + " | ".join(columns) + " |")
    print("| --- |" + " ---: |" * (len(columns) - 1))
    for name, text in ways.items():
        pictures = drawn(engine, stage, pairs, [text(index) for index in range(len(pairs))])
        found = [measure(picture, pair, tower) for picture, pair in zip(pictures, pairs, strict=True)]
        means = [sum(each[key] for each in found) / len(found) for key in FIGURES]
        changes = [difference(picture, before) for picture, before in zip(pictures, own, strict=True)]
        means += torch.tensor(changes).mean(dim=0).tolist()
        print(f"| {name} | " + " | ".join(f"{mean:.3f}" for mean in means) + " |", flush=True)


if __name__ == "__main__":
    main()
