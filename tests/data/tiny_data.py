"""Small synthetic data: a picture's colour is its number, so that a view identifies its record."""

import io
import json
import tarfile
from pathlib import Path

from PIL import Image

SIZE = 8


def plain_picture(number: int, size: int = SIZE) -> Image.Image:
    return Image.new("RGB", (size, size), (number, 255 - number, 7))


def encoded(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def write_folder(folder: Path, count: int, broken: tuple[int, ...] = (), silent: tuple[int, ...] = ()) -> Path:
    """Pictures 000.png, ... with sidecar captions, but for those that are `broken` or `silent`."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        path = folder / f"{number:03}.png"
        path.write_bytes(b"no picture" if number in broken else encoded(plain_picture(number)))
        if number not in silent:
            path.with_suffix(".txt").write_text(f"picture {number}\n")
    return folder


def write_parquet(path: Path, first: int, count: int) -> Path:
    """Rows with a picture, a caption, and a list of caption variants."""
    import datasets
    import pyarrow.parquet as pq

    numbers = range(first, first + max(count, 1))
    features = datasets.Features(
        {
            "image": datasets.Image(),
            "caption": datasets.Value("string"),
            "captions": datasets.List(datasets.Value("string")),
        }
    )
    rows = {
        "image": [{"bytes": encoded(plain_picture(number)), "path": None} for number in numbers],
        "caption": [f"picture {number}" for number in numbers],
        "captions": [[f"picture {number}", f"number {number}"] for number in numbers],
    }
    table = datasets.Dataset.from_dict(rows, features=features)
    path.parent.mkdir(parents=True, exist_ok=True)
    table.to_parquet(path)
    if count == 0:  # which datasets before 5.2 does not write
        schema = pq.read_schema(path)
        with pq.ParquetWriter(path, schema):
            pass
    return path


def write_tar(path: Path, first: int, count: int, *, json_captions: bool = False) -> Path:
    """A WebDataset shard: of each record a picture, a member of no interest, and a caption."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for number in range(first, first + count):
            text = f"picture {number}\nnumber {number}\n"
            caption = ("json", json.dumps({"text": text.splitlines()})) if json_captions else ("txt", text)
            members = {"png": encoded(plain_picture(number)), "cls": b"7", caption[0]: caption[1].encode()}
            for ending, content in members.items():
                info = tarfile.TarInfo(f"{number:04}.{ending}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    return path
