"""Captioned pictures held in a device's memory, and batches cut from them there.

Reads the files of `pack_pictures.py`. During training the host reads, decodes and draws nothing.
"""

from __future__ import annotations

import io
import json
import multiprocessing
import os
import random
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from cascade.errors import CascadeError
from cascade.text.language import well_formed
from cascade.text.t5_files import check_folder, load_t5, quiet, tokenizer_folder

SIZE = 256
"""Side of the packed pictures."""
MOST_TOKENS = 40
"""Longer captions are cut; the bundled encoder accepts 64."""
CAPTIONS_OF_A_SCENE = 3
STYLED = 0.35
"""Share of the views under a picture's first caption, which names subject and style; the others share the rest."""


@dataclass(frozen=True)
class Words:
    """Embeddings of distinct texts. tokens: (T, MOST_TOKENS, D) float16; lengths: (T,). Row 0 is the null text."""

    tokens: Tensor
    lengths: Tensor

    def rows(self, which: Tensor) -> tuple[Tensor, Tensor]:
        """(B,) -> tokens (B, MOST_TOKENS, D) float32, mask (B, MOST_TOKENS)."""
        places = torch.arange(self.tokens.shape[1], device=which.device)
        return self.tokens[which].float(), places[None] < self.lengths[which][:, None]


@dataclass(frozen=True)
class Captions:
    """The texts of N pictures, as rows of `Words`: slices `first`, `count` of `rows`."""

    rows: Tensor
    first: Tensor
    count: Tensor

    def chosen(self, who: Tensor, chance: Tensor, dropout: float) -> Tensor:
        """A caption for each of `who` (B,), by uniform numbers chance (2, B); the null text with share `dropout`."""
        place = (chance[0] - STYLED).clamp(min=0) / (1 - STYLED) * self.count[who]
        row = self.rows[self.first[who] + place.long().clamp(max=self.count[who] - 1)]
        return torch.where(chance[1] < dropout, 0, row)


@dataclass(frozen=True)
class Art:
    """Pictures sorted by style. pixels: (N, 3, SIZE, SIZE) uint8; styles: the name of each.

    flips: (N,), may be mirrored. moves: (N,), has a white edge and may be moved about on white. bounds: (S,) cumulative
    shares of the styles; start, size: (S,), where each lies.
    """

    pixels: Tensor
    captions: Captions
    flips: Tensor
    moves: Tensor
    bounds: Tensor
    start: Tensor
    size: Tensor
    styles: tuple[str, ...]

    def pick(self, chance: Tensor) -> Tensor:
        """Indices of pictures from uniform numbers chance (2, B): first the style, then one of its pictures."""
        style = torch.searchsorted(self.bounds, chance[0].contiguous()).clamp(max=len(self.bounds) - 1)
        return self.start[style] + (chance[1] * self.size[style]).long()

    def zoomed(self, who: Tensor, size: int, generator: torch.Generator) -> Tensor:
        """(B, 3, size, size) in [-1, 1]: area means, mirrored and moved by chance where that is allowed.

        Zooms by 0.88 to 1.12 and shifts by up to 16 pixels of 256 happen before the picture is made small, so that
        edges stay as crisp as they are in an unmoved one.
        """
        device = who.device
        chance = torch.rand(5, len(who), device=device, generator=generator)
        moved = self.moves[who] & (chance[0] < 0.6)
        zoom = torch.where(moved, 0.88 + 0.24 * chance[1], 1.0)
        mirrored = torch.where(self.flips[who] & (chance[2] < 0.5), -1.0, 1.0)
        theta = torch.zeros(len(who), 2, 3, device=device)
        theta[:, 0, 0], theta[:, 1, 1] = mirrored / zoom, 1 / zoom
        theta[:, :, 2] = torch.where(moved, (chance[3:] - 0.5) * 32 / SIZE, 0.0).T
        x = self.pixels[who].float() / 127.5 - 2  # white is 0, which is what lies outside
        grid = F.affine_grid(theta, [len(who), 3, SIZE, SIZE], align_corners=False)
        x = F.grid_sample(x, grid, mode="bilinear", padding_mode="zeros", align_corners=False) + 1
        return F.avg_pool2d(x, SIZE // size)

    def cropped(self, who: Tensor, size: int, step: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """(B, 3, size, size) in [-1, 1] at offsets (2, B) that are multiples of `step`, and which are mirrored (B,).

        Not interpolated: edges are those of the pictures. Whole pictures are moved by up to 8 pixels where they may be.
        """
        device, count = who.device, len(who)
        if size < SIZE:
            offset = torch.randint((SIZE - size) // step + 1, (2, count), device=device, generator=generator) * step
        else:
            most = 8 // step
            offset = torch.randint(-most, most + 1, (2, count), device=device, generator=generator) * step
            offset = torch.where(self.moves[who][None], offset, 0)
        mirrored = self.flips[who] & (torch.rand(count, device=device, generator=generator) < 0.5)
        return mirror(cut(self.pixels, who, offset, size), mirrored).float() / 127.5 - 1, offset, mirrored


def cut(pictures: Tensor, who: Tensor, offset: Tensor, size: int) -> Tensor:
    """Squares of side `size` at offset (2, B) from pictures (N, C, H, H); edges are replicated."""
    lines, last = torch.arange(size, device=who.device), pictures.shape[-1] - 1
    rows = (offset[0][:, None] + lines).clamp(0, last)[:, None, :, None]
    columns = (offset[1][:, None] + lines).clamp(0, last)[:, None, None, :]
    channels = torch.arange(pictures.shape[1], device=who.device)[None, :, None, None]
    return pictures[who[:, None, None, None], channels, rows, columns]


def mirror(x: Tensor, mirrored: Tensor) -> Tensor:
    """The pictures (B, C, H, W), those of `mirrored` (B,) with left and right exchanged."""
    return torch.where(mirrored[:, None, None, None], x.flip(-1), x)


@dataclass(frozen=True)
class Scenes:
    """Drawn scenes, (M, 3, 64, 64) uint8, and their captions."""

    pixels: Tensor
    captions: Captions


@dataclass(frozen=True)
class Library:
    """All training data: art, scenes if any, and the words of their captions."""

    words: Words
    art: Art
    scenes: Scenes | None


@dataclass(frozen=True)
class Mixture:
    """Shares of the views of art, by style: unnamed styles share `rest`, styles with 0 are left out.

    scenes: number of drawn scenes.
    """

    shares: Mapping[str, float]
    rest: float = 1.0
    scenes: int = 0

    def of(self, styles: set[str]) -> dict[str, float]:
        """The share of each of the styles."""
        unnamed = sum(style not in self.shares for style in styles)
        return {style: self.shares.get(style, self.rest / max(unnamed, 1)) for style in styles}


def load(files: Sequence[Path], encoder: Path, device: torch.device, mixture: Mixture) -> Library:
    """Packed pictures and scenes on the device. encoder: folder of the text encoder.

    Raises CascadeError for a file that `pack_pictures.py` did not write, for pictures of another size, when no picture
    is left, and for a folder that is no text encoder.
    """
    check_folder(encoder)
    share, kept = _chosen(files, mixture)
    rows = [row for row, _ in kept]
    parts = [[blob for _, blob in kept[k : k + 128]] for k in range(0, len(kept), 128)]
    jobs = _jobs(mixture.scenes)
    with _workers(len(parts) + len(jobs)) as run:
        decoded, drawn = run(_decoded, parts), run(_drawn, jobs)
        pixels = torch.from_numpy(np.concatenate(list(decoded))).to(device)
        painted = list(drawn)
    spoken = [captions for _, own in painted for captions in own]
    texts = list(dict.fromkeys(text for own in [*(row["captions"] for row in rows), *spoken] for text in own))
    place = {text: number + 1 for number, text in enumerate(texts)}
    art = _art(rows, share, pixels, _captions([row["captions"] for row in rows], place, device))
    scenes = None
    if painted:
        shapes = torch.from_numpy(np.concatenate([part for part, _ in painted])).to(device)
        scenes = Scenes(shapes, _captions(spoken, place, device))
    return Library(embed(["", *texts], encoder, device), art, scenes)


@contextmanager
def _workers(parts: int) -> Iterator[Callable[..., Iterable[Any]]]:
    """`map` over processes; the built-in one for so few parts that starting processes would take longer."""
    if parts <= 4:
        yield map
        return
    # A fork would inherit the device.
    with ProcessPoolExecutor(os.cpu_count(), multiprocessing.get_context("spawn")) as pool:
        yield pool.map


Row = dict[str, Any]
"""style, captions, and whether the picture may be mirrored, as `pack_pictures.py` writes them."""


def _unpacked(file: Path) -> list[tuple[Row, bytes]]:
    try:
        with file.open("rb") as opened, np.load(opened) as packed:
            blob, ends = packed["blob"].tobytes(), packed["ends"].tolist()
            rows: list[Row] = json.loads(packed["rows"].tobytes())
        return list(zip(rows, (blob[a:b] for a, b in zip([0, *ends[:-1]], ends, strict=True)), strict=True))
    except NOT_PACKED as error:
        raise CascadeError(f"{file}: not a file of pack_pictures.py ({error})") from error


NOT_PACKED = (OSError, EOFError, KeyError, TypeError, ValueError, zipfile.BadZipFile, zlib.error)
"""Errors of NumPy and JSON for other files: TypeError for a single array, zlib.error for a damaged archive."""


def _chosen(files: Sequence[Path], mixture: Mixture) -> tuple[dict[str, float], list[tuple[Row, bytes]]]:
    """The shares of the styles, and the pictures that have one, sorted by style."""
    found = [pair for file in files for pair in _unpacked(file)]
    share = mixture.of({row["style"] for row, _ in found})
    kept = sorted((pair for pair in found if share[pair[0]["style"]] > 0), key=lambda pair: pair[0]["style"])
    if not kept:
        raise CascadeError(f"{', '.join(map(str, files))}: no picture of a style that has a share; name other packs")
    return share, kept


def _art(rows: list[Row], share: Mapping[str, float], pixels: Tensor, captions: Captions) -> Art:
    device = pixels.device
    styles = tuple(row["style"] for row in rows)
    names = list(dict.fromkeys(styles))
    counts = torch.tensor([styles.count(name) for name in names], device=device)
    weights = torch.tensor([share[name] for name in names], device=device)
    edge = torch.cat([pixels[:, :, 0], pixels[:, :, -1], pixels[:, :, :, 0], pixels[:, :, :, -1]], dim=2)
    return Art(
        pixels=pixels,
        captions=captions,
        flips=torch.tensor([row["flip"] for row in rows], device=device),
        moves=edge.amin((1, 2)) >= 250,
        bounds=(weights / weights.sum()).cumsum(0),
        start=counts.cumsum(0) - counts,
        size=counts,
        styles=styles,
    )


def _decoded(blobs: list[bytes]) -> np.ndarray[Any, Any]:
    """uint8 (n, 3, SIZE, SIZE). Raises CascadeError for pictures of another size."""
    pictures = [np.asarray(Image.open(io.BytesIO(blob)).convert("RGB")) for blob in blobs]
    others = {picture.shape[:2] for picture in pictures} - {(SIZE, SIZE)}
    if others:
        height, width = others.pop()
        raise CascadeError(f"a packed picture is {width} x {height}; pack pictures with --size {SIZE}")
    return np.ascontiguousarray(np.stack(pictures).transpose(0, 3, 1, 2))


def _jobs(count: int) -> list[tuple[int, int]]:
    """(seed, count) of parts of at most 50 scenes."""
    return [(part, min(50, count - 50 * part)) for part in range(-(-count // 50))]


def _drawn(job: tuple[int, int]) -> tuple[np.ndarray[Any, Any], list[list[str]]]:
    """Pictures uint8 (n, 3, 64, 64), and captions of each."""
    from cascade.data import scenes

    seed, count = job
    rng = random.Random(seed)
    drawn = [scenes.random_scene(rng) for _ in range(count)]
    pixels = np.stack([np.asarray(scenes.draw(scene, 64)) for scene in drawn]).transpose(0, 3, 1, 2)
    captions = [[scenes.describe(scene, rng) for _ in range(CAPTIONS_OF_A_SCENE)] for scene in drawn]
    return np.ascontiguousarray(pixels), captions


def _captions(texts: Sequence[Sequence[str]], place: Mapping[str, int], device: torch.device) -> Captions:
    count = torch.tensor([len(own) for own in texts], device=device)
    rows = torch.tensor([place[text] for own in texts for text in own], device=device)
    return Captions(rows, count.cumsum(0) - count, count)


@torch.inference_mode()
def embed(texts: Sequence[str], folder: Path, device: torch.device) -> Words:
    """The result of `TextEncoder.encode` for the texts, with thousands per batch instead of one."""
    from tokenizers import Tokenizer

    with quiet(progress=False):
        model = load_t5(str(folder), local=True, dtype=torch.float32, quantized={})[0].to(device).eval()
    tokenizer = Tokenizer.from_file(str(tokenizer_folder(folder) / "tokenizer.json"))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    ids = [own.ids for own in tokenizer.encode_batch([well_formed(text) for text in texts])]
    ids = [own if len(own) <= MOST_TOKENS else [*own[: MOST_TOKENS - 1], own[-1]] for own in ids]
    lengths = torch.tensor([len(own) for own in ids], device=device)
    tokens = torch.zeros(len(ids), MOST_TOKENS, model.config.d_model, dtype=torch.float16, device=device)
    order = sorted(range(len(ids)), key=lambda number: len(ids[number]))
    for k in range(0, len(order), 2048):
        part = order[k : k + 2048]
        longest = len(ids[part[-1]])
        padded = torch.tensor([[*ids[i], *[0] * (longest - len(ids[i]))] for i in part], device=device)
        where = torch.tensor(part, device=device)
        seen = torch.arange(longest, device=device)[None] < lengths[where][:, None]
        hidden = model(input_ids=padded, attention_mask=seen).last_hidden_state
        tokens[where, :longest] = (hidden * seen[..., None]).half()
    return Words(tokens, lengths)
