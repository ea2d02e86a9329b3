"""Weights that lie in a folder several times, in several precisions, as on the hub: one of them is read."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

HALVES = ("bf16", "fp16")
"""What stands between dots in the names of files in half precision, the better one first."""


def one_variant(files: Iterable[Path]) -> list[Path]:
    """The files in full precision; where there are none, those of one half precision."""
    files = list(files)
    by_variant = {variant: [file for file in files if variant_of(file) == variant] for variant in (None, *HALVES)}
    return next((found for found in by_variant.values() if found), [])


def variant_of(file: Path) -> str | None:
    """`bf16` or `fp16` as its name says; None: full precision."""
    return next((variant for variant in HALVES if f".{variant}" in file.name), None)
