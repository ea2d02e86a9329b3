"""Views per second of everything except the network: reading, decoding, text from its cache, noise, logging.

    python scripts/bench_feeding.py [--sizes 64,256] [--workers 0,1,2] [--kinds decoded,png,webp] [--steps 40] [--peers]

Runs the real trainer on torch's `meta` device, which acts as a GPU that needs no time: a single product replaces the
network and its loss. It prints

- views per second by the clock; measure on a quiet machine, the load is printed;
- views per second by processor time: the rate of the cores in use if nothing else ran, from the time of all processes;
- milliseconds per step of the training thread, without waiting, minus those of the same steps with a ready batch,
  because queueing an operation on `meta` takes torch ten times as long as on a GPU;
- the rate of the decoder alone on one core.

At 256 px views are crops of 512 px pictures. `--peers` also measures two other libraries, without their text encoder:
diffusers' script (`datasets`, `with_transform`) and imagen-pytorch's loader (a list of files), both through torch's
DataLoader. They transform with torchvision, which calls Pillow for a PIL picture, like `transformed`.
"""

from __future__ import annotations

import itertools
import json
import multiprocessing
import os
import random
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import click
import numpy as np
import psutil
import torch
from measure import load_average
from PIL import Image
from torch import Tensor, nn

from cascade.models.network import Network

THERE = torch.device("meta")
"""Stand-in for a GPU that needs no time."""
WIDTH, TOKENS = 512, 20
"""Width and length of the text embeddings: T5-small's width, and about the length of captions."""
PICTURES = {64: 4000, 256: 400}
"""Number of pictures, by the size of the views."""
BATCH = {64: 256, 256: 32}
FORMATS = {"png": {"compress_level": 6}, "webp": {"quality": 90}}


@dataclass(frozen=True)
class Fed:
    """Views a second by the clock, and by the processors' time; seconds of the training thread a step."""

    views: float
    possible: float
    thread: float


class Nothing(Network):
    """A network that costs nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, z: Tensor, _log_snr: Tensor, _seen: object) -> Tensor:
        """(B, C, H, W) -> the same, times a number."""
        return z * self.weight


def stored_size(size: int) -> int:
    """Size of the pictures on disk: that of the views, or twice as large where views are crops."""
    return size if size < 256 else 2 * size


def write_pictures(folder: Path, size: int, kind: str) -> Path:
    """Write pictures with caption files: drawn scenes with grain, which compress about as well as photographs."""
    from cascade.data.scenes import describe, draw, random_scene

    target, side = folder / f"{kind}-{size}", stored_size(size)
    target.mkdir()
    grain = Image.effect_noise((side, side), 16).convert("RGB")
    for number in range(PICTURES[size]):
        rng = random.Random(number)
        scene = random_scene(rng, False)
        picture = draw(scene, side)
        assert isinstance(picture, Image.Image)
        Image.blend(picture.convert("RGB"), grain, 0.2).save(target / f"{number:06d}.{kind}", **FORMATS[kind])
        (target / f"{number:06d}.txt").write_text(f"{describe(scene, rng)}, number {number}\n")
    return target


def settings(folder: Path, pictures: Path, size: int, workers: int, decoded: bool, steps: int) -> Any:
    """Settings of a run on these pictures in which only feeding takes time."""
    from cascade.config.training import TrainConfig
    from cascade.settings import parse

    stage: dict[str, Any] = {"name": "base", "resolution": stored_size(size), "model": {"text_dim": WIDTH}}
    data: dict[str, Any] = {"sources": [{"kind": "folder", "path": str(pictures)}], "workers": workers}
    if size != stored_size(size):
        stage |= {"name": "sr", "low_resolution": size // 2}
        data["crop"] = size
    if decoded:
        data["decoded"] = str(folder / f"decoded-{size}")
    training = {
        "steps": 2 * steps,
        "batch_size": BATCH[size],
        "log_every": 10,
        "save_every": 2 * steps,
        "optimizer": {"warmup_steps": 0},
    }
    output = str(folder / f"run-{time.monotonic_ns()}")
    return parse(TrainConfig, {"output": output, "stage": stage, "data": data, "training": training}, "feeding")


def fill_cache(folder: Path, pictures: Path) -> Path:
    """Random embeddings of the captions, and of none, as `cascade encode` stores them."""
    from cascade.text.cache import EmbeddingCache

    cache = EmbeddingCache(folder / f"text-{pictures.name}", "random", WIDTH)
    captions = ["", *(path.read_text().strip() for path in sorted(pictures.glob("*.txt")))]
    cache.add(captions, [torch.randn(TOKENS, WIDTH) for _ in captions])
    return cache.folder


def on_a_fast_gpu() -> None:
    """Make `THERE` accelerate's device in this process, with 1 for every value read from it."""
    from accelerate import Accelerator

    from cascade.training import step, trainer
    from cascade.training.log import Numbers

    def ones(steps: Sequence[Any], _accelerator: object) -> list[Numbers]:
        count = len(steps[0].samples)
        return [Numbers(step, torch.ones(count), [1.0] * count, [0.0] * count, 1.0) for step in steps]

    Accelerator.device = THERE

    def nothing(_stage: object, network: Any, batch: Any, _loss: object, draw: Any) -> Any:
        """The loss of a network that costs nothing."""
        count = len(batch.samples)
        return network(draw.u.to(THERE), None, None), torch.empty(count, 1, 1, 1, device=THERE)

    trainer.read, step.training_loss = ones, nothing
    step.counted_noise = lambda keys, shape: torch.empty(len(keys), *shape, device=THERE)  # one operation, not twenty
    trainer.EMA.distance = lambda *_: 0.0
    trainer.Trainer._save = lambda *_: None
    sys.modules[torch.optim.Adam.__module__]._device_dtype_check_for_fused = lambda *_: None


def feed(config: Any, cache: Path) -> Fed:
    """Run the trainer and measure its second half. Call in a separate process."""
    from cascade.stage import build_stage
    from cascade.text.cache import EmbeddingCache
    from cascade.text.cached import CachedTextEncoder
    from cascade.training.trainer import Trainer

    multiprocessing.set_start_method("fork", force=True)  # a spawned process would spawn its readers, too
    on_a_fast_gpu()
    torch.set_num_threads(1)
    stage = build_stage(config.stage, device=THERE)
    stage.network = Nothing().to(THERE)
    run = Trainer(config, stage, CachedTextEncoder(EmbeddingCache.open(cache), lambda: None))
    marks: list[tuple[float, float, float]] = []
    step, half = run._step, config.training.steps // 2

    def marked(number: int, data: Iterator[Any]) -> None:
        step(number, data)
        if number in (half, config.training.steps):
            marks.append((time.perf_counter(), processor_seconds(), time.thread_time()))

    run._step = marked
    assert run.run()
    clock, processors, thread = (after - before for before, after in zip(*marks, strict=True))
    counted = config.training.steps - half
    thread -= fed_already(run, step, counted)
    views = config.training.batch_size * counted
    cores = min(len(os.sched_getaffinity(0)), 1 + config.data.workers)
    return Fed(views / clock, views / processors * cores, thread / counted)


def fed_already(run: Any, step: Any, count: int) -> float:
    """Seconds of this thread for steps with a ready batch."""
    from contextlib import closing

    with closing(run._batches(0)) as batches:
        batch = next(batches)
    ready = run.ready(batch)
    run.ready = lambda _batch: ready
    start = time.thread_time()
    for number in range(count):
        step(number + 1, itertools.repeat(batch))
        run._unread = []
    return time.thread_time() - start


def processor_seconds() -> float:
    """Processor seconds of this process and its children."""
    own = psutil.Process()
    return sum(sum(process.cpu_times()[:2]) for process in [own, *own.children(recursive=True)])


def decoder_rate(pictures: Path) -> float:
    """Pictures a second that Pillow decodes on one core, and nothing else."""
    paths = sorted(path for path in pictures.iterdir() if path.suffix != ".txt")[:200]
    start = time.process_time()
    for path in paths:
        with Image.open(path) as image:
            image.load()
    return len(paths) / (time.process_time() - start)


def transformed(image: Image.Image, size: int) -> Tensor:
    """The result of torchvision's RandomCrop, RandomHorizontalFlip and ToTensor: (3, size, size) in [-1, 1]."""
    image = image.convert("RGB")
    left, top = (random.randint(0, side - size) for side in image.size)
    image = image.crop((left, top, left + size, top + size))
    if random.random() < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()
    return pixels.to(torch.float32).div(255).sub(0.5).div(0.5)


class Files(torch.utils.data.Dataset[Tensor]):
    """A list of files, like imagen-pytorch's `Dataset`."""

    def __init__(self, paths: Sequence[Path], size: int) -> None:
        self.paths, self.size = paths, size

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Tensor:
        with Image.open(self.paths[index]) as image:
            return transformed(image, self.size)


def as_diffusers(paths: Sequence[Path], size: int) -> Any:
    """A table of pictures of `datasets`, transformed on reading, as in `train_text_to_image.py`."""
    from datasets import Dataset
    from datasets import Image as Pictures

    table = Dataset.from_dict({"image": [str(path) for path in paths]}).cast_column("image", Pictures())
    return table.with_transform(partial(transformed_rows, size=size))


def transformed_rows(rows: Any, size: int) -> dict[str, list[Tensor]]:
    """Rows of a table; not a lambda, which a reading process that is spawned could not be given."""
    return {"pixel_values": [transformed(image, size) for image in rows["image"]]}


def stacked(rows: Sequence[Any]) -> Tensor:
    """A batch."""
    return torch.stack([row["pixel_values"] if isinstance(row, dict) else row for row in rows])


def peer_rate(peer: str, pictures: Path, size: int, workers: int, steps: int) -> tuple[float, float]:
    """(views a second by the clock, by processor time) of another library's loader; the second half counts."""
    torch.set_num_threads(1)
    paths = sorted(path for path in pictures.iterdir() if path.suffix != ".txt")
    data = Files(paths, size) if peer == "imagen-pytorch" else as_diffusers(paths, size)
    loader = torch.utils.data.DataLoader(
        data, BATCH[size], shuffle=True, num_workers=workers, collate_fn=stacked, persistent_workers=workers > 0
    )
    batches = itertools.chain.from_iterable(itertools.repeat(loader))
    marks = []
    for number in range(1, 2 * steps + 1):
        next(batches)
        if number in (steps, 2 * steps):
            marks.append((time.perf_counter(), processor_seconds()))
    clock, processors = (after - before for before, after in zip(*marks, strict=True))
    cores = min(len(os.sched_getaffinity(0)), 1 + workers)
    return BATCH[size] * steps / clock, BATCH[size] * steps / processors * cores


def peer_table(sizes: Sequence[int], kinds: Sequence[str], workers: Sequence[int], steps: int) -> None:
    """A line for each peer, size, kind of file, and number of workers."""
    print("\n| px | from | workers | loader | views/s | by processor time |\n| ---: | --- | ---: | --- | ---: | ---: |")
    for size, kind in itertools.product(sizes, [kind for kind in kinds if kind != "decoded"]):
        with tempfile.TemporaryDirectory() as name:
            pictures = write_pictures(Path(name), size, kind)
            for count, peer in itertools.product(workers, ("diffusers", "imagen-pytorch")):
                clock, processors = in_new_process(peer_rate, peer, pictures, size, count, steps)
                print(f"| {size} | {kind} | {count} | {peer} | {clock:.0f} | {processors:.0f} |", flush=True)


def in_new_process(function: Any, *arguments: Any) -> Any:
    """The result of `function` in a new process."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def own_table(sizes: Sequence[int], kinds: Sequence[str], workers: Sequence[int], steps: int) -> None:
    """A line for each size, kind of file, and number of workers."""
    print("| px | from | workers | views/s | by processor time | training thread, ms a step | decoder alone, a core |")
    print("| ---: | --- | ---: | ---: | ---: | ---: | ---: |")
    for size, kind in itertools.product(sizes, kinds):
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            pictures = write_pictures(folder, size, "png" if kind == "decoded" else kind)
            cache = fill_cache(folder, pictures)
            alone = "" if kind == "decoded" else f"{decoder_rate(pictures):.0f}"
            for count in workers:
                fed = in_new_process(feed, settings(folder, pictures, size, count, kind == "decoded", steps), cache)
                print(
                    f"| {size} | {kind} | {count} | {fed.views:.0f} | {fed.possible:.0f} | {1000 * fed.thread:.1f}"
                    f" | {alone} |",
                    flush=True,
                )


def numbers(text: str) -> tuple[int, ...]:
    """`64,256` as (64, 256)."""
    return tuple(int(part) for part in text.split(","))


@click.command()
@click.option("--sizes", default="64,256", show_default=True)
@click.option("--workers", default="0,1,2", show_default=True)
@click.option("--kinds", default="decoded,png,webp", show_default=True)
@click.option("--steps", type=click.IntRange(min=2), default=40, show_default=True, help="Measured; as many warm up.")
@click.option("--peers", is_flag=True, help="Also measure the loaders of two other libraries.")
def main(sizes: str, workers: str, kinds: str, steps: int, peers: bool) -> None:
    """Print the table."""
    cores = len(os.sched_getaffinity(0))
    print(f"{cores} cores, torch {torch.__version__}, load {load_average():.1f}; batches of {json.dumps(BATCH)}\n")
    own_table(numbers(sizes), kinds.split(","), numbers(workers), steps)
    if peers:
        peer_table(numbers(sizes), kinds.split(","), numbers(workers), steps)


if __name__ == "__main__":
    main()
