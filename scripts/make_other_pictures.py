"""Folders of example pictures that are not 8-bit RGB: transparent sprites, gray of 16 bits, four spectral bands."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import tifffile
from PIL import Image

Array: TypeAlias = np.ndarray[Any, Any]
Made: TypeAlias = tuple[Array, str]

SIDE = 64
_FINE = 4
"""Points per pixel and axis at which a shape is sampled, so that its edge is soft."""

COLOURS = {"red": (214, 40, 40), "green": (46, 150, 70), "blue": (40, 90, 210), "yellow": (240, 200, 40)}
SHAPES: dict[str, Callable[[Array, Array], Array]] = {
    "disc": lambda x, y: x**2 + y**2 < 1,
    "square": lambda x, y: np.maximum(abs(x), abs(y)) < 0.85,
    "diamond": lambda x, y: abs(x) + abs(y) < 1,
    "ring": lambda x, y: (x**2 + y**2 < 1) & (x**2 + y**2 > 0.35),
}
LAND = {
    "water": (900, 700, 400, 200),
    "forest": (300, 500, 350, 4200),
    "wheat": (800, 1200, 1900, 3000),
    "sand": (1800, 2400, 3000, 3600),
}
"""Reflectance times 10,000 in blue, green, red and near infrared, about as satellites measure it."""


def coverage(shape: str, rng: np.random.Generator, least: float = 0.5, most: float = 0.8) -> Array:
    """The share of each pixel that a shape of random place and size covers, (SIDE, SIDE) in [0, 1]."""
    radius = rng.uniform(least, most)
    places = (np.arange(SIDE * _FINE) + 0.5) / (SIDE * _FINE) * 2 - 1
    shift_x, shift_y = rng.uniform(-(1 - radius), 1 - radius, 2)
    x, y = np.meshgrid((places - shift_x) / radius, (places - shift_y) / radius)
    inside = SHAPES[shape](x, y).astype(np.float64)
    return inside.reshape(SIDE, _FINE, SIDE, _FINE).mean(axis=(1, 3))


def sprite(rng: np.random.Generator) -> Made:
    """RGBA of 8 bits: one shape of one colour, lighter at the top, on nothing."""
    colour, shape = rng.choice(list(COLOURS)), rng.choice(list(SHAPES))
    light = np.linspace(1.15, 0.85, SIDE)[:, None, None]
    alpha = coverage(shape, rng)[..., None]
    colours = (np.array(COLOURS[colour]) * light).clip(0, 255) * np.ones((SIDE, SIDE, 1)) * (alpha > 0)
    return np.concatenate((colours, alpha * 255), axis=2).round().astype(np.uint8), f"a {colour} {shape}"


def gray(rng: np.random.Generator) -> Made:
    """Gray of 16 bits: a bright or faint shape over a slow ramp, whose steps 8 bits could not hold."""
    strength = rng.choice(["bright", "faint"])
    shape = rng.choice(list(SHAPES))
    ramp = np.linspace(8000, 12000, SIDE)[None, :] * np.ones((SIDE, 1))
    values = ramp + coverage(shape, rng) * (40000 if strength == "bright" else 6000)
    return values.round().astype(np.uint16), f"a {strength} {shape}"


def land(rng: np.random.Generator) -> Made:
    """Four bands of 16 bits: a patch of one kind of land within another, with a little noise."""
    inner, outer = rng.choice(list(LAND), 2, replace=False)
    share = coverage(rng.choice(["disc", "square"]), rng)[..., None]
    values = share * np.array(LAND[inner]) + (1 - share) * np.array(LAND[outer])
    values *= 1 + 0.03 * rng.standard_normal((SIDE, SIDE, 1))
    return values.clip(0, 65535).round().astype(np.uint16), f"{inner} in {outer}"


KINDS: dict[str, Callable[[np.random.Generator], Made]] = {"sprites": sprite, "gray": gray, "bands": land}


def main() -> None:
    """Write the pictures of one kind with their captions."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kind", choices=list(KINDS))
    parser.add_argument("out", type=Path, help="folder to write")
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(given.seed)
    for number in range(given.count):
        pixels, caption = KINDS[given.kind](rng)
        if given.kind == "bands":
            tifffile.imwrite(given.out / f"{number:05d}.tif", pixels, photometric="minisblack", compression="zlib")
        else:
            Image.fromarray(pixels).save(given.out / f"{number:05d}.png")
        (given.out / f"{number:05d}.txt").write_text(caption + "\n")


if __name__ == "__main__":
    main()
