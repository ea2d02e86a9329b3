"""The report of a run: named figures and a contact sheet; and the drawing that it measures.

A suite is a function (pipeline, request) -> Report. It draws with `cascade.evaluation.report.draw` and measures; the
model and the versions, common to all suites, are added when the report is written.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeAlias, cast

import torch
from PIL import Image
from torch import nn

from cascade.drawing.arguments import resolve_sampling
from cascade.errors import CascadeError
from cascade.files.atomic import atomic_file, read_json, write_json, write_text
from cascade.pictures.images import contact_sheet
from cascade.pipeline import CascadePipeline
from cascade.seeds import derive_seed

FILES = ("report.json", "report.md", "contact.png")
FORMAT = 1
"""Format number of report.json; it increases when a key changes its meaning."""
_COLUMNS = 6
_CELL = 192  # pixels of a picture on the sheet: labels of about 30 letters stay readable

Direction: TypeAlias = Literal["higher", "lower", "as true"]
"""The better direction of a figure; "as true": nearer to the figure of the true pictures is better."""

PerStage: TypeAlias = float | str | Mapping[str, float] | Mapping[str, str] | None


@dataclass(frozen=True, kw_only=True)
class Request:
    """Arguments of a suite; each field is an option of `cascade evaluate`.

    seed: of the choice of prompts and of all noise.  limit: maximum number of pictures, None: the suite's default.
    sampling: arguments of `CascadePipeline.__call__` by name, such as steps; one value or {stage: value}.
    batch_size: pictures per network call.  data: folder of prepared Parquet files, for suites that need true pictures.
    until: side of the largest drawn pictures, None: the largest size of the true ones.
    further: number of drawings in each style on which the art suite's judge was not trained.
    clip, inception: the user's weights, for the commonly published figures.
    progress: whether a bar is shown.
    """

    seed: int = 0
    limit: int | None = None
    sampling: Mapping[str, PerStage] = field(default_factory=dict)
    batch_size: int = 8
    data: Path | None = None
    until: int | None = None
    further: int = 0
    clip: str | None = None
    inception: str | None = None
    progress: bool = False


@dataclass(frozen=True)
class Figure:
    """One measured number.

    unit: such as "share" (0 to 1) or "dB".  count: number of pictures, or objects, measured.
    reference: the same figure for true pictures, if defined: the ceiling, or the floor of a distance.
    """

    name: str
    value: float
    unit: str
    better: Direction
    count: int
    reference: float | None = None

    def __post_init__(self) -> None:
        assert math.isfinite(self.value), self.name
        assert self.count > 0, self.name


@dataclass(frozen=True)
class Report:
    """The results of a suite.

    pictures: of the contact sheet, each with its label, in an order fixed before drawing.  columns: of the sheet.
    settings: values other than the request on which the figures depend, such as a hash of the data.
    notes: sentences below the table.
    """

    suite: str
    figures: Sequence[Figure]
    pictures: Sequence[tuple[Image.Image, str]]
    columns: int = _COLUMNS
    cell: int = _CELL
    settings: Mapping[str, Any] = field(default_factory=dict)
    notes: Sequence[str] = ()

    def __post_init__(self) -> None:
        names = [figure.name for figure in self.figures]
        assert len(set(names)) == len(names), "two figures with the same name"


Suite = Callable[[CascadePipeline, Request], Report]


def share(name: str, outcomes: Sequence[bool], reference: float | None = None) -> list[Figure]:
    """The share of true outcomes as a figure; an empty list without outcomes, as a small limit may cause."""
    if not outcomes:
        return []
    return [Figure(name, sum(outcomes) / len(outcomes), "share", "higher", len(outcomes), reference)]


def judge_sha256(network: nn.Module) -> str:
    """Hexadecimal SHA-256 of a judging network's weights: figures of different judges are not comparable."""
    digest = hashlib.sha256()
    for name, tensor in sorted(network.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def check_folder(folder: Path) -> None:
    """Raise CascadeError for files that a report would replace, unless they belong to an earlier report."""
    there = [folder / name for name in FILES if (folder / name).exists()]
    if there and not _is_report(folder / FILES[0]):
        raise CascadeError(f"{there[0]}: exists, but is not from a report; move it, or name another --out")


def _is_report(path: Path) -> bool:
    try:
        return read_json(path).keys() >= {"format", "suite", "figures"}
    except CascadeError:
        return False


def write_report(report: Report, run: Mapping[str, Any], folder: str | Path) -> None:
    """Write report.json, report.md and contact.png, each atomically, replacing those of an earlier run.

    run: facts from the command: model, versions, seed, settings. It contains neither time nor paths, so that equal runs
    write equal bytes.
    """
    folder = Path(folder)
    settings = {**run.get("settings", {}), **report.settings}
    data = {
        "format": FORMAT,
        "suite": report.suite,
        **run,
        "settings": settings,
        "figures": [asdict(figure) for figure in report.figures],
        "notes": list(report.notes),
    }
    write_text(folder / "report.md", markdown(report, run))
    pictures, labels = zip(*report.pictures, strict=True)
    sheet = contact_sheet(pictures, columns=report.columns, labels=labels, cell=report.cell)
    with atomic_file(folder / "contact.png") as temporary:
        sheet.save(temporary, "PNG", optimize=True)
    write_json(folder / "report.json", data)  # written last: if it exists, so do the others


def markdown(report: Report, run: Mapping[str, Any]) -> str:
    """The figures as one table, with the better direction of each."""
    lines = [f"# {run['model']['name']}: {report.suite}", ""]
    lines += [f"Seed {run['seed']}, weights {run['model']['sha256'][:12]}, {_versions(run)}.", ""]
    lines += [
        "| figure | measured | true pictures | unit | better | over |",
        "| --- | ---: | ---: | --- | --- | ---: |",
    ]
    for figure in report.figures:
        reference = "" if figure.reference is None else shown(figure.reference, figure.unit)
        cells = (figure.name, shown(figure.value, figure.unit), reference, figure.unit, figure.better, figure.count)
        lines.append(f"| {' | '.join(map(str, cells))} |")
    for note in report.notes:
        lines += ["", note]
    return "\n".join(lines) + "\n"


def shown(value: float, unit: str) -> str:
    """A number formatted for the table: a share with three decimals, anything else with four digits."""
    return f"{value:.3f}" if unit == "share" else f"{value:.4g}"


def _versions(run: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {version}" for name, version in run["versions"].items())


# --- drawing ---------------------------------------------------------------------------------------------------------
# Drawing for a measurement: every prompt has its own seed, derived from the run's seed and the prompt's text.


def draw(
    pipeline: CascadePipeline, prompts: Sequence[str], request: Request, until: int | None = None
) -> list[Image.Image]:
    """A picture for each prompt, from the stage of `until` px; None: the base stage.

    The noise depends on (run seed, text, number of earlier equal texts), not on the other prompts.
    """
    until = until or base_resolution(pipeline)
    output = pipeline(prompts, seed=prompt_seeds(prompts, request.seed), until=until, **_arguments(request))
    return cast(list[Image.Image], output.images)


def draw_stages(
    pipeline: CascadePipeline, prompts: Sequence[str], request: Request, counts: Mapping[int, int]
) -> dict[int, list[Image.Image]]:
    """Pictures of several stages by size, each of the first `counts[size]` prompts; larger sizes have fewer.

    A prompt's pictures of all sizes are drawn in one run, with the noise of `draw`.
    """
    seeds = prompt_seeds(prompts, request.seed)
    drawn: dict[int, list[Image.Image]] = {size: [] for size in sorted(counts)}
    start = 0
    for size in sorted(counts, reverse=True):
        end = max(start, min(counts[size], len(prompts)))
        if end > start:
            output = pipeline(list(prompts[start:end]), seed=seeds[start:end], until=size, **_arguments(request))
            for smaller in (other for other in drawn if other <= size):
                drawn[smaller] += cast(list[Image.Image], output.stages[smaller])
        start = end
    return drawn


def _arguments(request: Request) -> dict[str, Any]:
    """Of the pipeline; without the model's default style, because a suite measures its own prompts."""
    own = {"batch_size": request.batch_size, "progress": request.progress}
    return {**request.sampling, **own, "default_style": "none"}


def prompt_seeds(prompts: Sequence[str], seed: int) -> list[int]:
    """The seed of each prompt; equal prompts get different ones."""
    seen: dict[str, int] = {}
    seeds = []
    for prompt in prompts:
        seen[prompt] = seen.get(prompt, -1) + 1
        seeds.append(derive_seed(seed, "evaluate", prompt, seen[prompt]))
    return seeds


def base_resolution(pipeline: CascadePipeline) -> int:
    """Resolution of the first stage, in pixels."""
    return pipeline.slots[0].config.resolution


def used_sampling(pipeline: CascadePipeline, request: Request) -> dict[str, Any]:
    """The complete sampling settings of every stage, including the model's defaults.

    Raises CascadeError for a stage or value that does not exist, before anything is drawn.
    """
    configs = [slot.config for slot in pipeline.slots]
    settings = resolve_sampling(configs, None, request.sampling)
    return {name: setting.model_dump(mode="json") for name, setting in settings.items()}
