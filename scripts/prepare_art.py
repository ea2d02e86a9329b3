"""Make the emoji data set from public sources: captioned pictures in six styles, as Parquet files.

    python scripts/prepare_art.py --noto noto-emoji --twemoji twemoji --fluent fluentui-emoji \\
        --cldr cldr-json --emoji-test emoji-test.txt --out art

docs/data.md describes the sources, the result, and the next steps. Needs the extra `art`. Finished files are kept, so a
stopped run continues with the next one.
"""

from __future__ import annotations

import hashlib
import os
import random
from collections import defaultdict
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any

import click
import pyarrow as pa
import pyarrow.parquet as pq
from art.captions import STYLES, captions_of
from art.licences import write_licences
from art.sources import Annotation, Concept, find_drawings, left_out, read_annotations, read_concepts
from datasets import Features, Image, List, Value

try:
    import pyvips
    from art.pictures import Picture, make_picture
except (ImportError, OSError) as error:  # OSError: pyvips is installed without its library
    click.echo(f"prepare_art.py: {error}; the extra `art` brings it: pip install 'cascade-diffusion[art]'", err=True)
    raise SystemExit(2) from None

ROWS_PER_GROUP = 100
TEXT = Value("string")
FEATURES = Features(
    {
        "image": Image(),
        **dict.fromkeys(("id", "caption", "caption_styled"), TEXT),
        "captions": List(TEXT),
        **dict.fromkeys(("style", "source", "name"), TEXT),
        "keywords": List(TEXT),
        **dict.fromkeys(("group", "subgroup", "codepoints"), TEXT),
        "skin_tone_support": Value("bool"),
        **dict.fromkeys(("width", "height"), Value("int32")),
        "lossless": Value("bool"),
        **dict.fromkeys(("credit", "split"), TEXT),
    }
)
Job = tuple[Concept, str, Path]


def plan(concepts: Iterable[Concept], drawings: dict[tuple[str, str], Path]) -> dict[str, list[Job]]:
    """File name -> its pictures, in an order that mixes subjects and is the same in every run."""
    files: dict[str, list[Job]] = defaultdict(list)
    unwanted = left_out()
    for concept in concepts:
        for style in STYLES:
            place = (concept.codepoints, style)
            if place in drawings and place not in unwanted:
                name = f"train-{style}" if concept.split == "train" else concept.split
                files[f"{name}.parquet"].append((concept, style, drawings[place]))
    for jobs in files.values():
        jobs.sort(key=lambda job: hashlib.sha256(picture_id(*job[:2]).encode()).digest())
    return files


def picture_id(concept: Concept, style: str) -> str:
    return f"{style}-{concept.codepoints}"


def words_of(concept: Concept, style: str) -> dict[str, Any]:
    """The text columns; random choices in the captions depend only on the id."""
    rng = random.Random(picture_id(concept, style))
    captions = captions_of(concept.caption, concept.subgroup, concept.keywords, STYLES[style], rng)
    return {
        "id": picture_id(concept, style),
        "caption": concept.caption,
        "caption_styled": captions[1],
        "captions": captions,
        "style": style,
        "source": style.partition("_")[0],
        "name": concept.name,
        "keywords": concept.keywords,
        "group": concept.group,
        "subgroup": concept.subgroup,
        "codepoints": concept.codepoints,
        "skin_tone_support": concept.skin_tone_support,
        "credit": "",
        "split": concept.split,
    }


def draw(job: Job) -> Picture | str:
    """The picture of a job, or the reason why it cannot be made."""
    _, style, drawing = job
    try:
        return make_picture(drawing, style)
    except (pyvips.Error, OSError) as error:
        return f"{drawing}: {str(error).strip().splitlines()[0]}"


def row_of(job: Job, picture: Picture) -> dict[str, Any]:
    """One row of the data set."""
    words = words_of(*job[:2])
    image = {"bytes": picture.encoded, "path": f"{words['id']}.{picture.suffix}"}
    size = {"width": picture.width, "height": picture.height, "lossless": picture.lossless}
    return {"image": image, **words, **size}


def write_file(path: Path, jobs: list[Job], pool: ThreadPoolExecutor) -> list[str]:
    """Write one file atomically; returns the drawings that could not be read."""
    partial = path.with_suffix(".partial")
    failures = []
    with pq.ParquetWriter(partial, FEATURES.arrow_schema, compression="zstd") as writer:
        for group in groups_of(jobs):
            drawn = list(zip(group, pool.map(draw, group), strict=True))
            failures += [result for _, result in drawn if isinstance(result, str)]
            rows = [row_of(job, result) for job, result in drawn if not isinstance(result, str)]
            if rows:
                writer.write_table(pa.Table.from_pylist(rows, schema=FEATURES.arrow_schema))
    partial.replace(path)
    return failures


def groups_of(jobs: Iterable[Job]) -> Iterator[list[Job]]:
    """Groups of pictures that are in memory together: the row groups."""
    rest = iter(jobs)
    while group := list(islice(rest, ROWS_PER_GROUP)):
        yield group


def write_captions(path: Path, files: dict[str, list[Job]], annotations: dict[str, Annotation]) -> int:
    """Write captions.txt: the training captions, and all CLDR names and keyword lists; returns the number of lines."""
    lines = {line for jobs in files.values() for job in jobs if job[0].split == "train" for line in captions_in(job)}
    lines |= {annotation.name for annotation in annotations.values()}
    lines |= {", ".join(annotation.keywords) for annotation in annotations.values() if len(annotation.keywords) > 1}
    mixed = sorted(lines, key=lambda line: hashlib.sha256(line.encode()).digest())
    partial = path.with_suffix(".partial")
    partial.write_text("\n".join(mixed) + "\n", encoding="utf-8")
    partial.replace(path)
    return len(mixed)


def captions_in(job: Job) -> list[str]:
    captions: list[str] = words_of(*job[:2])["captions"]
    return captions


def folder_option(name: str, repository: str) -> Any:
    """An option for a source's folder."""
    path = click.Path(exists=True, file_okay=False, path_type=Path)
    return click.option(name, type=path, required=True, help=f"Checkout of {repository}.")


@click.command(help="Make the emoji data set from public sources; docs/data.md says where they come from.")
@folder_option("--noto", "googlefonts/noto-emoji")
@folder_option("--twemoji", "jdecked/twemoji")
@folder_option("--fluent", "microsoft/fluentui-emoji or shuding/fluentui-emoji-unicode")
@folder_option("--cldr", "unicode-org/cldr-json")
@click.option(
    "--emoji-test",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    required=True,
    help="Unicode's emoji-test.txt.",
)
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), required=True, help="Folder to write to.")
@click.option(
    "--workers",
    type=click.IntRange(min=1),
    default=os.cpu_count() or 1,
    show_default="the number of cores",
    help="Number of pictures drawn in parallel.",
)
def main(emoji_test: Path, out: Path, workers: int, **sources: Path) -> None:
    annotations = read_annotations(sources["cldr"])
    concepts = read_concepts(emoji_test, annotations)
    drawings = find_drawings(sources["noto"], sources["twemoji"], sources["fluent"])
    files = plan(concepts, drawings)
    folder = out / "emoji"
    folder.mkdir(parents=True, exist_ok=True)
    failures = []
    with ThreadPoolExecutor(workers) as pool:
        for name, jobs in sorted(files.items()):
            if (folder / name).exists():
                click.echo(f"emoji/{name}: already there; delete it to make it again, with what was missing")
                continue
            failed = write_file(folder / name, jobs, pool)
            failures += failed
            click.echo(f"emoji/{name}: {len(jobs) - len(failed)} pictures")
    click.echo(f"captions.txt: {write_captions(out / 'captions.txt', files, annotations)} lines")
    missing = write_licences(sources, out)
    for line in (*failures, *missing):
        click.echo(f"missing: {line}", err=True)
    if failures or missing:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
