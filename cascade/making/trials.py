"""Drawing while a cascade is made: smaller pictures for the next stage, and trials of steps and guidance."""

from __future__ import annotations

import io
import itertools
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from cascade.conditioning import Conditioning, TextEncoderProtocol
from cascade.config.data import DataConfig, FolderSource
from cascade.config.stage import StageConfig
from cascade.data.records import BadRecordError, Record
from cascade.data.sources import open_records
from cascade.data.transforms import decode, prepared_pair
from cascade.diffusion import denoisers
from cascade.diffusion.editing import Known
from cascade.diffusion.noise import CLEAN, diffuse, noise_like
from cascade.drawing.batches import Inputs, Picture, Texts, draw_batch
from cascade.evaluation.distances import kernel_distance
from cascade.files.atomic import atomic_file
from cascade.pictures.images import downsample, from_pil, to_float, to_pil, to_uint8
from cascade.pipeline import CascadePipeline
from cascade.seeds import generator
from cascade.stage import Stage, limit, run_sampler

# --- redraw ----------------------------------------------------------------------------------------------------------
# Smaller pictures as the stage before draws them, with the true large ones: a super-resolution stage learns from
# them.
#
# A picture that a base stage draws from words alone has no true large one. So it redraws true pictures: the area mean
# is noised, and the stage continues from there under the picture's caption, as in the middle of a drawing. What the
# noise leaves is the truth's; edges and small shapes are the stage's own. A super-resolution stage enlarges the area
# mean of the size that it starts from.

MOST = 1000
"""Pictures that are redrawn at most; training mixes them with the true ones."""
LEVELS = (1.0, 3.0)
"""Log SNR of the noise from which a base stage redraws a picture: its shape is decided there, its detail is not."""
_STEPS, _BATCH = 4, 8


def redrawn(stage: Stage, low: Tensor, texts: Texts, log_snr: float, steps: int, rng: list[torch.Generator]) -> Tensor:
    """Pictures (B, 3, H, W) in [-1, 1] noised to `log_snr`, and drawn from there by a base stage in `steps`."""
    settings, own, null = stage.config.sampling, texts.own, texts.null
    cond = Conditioning(own.tokens, own.mask)
    unprompted = cond.with_text(null.tokens, null.mask)
    guided = denoisers.guide(stage, cond, unprompted, settings.guidance, settings.guidance_interval)
    z = diffuse(low, noise_like(low, rng), torch.full((len(low), 1, 1, 1), log_snr))
    levels = torch.linspace(log_snr, float(stage.schedule.log_snr(torch.zeros(()))), steps + 1)
    levels[-1] = CLEAN
    return run_sampler(settings, limit(guided, settings), z, levels, rng, lambda _step, _x: None)


@torch.inference_mode()
def redrawn_by_base(stage: Stage, truth: Tensor, texts: Texts, log_snr: float, steps: int, first: int) -> Tensor:
    """True pictures (B, 3, H, W) as a base stage redraws them: uint8 (B, 3, h, w) of the stage's size."""
    rng = [generator(0, number, "redraw") for number in range(first, first + len(truth))]
    return to_uint8(redrawn(stage, downsample(truth, stage.config.resolution), texts, log_snr, steps, rng))


@torch.inference_mode()
def redrawn_by_enlarging(stage: Stage, truth: Tensor, texts: Texts, strength: float, first: int) -> Tensor:
    """True pictures (B, 3, H, W) as a super-resolution stage enlarges them: uint8 (B, 3, h, w) of the stage's size."""
    config, size = stage.config, stage.config.resolution
    assert config.low_resolution is not None, "a base stage sees no smaller picture"
    low = to_uint8(downsample(truth, config.low_resolution))
    batch = [Picture(place, 0, first + place) for place in range(len(truth))]
    known = Known(downsample(truth, size), strength=strength) if strength < 1 else None
    return to_uint8(draw_batch(stage, Inputs(config.sampling, (size, size), batch, texts, low, known)))


def write_redrawn(
    source: FolderSource, stages: Sequence[Stage], text: TextEncoderProtocol, side: int, out: Path
) -> int:
    """Write a Parquet file of pictures at `side` px, captions, and the pictures as the stages before draw them.

    stages: those before, smallest first; each enlarges what the one before drew. Returns the number of pictures.
    Columns: image, captions, low.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    rng = random.Random(0)
    rows = []
    for number, batch in enumerate(_batches(source, side, rng)):
        truth = to_float(torch.stack([picture for picture, _ in batch])).to(stages[0].device)
        captions = [rng.choice(record.captions) for _, record in batch]
        own, null = (text.encode(words).to(stages[0].device) for words in (captions, [""] * len(batch)))
        texts = Texts(own, null)
        low = redrawn_by_base(stages[0], truth, texts, rng.uniform(*LEVELS), _STEPS, number * _BATCH)
        for stage in stages[1:]:
            low = _enlarged(stage, low, texts, number * _BATCH)
        for (picture, record), small in zip(batch, low, strict=True):
            rows.append({"image": _png(picture), "captions": list(record.captions), "low": _png(small)})
    out.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(out) as temporary:
        pq.write_table(pa.Table.from_pylist(rows), temporary, compression="none")
    return len(rows)


@torch.inference_mode()
def _enlarged(stage: Stage, low: Tensor, texts: Texts, first: int) -> Tensor:
    side = stage.config.resolution
    batch = [Picture(place, 0, first + place) for place in range(len(low))]
    return to_uint8(draw_batch(stage, Inputs(stage.config.sampling, (side, side), batch, texts, low, None)))


def _batches(source: FolderSource, side: int, rng: random.Random) -> Iterator[list[tuple[Tensor, Record]]]:
    """Square pictures at `side` px in a random order, with their records; those that cannot be read are left out."""
    records, stage = open_records(source), StageConfig(name="redraw", resolution=side)
    data = DataConfig(sources=(source,))
    order = rng.sample(range(len(records)), min(MOST, len(records)))

    def readable() -> Iterator[tuple[Tensor, Record]]:
        for place in order:
            try:
                record = records[place]
                if record.captions:
                    yield prepared_pair(decode(record), record, data, stage, rng)[0], record
            except BadRecordError:
                continue

    yield from map(list, _several(readable(), _BATCH))


def _several(items: Iterator[tuple[Tensor, Record]], count: int) -> Iterator[list[tuple[Tensor, Record]]]:
    while batch := list(itertools.islice(items, count)):
        yield batch


def _png(picture: Tensor) -> bytes:
    """A picture (3, H, W), uint8, as PNG."""
    buffer = io.BytesIO()
    image: Image.Image = to_pil(to_float(picture.cpu())[None])[0]
    image.save(buffer, format="PNG", compress_level=1)
    return buffer.getvalue()


# --- sweep -----------------------------------------------------------------------------------------------------------
# Steps and guidance of a base stage, chosen by drawing held-out captions with several settings.
#
# Two figures on the features of the art suite's image tower: the kernel distance between drawings and true pictures,
# and the match, by how much a drawing is nearer to the true picture of its own caption than to the others. Guidance
# raises the match and, beyond some weight, the distance; so the settings are ranked by both.

GUIDANCES = (1.0, 1.5, 2.0, 3.0, 5.0)
STEPS = (8, 16, 32)
_ALLOWED = 0.05
"""A setting with fewer network calls is preferred if its match is lower by at most this share, and likewise its
distance higher."""


@dataclass(frozen=True)
class Trial:
    """A setting and its figures; `calls`: network calls per picture."""

    steps: int
    guidance: float
    distance: float
    match: float

    @property
    def calls(self) -> int:
        """Network calls per picture: two per step with guidance."""
        return self.steps * (1 if self.guidance == 1 else 2)

    def described(self) -> dict[str, float]:
        """As JSON."""
        return {**asdict(self), "calls": self.calls}


Features = Callable[[Tensor], Tensor]
"""Pictures (N, 3, H, W) in [-1, 1] -> (N, D)."""


def sweep(
    pipeline: CascadePipeline, captions: Sequence[str], truth: Tensor, features: Features, steps: int = 16
) -> list[Trial]:
    """Trials of each guidance at `steps`, then of other steps at the best guidance. truth: (N, 3, H, W) in [-1, 1]."""
    true = features(truth)

    def trial(steps: int, guidance: float) -> Trial:
        stage = pipeline.slots[0].config
        drawn = pipeline(
            list(captions), seed=list(range(len(captions))), until=stage.resolution, steps={stage.name: steps},
            guidance={stage.name: guidance}, batch_size=8,
        )  # fmt: skip
        found = features(torch.stack([to_float(from_pil(image)) for image in drawn.images]))
        return Trial(steps, guidance, kernel_distance(_scaled(true, true), _scaled(found, true)), match(true, found))

    trials = [trial(steps, guidance) for guidance in GUIDANCES]
    guidance = best(trials).guidance
    return trials + [trial(count, guidance) for count in STEPS if count != steps]


def match(true: Tensor, drawn: Tensor) -> float:
    """Mean cosine of each drawing with its own true picture, less that with the others: (N, D), (N, D) -> [-2, 2]."""
    centre = true.mean(dim=0)
    cosines = F.normalize(drawn - centre, dim=1) @ F.normalize(true - centre, dim=1).T
    own = cosines.diagonal()
    others = (cosines.sum(dim=1) - own) / (len(true) - 1)
    return float((own - others).mean())


def best(trials: Sequence[Trial]) -> Trial:
    """The trial with the lowest sum of both ranks; of nearly equal ones that with the fewest network calls."""

    def rank(trial: Trial) -> int:
        better = [(one.distance < trial.distance) + (one.match > trial.match) for one in trials]
        return sum(better)

    first = min(trials, key=lambda trial: (rank(trial), trial.calls))
    margin = _ALLOWED * max(abs(first.distance), 1e-6)
    near = [
        trial
        for trial in trials
        if trial.match >= first.match - _ALLOWED * abs(first.match) and trial.distance <= first.distance + margin
    ]
    return min(near, key=lambda trial: trial.calls)


def _scaled(features: Tensor, by: Tensor) -> Tensor:
    """Features with the mean and spread of `by` removed, so that every one counts alike in the kernel."""
    return (features - by.mean(dim=0)) / by.std(dim=0).clamp(min=1e-3)


def chosen_places(total: int, count: int) -> list[int]:
    """`count` of `total` places, always the same ones."""
    return sorted(random.Random(0).sample(range(total), min(count, total)))
