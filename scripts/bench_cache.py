"""The embedding cache compared with padded fp32 pickles: bytes, writing, reading, and its cost in a training step.

    python scripts/bench_cache.py [--captions 100000] [--width 4096] [--folder FOLDER] [--batch-size 16]

Embeddings are random numbers of T5-XXL's width, with the lengths of captions of drawn scenes under the bundled
tokenizer, so no encoder is needed and only storage is measured. The pickles, one file of 256 float32 tokens per
caption, are measured on --pickled of the captions: 100,000 of them would take 420 GB. Reads are of random captions;
--drop-cache asks the kernel to drop the files from memory first. Steps of --config's network follow, with text
alternately from memory and from the cache.
"""

from __future__ import annotations

import os
import pickle
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import click
import torch
from measure import load_average, once
from peer_networks import make_step
from torch import Tensor

from cascade.cli.train import find_config
from cascade.conditioning import Conditioning, TextEmbeddings
from cascade.data.scenes import describe, random_scene
from cascade.stage import build_stage
from cascade.storage.index import BUNDLED
from cascade.storage.training import load_train_config
from cascade.text.cache import EmbeddingCache
from cascade.text.t5_files import TokenCounter

PADDED = 256
"""Tokens of a padded embedding."""
SHARD = 1024
"""Captions in a shard: 120 MB of T5-XXL's embeddings."""


def some_captions(count: int) -> tuple[list[str], list[int]]:
    """Distinct captions and their lengths in tokens."""
    found: dict[str, None] = {}
    for seed in range(10 * count):
        rng = random.Random(seed)
        found[f"{describe(random_scene(rng), rng)} {len(found)}"] = None
        if len(found) == count:
            break
    captions = list(found)
    return captions, TokenCounter(BUNDLED / "text_encoder").count(captions)


def embeddings(lengths: Sequence[int], width: int) -> Iterator[Tensor]:
    """Random rows (n, width), cut from one block, since generating them would take longer than writing."""
    block = torch.randn(PADDED, width)
    return (block[:length] for length in lengths)


def write_cache(folder: Path, captions: Sequence[str], lengths: Sequence[int], width: int) -> EmbeddingCache:
    """Fill a cache, shard by shard."""
    cache = EmbeddingCache(folder, "random", width)
    for start in range(0, len(captions), SHARD):
        part = slice(start, start + SHARD)
        cache.add(captions[part], list(embeddings(lengths[part], width)))
    return cache


def write_pickles(folder: Path, lengths: Sequence[int], width: int) -> None:
    """Write one file per caption: padded, float32."""
    folder.mkdir()
    for number, row in enumerate(embeddings(lengths, width)):
        padded = torch.zeros(PADDED, width)
        padded[: len(row)] = row
        with (folder / f"{number}.pkl").open("wb") as file:
            pickle.dump(padded.numpy(), file)


def read_pickles(folder: Path, numbers: Sequence[int], lengths: Sequence[int]) -> TextEmbeddings:
    """A batch of the files of `write_pickles`; unpickling is safe only because this script wrote them."""
    rows = []
    for number in numbers:
        with (folder / f"{number}.pkl").open("rb") as file:
            rows.append(torch.from_numpy(pickle.load(file))[: lengths[number]])
    return TextEmbeddings.from_rows(rows)


def rate(read: Callable[[list[int]], object], count: int, batch: int, repeats: int) -> float:
    """Captions per second of reading random batches: the median."""
    rng = random.Random(0)
    times = [once(lambda: read([rng.randrange(count) for _ in range(batch)])) for _ in range(repeats)]
    return batch / statistics.median(times)


def forget(folder: Path) -> None:
    """Ask the kernel to drop the files from memory."""
    for path in folder.rglob("*"):
        if path.is_file():
            handle = os.open(path, os.O_RDONLY)
            os.fsync(handle)
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(handle)


def size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def storage_table(
    folder: Path, captions: list[str], lengths: list[int], width: int, pickled: int, batch: int, drop: bool
) -> EmbeddingCache:
    """Print bytes, and captions written and read per second, for both."""
    print("| store | captions | bytes a caption | written a second | read a second |")
    print("| --- | --- | --- | --- | --- |")
    start = time.perf_counter()
    write_cache(folder / "cache", captions, lengths, width)
    written = len(captions) / (time.perf_counter() - start)
    if drop:
        forget(folder / "cache")
    start = time.perf_counter()
    cache = EmbeddingCache.open(folder / "cache")
    opening = time.perf_counter() - start
    read = rate(lambda numbers: cache.get([captions[number] for number in numbers]), len(captions), batch, 200)
    print(f"| ours | {len(captions):,} | {cache.bytes_per_caption:,.0f} | {written:,.0f} | {read:,.0f} |", flush=True)
    start = time.perf_counter()
    write_pickles(folder / "pickles", lengths[:pickled], width)
    written = pickled / (time.perf_counter() - start)
    if drop:
        forget(folder / "pickles")
    read = rate(lambda numbers: read_pickles(folder / "pickles", numbers, lengths), pickled, batch, 50)
    each = size_of(folder / "pickles") / pickled
    print(f"| padded fp32 pickles | {pickled:,} | {each:,.0f} | {written:,.0f} | {read:,.0f} |")
    print(f"\nopening the cache: {opening:.2f} s; mean length {statistics.mean(lengths):.1f} tokens\n")
    return cache


def training_cost(cache: EmbeddingCache, captions: Sequence[str], config: str, batch: int, steps: int) -> None:
    """Steps of a network with the same text from memory and from the cache, alternating."""
    stage = load_train_config(find_config(config), ["text.cache=null"]).stage
    model = stage.model.model_copy(update={"text_dim": cache.dim})
    network = build_stage(stage.model_copy(update={"model": model})).network
    z, level = torch.randn(batch, 3, stage.resolution, stage.resolution), torch.zeros(batch, 1, 1, 1)
    rng = random.Random(1)
    batches = [[captions[rng.randrange(len(captions))] for _ in range(batch)] for _ in range(steps)]
    held = [cache.get(names).to(dtype=torch.float32) for names in batches]
    current: list[TextEmbeddings] = [held[0]]
    step = make_step(
        "", network, lambda net: net(z, level, Conditioning(current[0].tokens, current[0].mask)), 0.0, torch.float32
    )

    def from_memory(number: int) -> None:
        current[0] = held[number]
        step.run()

    def from_cache(number: int) -> None:
        current[0] = cache.get(batches[number]).to(dtype=torch.float32)
        step.run()

    from_memory(0)
    pairs = [(once(lambda n=n: from_memory(n)), once(lambda n=n: from_cache(n))) for n in range(steps)]
    reading = statistics.median(once(lambda n=n: cache.get(batches[n])) for n in range(steps))
    memory, cached = (statistics.median(times) for times in zip(*pairs, strict=True))
    print(
        f"a training step of {batch} pictures at {stage.resolution} px: {memory:.3f} s with text from memory,"
        f" {cached:.3f} s from the cache ({cached / memory - 1:+.1%}); reading alone {reading * 1000:.1f} ms,"
        f" {reading / cached:.2%} of it"
    )


@click.command()
@click.option("--captions", "count", default=100_000, show_default=True, type=click.IntRange(min=1))
@click.option("--width", default=4096, show_default=True, help="T5-XXL's.")
@click.option("--pickled", default=1000, show_default=True, help="Captions written as pickles, 4.2 MB each.")
@click.option("--batch-size", default=16, show_default=True)
@click.option("--folder", type=click.Path(exists=True, file_okay=False, path_type=Path), help="Folder to write to.")
@click.option("--drop-cache", is_flag=True, help="Read from the disk instead of the page cache.")
@click.option("--config", default="preset:bundled/base", show_default=True, help="Config of the network.")
@click.option("--steps", default=20, show_default=True)
def main(
    count: int,
    width: int,
    pickled: int,
    batch_size: int,
    folder: Path | None,
    drop_cache: bool,
    config: str,
    steps: int,
) -> None:
    """Print the table, then the cost of reading to a step."""
    captions, lengths = some_captions(count)
    needed = sum(lengths) * width * 2 + min(pickled, count) * PADDED * width * 4
    print(f"{torch.get_num_threads()} threads, load {load_average():.1f}; {needed / 1e9:.1f} GB of disk\n")
    with tempfile.TemporaryDirectory(dir=folder) as place:
        pickled = min(pickled, count)
        cache = storage_table(Path(place), captions, lengths, width, pickled, batch_size, drop_cache)
        training_cost(cache, captions, config, batch_size, steps)


if __name__ == "__main__":
    main()
