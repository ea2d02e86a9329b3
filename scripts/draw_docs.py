"""Draws the pictures of the documentation again, by the commands and the Python that the pages show.

    python scripts/draw_docs.py                  list them, and what each needs
    python scripts/draw_docs.py lecture editing  draw these
    python scripts/draw_docs.py --all            draw all that need nothing but this package

Pictures that need a finished run, a data set or a browser are listed with the command that draws them.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import click
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
TAXI = ("a yellow taxi, noto style", 7978157447021325922)


@dataclass(frozen=True)
class Drawing:
    """Pictures of docs/, by name.

    draw: writes them into a folder that looks like the checkout; None: a person runs `how`, which needs more than this
    package. page: the page that shows them.
    """

    pictures: tuple[str, ...]
    page: str
    draw: Callable[[Path], None] | None = None
    how: str = ""


def blocks(page: str, language: str) -> list[str]:
    """The code blocks of a page in one language."""
    text = (DOCS / page).read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def run(command: Sequence[str] | str, folder: Path) -> None:
    """Run a command line, or a program with its arguments. Raises ClickException with what it said if it fails."""
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {
        "MPLBACKEND": "Agg",
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
    }
    line = isinstance(command, str)
    done = subprocess.run(command, shell=line, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise click.ClickException(f"{command if line else ' '.join(command)} failed:\n{done.stderr[-2000:]}")


def draw_lecture(folder: Path) -> None:
    """The Python of docs/lecture.md, in one session."""
    (folder / "lecture.py").write_text("\n".join(blocks("lecture.md", "python")), encoding="utf-8")
    run([sys.executable, "lecture.py"], folder)


def draw_bundled(folder: Path) -> None:
    """The fixed prompts of the model card, seed 0."""
    run([sys.executable, "scripts/draw_model_card.py", "--out", "bundled.png"], folder)


def draw_words(folder: Path) -> None:
    """Prompts as users type them, seed 0 for each."""
    prompts = ("a cat", "a dog", "a house", "a red car", "a robot", "two cats", "a castle at night")
    script = f"""
from cascade import CascadePipeline
from cascade.pictures.images import contact_sheet

prompts = {[*prompts, "an astronaut riding a horse"]!r}
images = CascadePipeline.from_pretrained()(prompts, seed=0).images
contact_sheet(images, columns=4, labels=prompts, cell=256).quantize(256).save("bundled-words.png", optimize=True)
"""
    run([sys.executable, "-c", script], folder)


def drawn(folder: Path) -> list[Image.Image]:
    """The pictures of a run, in order."""
    return [Image.open(path).convert("RGB") for path in sorted(folder.glob("0*.png"))]


def beside(pictures: Sequence[Image.Image], height: int, gap: int = 8) -> Image.Image:
    """Pictures side by side at one height, the pixels of small ones enlarged to squares."""
    sized = [
        picture.resize((picture.width * height // picture.height, height), Image.Resampling.NEAREST)
        for picture in pictures
    ]
    row = Image.new("RGB", (sum(picture.width for picture in sized) + gap * (len(sized) - 1), height), "white")
    left = 0
    for picture in sized:
        row.paste(picture, (left, 0))
        left += picture.width + gap
    return row


def generate(folder: Path, out: str, prompt: str, *options: str) -> list[Image.Image]:
    """What `cascade generate` draws."""
    run(["cascade", "generate", prompt, *options, "--out", out], folder)
    return drawn(folder / out)


def draw_editing(folder: Path) -> None:
    """A taxi and what becomes of it: the commands of docs/editing.md at 256 px."""
    prompt, seed = TAXI
    (taxi,) = generate(folder, "taxi", prompt, "--seed", str(seed), "--until", "256")
    taxi.save(folder / "taxi.png")
    mask = Image.new("L", taxi.size, 0)
    mask.paste(255, (64, 88, 200, 140))  # its windows
    mask.save(folder / "mask.png")
    changed = ("--image", "taxi.png", "--until", "256", "--seed", "4")
    row = [taxi]
    row += generate(folder, "bus-less", "a red bus, noto style", *changed, "--strength", "0.8")
    row += generate(folder, "bus", "a red bus, noto style", *changed, "--strength", "0.9")
    masked = ("--mask", "mask.png", "--resampling", "2")
    row += generate(folder, "windows", "a blue taxi, noto style", *changed, *masked)
    row += generate(folder, "vary", prompt, "--seed", str(seed), "--variation", "9", "0.4", "--until", "256")
    row += generate(folder, "wide", prompt, *changed, "--extend", "left=32,right=32")
    beside(row, 256).quantize(256).save(folder / "editing.png", optimize=True)


def draw_prompts(folder: Path) -> None:
    """Two regions, a composed and a scheduled prompt; below, a way between two prompts."""
    commands = {line.rpartition(" ")[2]: line for line in "".join(blocks("editing.md", "sh")).splitlines()}
    for name in ("regions", "composed", "scheduled", "way"):
        run(commands[name], folder)
    top = beside([picture for name in ("regions", "composed", "scheduled") for picture in drawn(folder / name)], 192)
    way = beside(drawn(folder / "way"), 92)
    sheet = Image.new("RGB", (max(top.width, way.width), top.height + 8 + way.height), "white")
    sheet.paste(top, (0, 0))
    sheet.paste(way, (0, top.height + 8))
    sheet.quantize(256).save(folder / "prompts.png", optimize=True)


def draw_matrix(folder: Path) -> None:
    """The sheet over steps and guidance, as its command writes it."""
    commands = {line.rpartition(" ")[2]: line for line in "".join(blocks("editing.md", "sh")).splitlines()}
    run(commands["sheet"], folder)
    shutil.copy(folder / "sheet" / "matrix.png", folder / "matrix.png")


def draw_trace(folder: Path) -> None:
    """The base stage's sheet of a trace."""
    run('cascade trace "a fox, noto style" --seed 7 --until 256 --out trace', folder)
    shutil.copy(folder / "trace" / "sheet.png", folder / "trace.png")


LECTURE = ("forward", "posterior", "denoiser", "samples", "guidance", "cascade")
SCREENS = ("", "-mask", "-think", "-training")
STUDIO = "a browser, with `cascade studio` on a folder of drawn pictures and of runs"
DRAWINGS = {
    "lecture": Drawing(tuple(f"lecture-{name}.png" for name in LECTURE), "lecture.md", draw_lecture),
    "bundled": Drawing(("bundled.png",), "../cascade/pretrained/README.md", draw_bundled),
    "words": Drawing(("bundled-words.png",), "../cascade/pretrained/README.md", draw_words),
    "editing": Drawing(("editing.png",), "editing.md", draw_editing),
    "prompts": Drawing(("prompts.png",), "editing.md", draw_prompts),
    "matrix": Drawing(("matrix.png",), "editing.md", draw_matrix),
    "trace": Drawing(("trace.png",), "studio.md", draw_trace),
    "hero": Drawing(("hero.png",), "index.md", how="six pictures that we like, chosen by hand when the weights change"),
    "fine-tune": Drawing(
        ("fine-tune.png",), "fine-tune.md", how="the run of that page, then python scripts/draw_fine_tune.py"
    ),
    "sr": Drawing(("sr.png",), "super-resolution.md", how="python scripts/draw_super_resolution.py --data DATA"),
    "other": Drawing(
        ("bands.png", "gray.png", "sprites.png"),
        "other-pictures.md",
        how="the runs of that page, and sheets of what they draw",
    ),
    "make": Drawing(
        ("make.png", "make-from.png"), "make.md", how="`cascade make` as on that page: sheet.png of its folder"
    ),
    "conditions": Drawing(("conditions.png",), "conditions.md", how="scripts/check_conditions.py, with --sheet"),
    "studio": Drawing(
        tuple(f"studio{part}.png" for part in ("", "-mask", "-think", "-training")), "studio.md", how=STUDIO
    ),
}


@click.command(help=__doc__)
@click.argument("names", nargs=-1, type=click.Choice(list(DRAWINGS)))
@click.option("--all", "everything", is_flag=True, help="Draw all that need nothing but this package.")
@click.option("--out", default=DOCS, show_default="docs", type=click.Path(file_okay=False, path_type=Path))
def main(names: tuple[str, ...], everything: bool, out: Path) -> None:
    chosen = list(names) or [name for name, drawing in DRAWINGS.items() if everything and drawing.draw]
    if not chosen:
        for name, drawing in DRAWINGS.items():
            print(f"{name:10} {', '.join(drawing.pictures)}{f': {drawing.how}' if drawing.how else ''}")
    out.mkdir(parents=True, exist_ok=True)
    for name in chosen:
        drawing = DRAWINGS[name]
        if drawing.draw is None:
            raise click.ClickException(f"{name} needs more than this package: {drawing.how}")
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            for part in ("configs", "scripts"):
                shutil.copytree(ROOT / part, folder / part)
            drawing.draw(folder)
            for picture in drawing.pictures:
                shutil.copy(folder / picture, out / picture)
                print(out / picture, flush=True)


if __name__ == "__main__":
    main()
