"""Aspect-ratio buckets: one shape per batch, nothing cut off, and views that depend on their number alone."""

from __future__ import annotations

import io
from collections import Counter
from contextlib import closing
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from cascade.config.data import DataConfig, FolderSource, HubSource, ScenesSource, WebDatasetSource
from cascade.config.stage import StageConfig
from cascade.data.buckets import Buckets, bucket_sizes, nearest, size_of
from cascade.data.loader import Batch, Portion, batches
from cascade.data.records import Record
from cascade.errors import CascadeError
from cascade.settings import parse

STAGE = StageConfig(name="base", resolution=16)
ASPECTS = (1.0, 2.0, 0.5)
SHAPES = {"square": (20, 20), "wide": (60, 30), "high": (21, 42)}
"""Width and height of the pictures; as many of each as its place says."""
COUNTS = {"square": 4, "wide": 8, "high": 4}


def picture(kind: str, number: int) -> Image.Image:
    """Red at the left and top end, blue at the other one, and the number in the green of the middle."""
    width, height = SHAPES[kind]
    image = Image.new("RGB", (width, height), (0, 10 * number, 0))
    for edge, colour in ((0, (255, 0, 0)), (1, (0, 0, 255))):
        length = (width, height)[kind == "high"] // 10
        start = edge * ((width, height)[kind == "high"] - length)
        box = (0, start, width, start + length) if kind == "high" else (start, 0, start + length, height)
        image.paste(colour, box)
    return image


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "pictures"
    folder.mkdir()
    number = 0
    for kind, count in COUNTS.items():
        for _ in range(count):
            picture(kind, number).save(folder / f"{number:02}.png")
            (folder / f"{number:02}.txt").write_text(f"{kind} {number}")
            number += 1
    return folder


def settings(folder: Path, **changes: Any) -> DataConfig:
    source = FolderSource(path=str(folder))
    return DataConfig(**{"sources": (source,), "caption_dropout": 0.0, "buckets": ASPECTS, **changes})


def some(data: DataConfig, count: int, batch_size: int = 4, **how: Any) -> list[Batch]:
    with closing(batches(data, STAGE, 7, batch_size=batch_size, **how)) as stream:
        return list(islice(stream, count))


def assert_equal(one: list[Batch], other: list[Batch]) -> None:
    assert len(one) == len(other)
    for a, b in zip(one, other, strict=True):
        assert torch.equal(a.images, b.images)
        assert (a.captions, a.samples) == (b.captions, b.samples)


def test_a_bucket_has_about_the_area_of_the_square_and_sides_that_the_network_divides() -> None:
    stage = StageConfig(name="base", resolution=64)
    aspects = (1.0, 0.67, 1.5, 2.0, 0.5)
    sizes = bucket_sizes(aspects, stage)
    assert sizes[0] == (64, 64)
    assert len(sizes) == len(aspects)
    step = stage.geometry.divisor
    for (height, width), aspect in zip(sizes, aspects, strict=True):
        assert height % step == width % step == 0
        assert height * width == pytest.approx(64 * 64, rel=step / 32)
        assert width / height == pytest.approx(aspect, rel=step / 32)
    assert bucket_sizes((1.0, 1.01), stage) == [(64, 64)]


def test_the_nearest_bucket_is_that_of_the_nearest_factor() -> None:
    sizes = [(10, 10), (10, 20), (20, 10)]
    assert [nearest(size, sizes) for size in ((7, 7), (100, 141), (100, 142), (142, 100), (10, 90))] == [0, 0, 1, 2, 1]


def test_the_shape_of_a_picture_is_that_in_which_it_is_shown() -> None:
    buffer, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    Image.new("RGB", (30, 10)).save(buffer, "JPEG", exif=exif)
    assert size_of(Record(buffer.getvalue(), ("a",), "x")) == (30, 10)
    assert size_of(Record(Image.new("L", (30, 10)), ("a",), "x")) == (10, 30)
    assert size_of(Record(torch.zeros(3, 4, 5, dtype=torch.uint8), ("a",), "x")) == (4, 5)
    assert size_of(Record(b"no picture", ("a",), "x")) is None


@pytest.mark.parametrize("aspect", ["crop", "pad"])
def test_each_batch_has_one_shape_and_no_end_of_a_picture_is_lost(folder: Path, aspect: Any) -> None:
    sizes = dict(zip(SHAPES, bucket_sizes(ASPECTS, STAGE), strict=True))
    for batch in some(settings(folder, aspect=aspect), 40):
        (kind,) = {caption.split()[0] for caption in batch.captions}
        assert tuple(batch.images.shape[-2:]) == sizes[kind]
        for image in batch.images.float():
            along = image.mean(dim=2 if kind == "high" else 1)  # (3, positions)
            assert along[0, 0] > 180  # the red end
            assert along[2, -1] > 180  # the blue one


def test_in_squares_the_ends_are_cut_off(folder: Path) -> None:
    """The answer that buckets give is not that of any other setting."""
    for batch in some(settings(folder, aspect="crop", buckets=None), 10):
        for caption, image in zip(batch.captions, batch.images.float(), strict=True):
            if not caption.startswith("square"):
                assert image[0].max() < 180


def test_every_picture_is_used_as_often_as_the_others(folder: Path) -> None:
    captions = Counter(caption for batch in some(settings(folder), 400) for caption in batch.captions)
    assert len(captions) == sum(COUNTS.values())
    assert max(captions.values()) - min(captions.values()) <= 0.25 * 100  # 100 each, and the chance of 400 batches


def test_after_a_resume_and_in_several_processes_workers_and_passes_the_views_are_the_same(folder: Path) -> None:
    whole = some(settings(folder), 12)
    assert len({batch.images.shape for batch in whole}) == 3
    assert_equal(some(settings(folder), 5, portion=Portion(first_batch=7)), whole[7:])
    assert_equal(some(settings(folder, workers=2), 12), whole)
    halves = [some(settings(folder), 12, portion=Portion(process, 2)) for process in (0, 1)]
    for batch, one, other in zip(whole, *halves, strict=True):
        assert torch.equal(torch.cat([one.images, other.images]), batch.images)
    passes = some(settings(folder), 24, batch_size=2, portion=Portion(unit=4))  # two for each step
    for place, batch in enumerate(whole):
        assert torch.equal(torch.cat([one.images for one in passes[2 * place : 2 * place + 2]]), batch.images)


def test_tar_shards_are_sorted_as_well(folder: Path, tmp_path: Path) -> None:
    import tarfile

    for shard in (0, 1):
        with tarfile.open(tmp_path / f"{shard}.tar", "w") as file:
            for path in sorted(folder.iterdir())[shard * 16 : (shard + 1) * 16]:
                file.add(path, path.name)
    tars = WebDatasetSource(files=(str(tmp_path / "*.tar"),), shuffle_block=5)
    found = some(settings(folder, sources=(tars,)), 40)
    for batch in found:
        assert len({caption.split()[0] for caption in batch.captions}) == 1
    assert len({caption for batch in found for caption in batch.captions}) == sum(COUNTS.values())
    assert_equal(some(settings(folder, sources=(tars,)), 3, portion=Portion(first_batch=9)), found[9:12])


def test_a_broken_picture_is_a_bad_record_of_the_square_bucket(folder: Path, tmp_path: Path) -> None:
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "00.png").write_bytes(b"no picture")
    found = some(settings(tmp_path, max_bad_share=0.5), 30)
    assert not any(caption == "square 0" for batch in found for caption in batch.captions)


def test_drawn_scenes_are_views_of_the_square_bucket(folder: Path) -> None:
    sources = (FolderSource(path=str(folder)), ScenesSource())
    found = some(settings(folder, sources=sources), 60)
    drawn = [batch for batch in found if any("drawn shapes" in caption for caption in batch.captions)]
    assert drawn
    assert {tuple(batch.images.shape[-2:]) for batch in drawn} == {(16, 16)}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sources": (ScenesSource(),), "buckets": (2.0,)}, "data.buckets: drawn scenes are square; add 1"),
        ({"sources": (HubSource(name="x", streaming=True),)}, "data.buckets: the pictures of a stream have unknown"),
    ],
)
def test_pictures_that_cannot_be_sorted_are_refused(folder: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(CascadeError, match=message):
        Buckets(settings(folder, **changes), STAGE, 0, 4)


@pytest.mark.parametrize("changes", [{"crop": 8}, {"decoded": "x"}])
def test_settings_that_need_squares_are_refused(folder: Path, changes: dict[str, Any]) -> None:
    values = {"sources": [{"kind": "folder", "path": str(folder)}], "buckets": [1, 2], **changes}
    with pytest.raises(CascadeError, match="buckets are for whole pictures; leave out crop, tiles, decoded"):
        parse(DataConfig, values, "run.yaml")
