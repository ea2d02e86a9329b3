"""Weights that a folder holds in several precisions, as on the hub: only one precision is read."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

HALVES = ("bf16", "fp16")
"""The part of a file's name between dots that marks half precision; the preferred one first."""


def one_variant(files: Iterable[Path]) -> list[Path]:
    """The files in full precision; if there are none, those of one half precision."""
    files = list(files)
    by_variant = {variant: [file for file in files if variant_of(file) == variant] for variant in (None, *HALVES)}
    return next((found for found in by_variant.values() if found), [])


def variant_of(file: Path) -> str | None:
    """`bf16` or `fp16`, from the file's name; None: full precision."""
    return next((variant for variant in HALVES if f".{variant}" in file.name), None)
