"""A first look at a folder of pictures, and at the pace of this machine: what follows for the cascade to make."""

from __future__ import annotations

import logging
import shutil
import statistics
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from cascade.config.data import DataConfig, FolderSource
from cascade.config.stage import StageConfig
from cascade.config.training import TrainConfig
from cascade.data.survey import Survey, survey
from cascade.errors import CascadeError
from cascade.storage.training import load_trainer
from cascade.training.memory import run_bytes, training_memory

LEAST_PICTURES = 4
HOLD_OUT_FROM = 64
"""Pictures from which one in sixteen is held out; of fewer, training needs all."""
_NAMED = 3
_SQUARE = 1.1  # ratio of the sides up to which a picture counts as square


@dataclass(frozen=True)
class Look:
    """The findings on a folder. usable: pictures that training can read. short_side: the median, in pixels.

    names: the names that are captions, of files or folders, if there are no others.
    """

    folder: Path
    found: Survey
    usable: int
    short_side: int
    names: str = "none"

    @property
    def holds_out(self) -> bool:
        """Whether there are enough pictures to hold some out."""
        return self.usable >= HOLD_OUT_FROM

    def source(self, split: str = "train") -> FolderSource:
        """The data source for training or for held-out pictures: all of them if none are held out."""
        settings = {"path": str(self.folder), "names": self.names, "split": split if self.holds_out else "all"}
        return FolderSource.model_validate(settings)

    def lines(self) -> list[str]:
        """One screen for a person to read."""
        found = self.found
        by_area = sorted(found.sizes, key=lambda size: size[0] * size[1])
        least, median, most = (f"{w}x{h}" for w, h in (by_area[0], by_area[len(by_area) // 2], by_area[-1]))
        shapes = Counter(map(_shape, found.sizes))
        lines = [
            f"{self.folder}: {self.usable:,} pictures to learn from",
            f"  sizes: {least} to {most}, median {median}",
            f"  shapes: {', '.join(f'{count:,} {shape}' for shape, count in shapes.most_common())}",
        ]
        lines += _some("cannot be used", found.problems)
        lines += _some("copies of another", [f"{copy} = {first}" for copy, first in found.copies])
        repeated = max(found.captions.values(), default=0)
        lines.append(f"  captions: {len(found.captions):,} distinct, the most frequent {repeated:,} times")
        examples = [caption for caption, _ in Counter(found.captions).most_common(_NAMED)]
        lines += [f"    {caption}" for caption in examples]
        if self.names != "none":
            lines.append(f"  there are no captions: the names of the {self.names}s are taken instead")
        kept = "one picture in sixteen is held out for measuring" if self.holds_out else "too few to hold any out"
        return [*lines, f"  {kept}"]


def look_at(folder: Path) -> Look:
    """Read every picture and caption of a folder. Raises CascadeError if there is too little to learn from."""
    found, names = _surveyed(folder, "none"), "none"
    if found.sizes and not found.captions:
        parents = {Path(problem.partition(": no caption")[0]).parent for problem in found.problems}
        names = "folder" if len(parents) > 1 else "file"
        found = _surveyed(folder, names)
    usable = found.looked_at - len(found.problems)
    if usable < LEAST_PICTURES:
        first = f"; the first problem: {found.problems[0]}" if found.problems else ""
        raise CascadeError(
            f"{folder}: {max(usable, 0)} pictures with captions, of {found.looked_at}; {LEAST_PICTURES} are the"
            f" least to learn from{first}"
        )
    shorts = sorted(min(size) for size in found.sizes)
    return Look(folder, found, usable, shorts[len(shorts) // 2], names)


def _surveyed(folder: Path, names: str) -> Survey:
    source = FolderSource.model_validate({"path": str(folder), "names": names})
    return survey(source, DataConfig(sources=(source,)), StageConfig(name="look", resolution=64), None)


def _shape(size: tuple[int, int]) -> str:
    width, height = size
    if max(size) <= _SQUARE * min(size):
        return "square"
    return "wide" if width > height else "tall"


def _some(what: str, lines: Sequence[str]) -> list[str]:
    """A heading with the number of lines, and the first few; nothing if there are none."""
    if not lines:
        return []
    more = [f"    and {len(lines) - _NAMED:,} more"] if len(lines) > _NAMED else []
    return [f"  {what}: {len(lines):,}", *(f"    {line}" for line in lines[:_NAMED]), *more]


# --- pace ------------------------------------------------------------------------------------------------------------
# How fast a stage trains on this machine: a few steps of the real training run, measured.

_ENTRIES, _STEPS_AN_ENTRY = 4, 2


@dataclass(frozen=True)
class Pace:
    """Measured speed and counted cost of a training run. seconds: of one step."""

    seconds: float
    memory_bytes: int
    disk_bytes: int


def measure(config: TrainConfig, scratch: Path) -> Pace:
    """Train a few steps in a folder that is deleted afterwards. The log's first entry, which warms up, is left out.

    Raises CascadeError for a run that cannot start on this machine.
    """
    steps = _ENTRIES * _STEPS_AN_ENTRY
    optimizer = config.training.optimizer.model_copy(update={"warmup_steps": 0, "decay_steps": 0})
    brief = {
        "steps": steps,
        "log_every": _STEPS_AN_ENTRY,
        "sample_every": 0,
        "validation": None,
        "optimizer": optimizer,
    }
    training = config.training.model_copy(update=brief)
    trial = config.model_copy(update={"output": str(scratch), "training": training})
    shutil.rmtree(scratch, ignore_errors=True)
    try:
        with _quiet():
            trainer = load_trainer(trial)
            trainer.run()
        assert trainer.log is not None
        rates = [entry["images_per_second"] for entry in trainer.log.entries[1:]]
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    memory = training_memory(config).total
    return Pace(config.training.batch_size / statistics.median(rates), memory, run_bytes(config))


@contextmanager
def _quiet() -> Iterator[None]:
    """No lines of the training run: it is none."""
    logger = logging.getLogger("cascade.training")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
