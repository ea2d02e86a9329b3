"""`cascade check-data`: inspects the data of a training run before the run starts."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from cascade.cli.terminal import path_argument, path_option, say
from cascade.cli.train import find_config
from cascade.text.language import prepare_caption

if TYPE_CHECKING:
    from cascade.config.data import DataConfig, TextConfig
    from cascade.config.stage import StageConfig
    from cascade.config.training import TrainConfig
    from cascade.data.survey import Survey
    from cascade.text.t5_files import TokenCounter

_PROGRAM = "cascade check-data"
_JUDGED_FROM = 10  # records from which captions that are all alike are worth a warning
_NAMED = 5  # problems, copies and captions that are printed
_SHOWN = 60  # characters of a caption before its cut


@click.command("check-data")
@path_argument("config")
@click.argument("assignments", metavar="[KEY=VALUE]...", nargs=-1)
@click.option("--limit", type=click.IntRange(min=1), help="Records to inspect, spread evenly; default: all.")
@path_option("--sheet", default="check-data.png", show_default=True)
@click.option("--views", type=click.IntRange(min=1), default=24, show_default=True, help="Pictures on the sheet.")
def check_data(config: str, assignments: tuple[str, ...], limit: int | None, sheet: str, views: int) -> int:
    """Inspect the data of a training run, held-out data included: counts, sizes, bad records, captions, copies.

    A record is bad if training would skip it. Draws a sheet of the first views as the network will see them, for
    super-resolution next to the smaller pictures. Of scenes and streams the first 1000 records are inspected. Exit
    status 1: there are bad records; their names are printed.
    """
    from PIL.PngImagePlugin import PngInfo

    from cascade.data.survey import view_sheet
    from cascade.files.atomic import atomic_file, writing
    from cascade.pictures.reading import SOFTWARE, check_png
    from cascade.storage.training import load_train_config, text_encoder_source, with_measured_range
    from cascade.text.t5_files import TokenCounter

    check_png(Path(sheet), _PROGRAM)
    settings = load_train_config(find_config(config), assignments)
    # First, so that a wrong encoder or sheet path is reported before a million pictures are decoded.
    reading = Reading(TokenCounter(text_encoder_source(settings.text)), settings.text)
    with writing(Path(sheet)):
        Path(sheet).parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=Path(sheet).parent).close()
    settings = with_measured_range(settings)
    surveys = surveys_of(settings, limit)
    for found in surveys:
        say("\n".join(describe(found, settings.data, settings.stage)))
    say("\n".join(reading.describe({caption for found in surveys for caption in found.captions})))
    picture = view_sheet(
        settings.data, settings.stage, settings.training.seed, views, reading.label, settings.training.batch_size
    )
    with atomic_file(Path(sheet)) as temporary:
        text = PngInfo()
        text.add_text(SOFTWARE, _PROGRAM)
        picture.save(temporary, format="PNG", pnginfo=text)
    say(f"the first {views} views: {sheet}")
    return 1 if any(found.problems for found in surveys) else 0


def surveys_of(config: TrainConfig, limit: int | None) -> list[Survey]:
    """A survey of each source of a run, then of each held-out source."""
    from cascade.data.survey import survey

    validation = config.training.validation
    surveys = [survey(source, config.data, config.stage, limit) for source in config.data.sources]
    for source in validation.sources if validation else ():
        surveys.append(survey(source, config.data, config.stage, limit))
        surveys[-1].name = f"held-out {surveys[-1].name}"
    return surveys


def describe(found: Survey, data: DataConfig, stage: StageConfig) -> list[str]:
    """The findings as lines of text."""
    total = f"{found.total:,} records" if found.total is not None else "endless"
    lines = [f"{found.name}: {total}, {found.looked_at:,} inspected"]
    if found.sizes:
        by_area = sorted(found.sizes, key=lambda size: size[0] * size[1])
        least, median, most = (f"{w}x{h}" for w, h in (by_area[0], by_area[len(by_area) // 2], by_area[-1]))
        side = min if data.aspect == "crop" else max  # side of the square made of a picture; tiles are not resized
        small = 0 if data.tiles else sum(side(size) < stage.resolution for size in found.sizes)
        enlarged = f"; {small:,} will be enlarged to {stage.resolution} px" if small else ""
        lines.append(f"  pictures: {least} to {most}, median {median}{enlarged}")
    lines += _some("bad", found.problems)
    lines += _some("copies", [f"{copy} = {first}" for copy, first in found.copies])
    repeated = sum(count > 1 for count in found.captions.values())
    lines.append(f"  captions: {len(found.captions):,} distinct, {repeated:,} of them used more than once")
    return lines + _warnings(found, data)


def _warnings(found: Survey, data: DataConfig) -> list[str]:
    """Lines on captions that will not teach what one expects."""
    from cascade.data.transforms import names_a_side  # imports torch

    lines = []
    most = max(found.captions.values(), default=0)
    if found.looked_at >= _JUDGED_FROM and most > found.looked_at / 2:
        caption = max(found.captions, key=lambda one: found.captions[one])
        lines.append(
            f"  warning: {most:,} of {found.looked_at:,} captions are {caption!r}; prompts will hardly differ. Describe"
            " what differs between the pictures"
        )
    without = sum(problem.endswith(": no caption") for problem in found.problems)
    if without and without == found.looked_at:
        lines.append("  warning: no picture has a caption; names: file or names: folder of the source uses names")
    sided = sum(count for caption, count in found.captions.items() if names_a_side((caption,)))
    if data.flip and sided:
        lines.append(f"  {sided:,} captions mention left, right, a flag or letters: these pictures are never mirrored")
    return lines


class Reading:
    """Prepares captions as the text encoder reads them: cleaned, and cut after `text.max_length` tokens."""

    def __init__(self, counter: TokenCounter, text: TextConfig) -> None:
        """counter: counts the tokens of cleaned texts."""
        self._counter, self._text = counter, text

    def describe(self, captions: Iterable[str]) -> list[str]:
        """The token counts of the captions, and where the longest ones are cut."""
        read = list(dict.fromkeys(map(self._cleaned, captions)))
        lengths = self._counter.count(read)
        if not lengths:
            return ["captions: none"]
        longest, ordered = self._text.max_length, sorted(lengths)
        cut = [text for text, length in zip(read, lengths, strict=True) if length > longest]
        return [
            f"captions: {ordered[0]} to {ordered[-1]} tokens, median {ordered[len(ordered) // 2]};"
            f" {len(cut):,} of {len(read):,} are longer than text.max_length {longest} and would be cut",
            *(f"    cut after {self._kept(text)[-_SHOWN:]!r}" for text in sorted(cut)[:_NAMED]),
        ]

    def label(self, caption: str) -> str:
        """A caption as the encoder reads it."""
        text, longest = self._cleaned(caption), self._text.max_length
        return text if self._counter.count([text])[0] <= longest else f"[cut to {longest} tokens] {self._kept(text)}"

    def _cleaned(self, caption: str) -> str:
        return prepare_caption(caption, self._text.captions)

    def _kept(self, text: str) -> str:
        """The words of a cleaned text that are kept in full."""
        words = text.split()
        lengths = self._counter.count([" ".join(words[: count + 1]) for count in range(len(words))])
        return " ".join(words[: sum(length <= self._text.max_length for length in lengths)])


def _some(what: str, lines: Sequence[str]) -> list[str]:
    """A line `what: number`, and the first few lines."""
    named = [f"    {line}" for line in lines[:_NAMED]]
    more = [f"    and {len(lines) - _NAMED:,} more"] if len(lines) > _NAMED else []
    return [f"  {what}: {len(lines):,}", *named, *more]
