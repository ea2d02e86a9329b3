"""`cascade evaluate`: measures the pictures that a cascade draws."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cascade.cli.generate import for_stages
from cascade.cli.terminal import path_argument, path_option, say
from cascade.config.values import number, whole_number
from cascade.errors import CascadeError
from cascade.seeds import MAX_SEED

if TYPE_CHECKING:
    from cascade.evaluation.report import Request, Suite
    from cascade.pipeline import CascadePipeline


def _scenes() -> Suite:
    from cascade.evaluation.scenes import run

    return run


def _art() -> Suite:
    from cascade.evaluation.art import run

    return run


def _sr() -> Suite:
    from cascade.evaluation.super_resolution import run

    return run


SUITES: dict[str, Callable[[], Suite]] = {"scenes": _scenes, "art": _art, "sr": _sr}
"""The suites by name; each is imported when it is used."""

UNUSED: dict[str, tuple[str, ...]] = {
    "scenes": ("data", "until", "further", "clip", "inception"),
    "sr": ("until", "further", "clip", "inception"),
}
"""Options that a suite does not use; the command refuses them for it."""

_OF_RGB = ("scenes", "art")
"""Suites whose judges see pictures in red, green and blue of 8 bits alone."""

SAMPLING = ("steps", "guidance", "sampler")

VERSIONS = ("torch", "transformers", "tokenizers", "pillow", "numpy")
"""Packages whose version may change a figure."""


@click.command()
@path_argument("model", required=False)
@click.option("--suite", type=click.Choice(tuple(SUITES)), required=True, help="The measurements to make.")
@path_option("--out", default="evaluation", show_default=True, metavar="FOLDER", help="Folder of the report.")
@click.option("--seed", type=click.IntRange(0, MAX_SEED), default=0, show_default=True, help="For prompts and noise.")
@click.option("--limit", type=click.IntRange(min=1), metavar="N", help="Maximum pictures; default: the suite's own.")
@path_option("--data", metavar="FOLDER", help="Real pictures: the Parquet files of scripts/prepare_data.py.")
@click.option("--until", type=click.IntRange(min=1), metavar="SIZE", help="Side of the largest pictures measured.")
@click.option("--further", type=click.IntRange(min=1), metavar="N", help="Pictures of each other style of the data.")
@path_option("--clip", metavar="MODEL", help="A CLIP model, folder or hub id: adds its score to the art suite.")
@path_option("--inception", metavar="FILE", help="Inception weights: adds the Frechet distance to the art suite.")
@for_stages("--steps", whole_number, "Sampling steps, e.g. 20 or base=20,sr256=4.")
@for_stages("--guidance", number, "Weight of the prompt, 1 = none.")
@for_stages("--sampler", str, "By name; docs/configuration.md lists them.")
@click.option("--batch-size", type=click.IntRange(min=1), default=8, show_default=True, help="Pictures per call.")
@click.option("--device", help="cpu, cuda, cuda:1, ...; default: the GPU if there is one.")
@click.option(
    "--dtype",
    help="float32, bfloat16, float16, or auto, the fastest; default: bfloat16 if the GPU has it.",
)
@click.option("--quiet", is_flag=True, help="Show no progress.")
def evaluate(model: str | None, suite: str, out: str, device: str | None, dtype: str | None, **values: Any) -> int:
    """Measure the pictures that a cascade draws; writes report.json, report.md and contact.png to FOLDER.

    MODEL is a folder or hub id; default: the bundled cascade. The same call gives the same numbers; docs/evaluation.md
    explains each of them.

    \b
    cascade evaluate --suite scenes --out report
    cascade evaluate my-cascade --suite art --data data --limit 200
    cascade evaluate --suite sr --data data
    """
    from cascade.evaluation.report import markdown, write_report
    from cascade.pipeline import CascadePipeline

    _check(suite, out, values)
    measure = SUITES[suite]()
    request = _request(values)
    pipeline = CascadePipeline.from_pretrained(model, device=device, dtype=dtype)
    if suite in _OF_RGB and not pipeline.pictures.is_rgb:
        raise CascadeError(
            f"--suite {suite}: its judges, the Frechet distance and CLIP want three channels of 8 bits, this model"
            f" draws {pipeline.pictures}; --suite sr measures any channels"
        )
    run = _run(model, pipeline, request)
    report = measure(pipeline, request)
    write_report(report, run, out)
    say(markdown(report, run))
    say(f"report.json, report.md and contact.png in {out}")
    return 0


def _check(suite: str, out: str, values: dict[str, Any]) -> None:
    """Raises CascadeError for mistakes that would otherwise show only after all drawing, or never."""
    from cascade.evaluation.report import check_folder

    for option in UNUSED.get(suite, ()):
        if values[option] is not None:
            raise CascadeError(f"--{option}: the suite {suite} does not use it; leave it out")
    place = next(folder for folder in (Path(out), *Path(out).absolute().parents) if folder.exists())
    if not place.is_dir() or not os.access(place, os.W_OK):
        raise CascadeError(f"--out {out}: {place} is not a writable folder; name another")
    check_folder(Path(out))


def _request(values: dict[str, Any]) -> Request:
    from cascade.evaluation.report import Request

    return Request(
        seed=values["seed"],
        limit=values["limit"],
        sampling={name: values[name] for name in SAMPLING if values[name] is not None},
        batch_size=values["batch_size"],
        data=None if values["data"] is None else Path(values["data"]),
        until=values["until"],
        further=values["further"] or 0,
        clip=values["clip"],
        inception=values["inception"],
        progress=sys.stderr.isatty() and not values["quiet"],
    )


def _run(model: str | None, pipeline: CascadePipeline, request: Request) -> dict[str, Any]:
    """The report's entries about the run: all that is needed to repeat it, and nothing that a repetition changes."""
    import torch

    from cascade._version import __version__
    from cascade.batch.metadata import weights_sha256
    from cascade.evaluation.report import used_sampling
    from cascade.storage.index import read_index

    return {
        "model": {"name": pipeline.name, "sha256": weights_sha256(read_index(model))},
        "versions": {"cascade": __version__, **{name: version(name) for name in VERSIONS}},
        "seed": request.seed,
        "settings": {
            "limit": request.limit,
            "batch_size": request.batch_size,
            "device": pipeline.device.type,
            "dtype": str(pipeline.dtype).removeprefix("torch."),
            "threads": torch.get_num_threads(),
            "sampling": used_sampling(pipeline, request),
        },
    }
