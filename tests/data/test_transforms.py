"""From record to view, with answers known beforehand."""

import io
import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from tiny_data import encoded

from cascade.config.data import DataConfig, ScenesSource
from cascade.config.stage import StageConfig
from cascade.data.records import BadRecordError, Record
from cascade.data.sources import open_source
from cascade.data.transforms import (
    choose_caption,
    crop_corner,
    decode,
    jitter,
    resize,
    square,
    training_pair,
)
from cascade.models.unet import UNetConfig
from cascade.pictures.images import downsample, from_pil, to_float, to_uint8

MODEL = UNetConfig(channels=(32,), blocks=(1,), strides=(1,), attention=(False,))
SUPER_RESOLUTION = StageConfig(name="upscaler", resolution=64, low_resolution=16, model=MODEL)


def data(**settings: object) -> DataConfig:
    return DataConfig.model_validate({"sources": (ScenesSource(),), **settings})


def training_picture(record: Record, data: DataConfig, stage: StageConfig, rng: random.Random) -> torch.Tensor:
    """The large picture alone."""
    return training_pair(record, data, stage, rng)[0]


def random_picture(height: int, width: int) -> torch.Tensor:
    rng = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (3, height, width), dtype=torch.uint8, generator=rng)


def as_record(picture: torch.Tensor) -> Record:
    return Record(Image.fromarray(picture.permute(1, 2, 0).numpy()), ("a picture",), "test")


def test_a_stored_picture_is_the_same_from_bytes_path_and_pil(tmp_path: Path) -> None:
    image = Image.new("RGB", (3, 2), "orange")
    path = tmp_path / "picture.png"
    path.write_bytes(encoded(image))
    pictures = [decode(Record(stored, (), "test")) for stored in (image, path, path.read_bytes())]
    assert all(torch.equal(picture, from_pil(image)) for picture in pictures)


@pytest.mark.parametrize(
    "stored", [None, b"", b"no picture", encoded(Image.new("RGB", (64, 64)))[:60], Path("/no/such")]
)
def test_a_broken_picture_is_a_bad_record_with_its_name(stored: bytes | Path | None) -> None:
    with pytest.raises(BadRecordError, match=r"a\.png: "):
        decode(Record(stored, (), "a.png"))


def test_a_pil_picture_that_breaks_when_it_is_read_is_a_bad_record() -> None:
    image = Image.open(io.BytesIO(encoded(Image.effect_noise((64, 64), 50))[:-200]))
    with pytest.raises(BadRecordError, match="broken picture"):
        decode(Record(image, (), "row 3"))


def test_cropping_keeps_the_centre_and_padding_everything_on_white() -> None:
    picture = random_picture(4, 10)
    assert torch.equal(square(picture, "crop"), picture[..., 3:7])
    padded = square(picture, "pad")
    assert padded.shape == (3, 10, 10)
    assert torch.equal(padded[:, 3:7], picture)
    assert (padded[:, :3] == 255).all()
    assert (padded[:, 7:] == 255).all()


def test_resize_is_the_area_mean_downwards_and_bicubic_upwards() -> None:
    checkerboard = (torch.arange(8)[:, None] + torch.arange(8)) % 2 * 200
    picture = checkerboard.to(torch.uint8).expand(3, 8, 8)
    assert resize(picture, 4).unique().tolist() == [100]
    flat = torch.full((3, 4, 4), 77, dtype=torch.uint8)
    assert torch.equal(resize(flat, 16), torch.full((3, 16, 16), 77, dtype=torch.uint8))


def test_crops_are_aligned_and_reach_every_place() -> None:
    picture = torch.arange(12 * 20, dtype=torch.uint8).view(1, 12, 20)
    corners = {crop_corner(picture, 8, 4, random.Random(seed)) for seed in range(100)}
    assert corners == {(top, left) for top in (0, 4) for left in (0, 4, 8, 12)}


def test_the_smaller_picture_of_a_crop_is_the_crop_of_the_smaller_picture() -> None:
    picture = random_picture(64, 64)
    crop = training_picture(as_record(picture), data(crop=32), SUPER_RESOLUTION, random.Random(0))
    small_crop = downsample(to_float(crop)[None], 8)
    small = downsample(to_float(picture)[None], 16)
    windows = [small[..., top : top + 8, left : left + 8] for top in range(9) for left in range(9)]
    assert sum(torch.allclose(small_crop, window, atol=1e-6) for window in windows) == 1


@pytest.mark.parametrize("settings", [{}, {"crop": 32}, {"crop": 32, "tiles": True}, {"crop": 32, "flip": 1.0}])
def test_a_records_own_smaller_picture_is_cut_and_mirrored_as_the_large_one(settings: dict[str, object]) -> None:
    picture = random_picture(64, 64)
    low = downsample(to_float(picture)[None], 16)  # told apart from the area mean by its colours
    own = Image.fromarray((255 - to_uint8(low)[0]).permute(1, 2, 0).numpy())
    record = replace(as_record(picture), low=own)
    for seed in range(5):
        large, small = training_pair(record, data(**settings), SUPER_RESOLUTION, random.Random(seed))
        alone = training_picture(as_record(picture), data(**settings), SUPER_RESOLUTION, random.Random(seed))
        assert small is not None
        expected = downsample(to_float(large)[None], large.shape[-1] // 4)[0]
        assert (to_float(255 - small) - expected).abs().max() < 0.51 / 127.5  # rounded to 8 bits
        assert torch.equal(large, alone)


def test_a_smaller_picture_of_another_size_is_a_bad_record() -> None:
    record = replace(as_record(random_picture(64, 64)), low=Image.new("RGB", (8, 16)))
    with pytest.raises(
        BadRecordError, match="its smaller picture has 8x16 and the picture 64x64; expected a ratio of 4"
    ):
        training_pair(record, data(), SUPER_RESOLUTION, random.Random(0))


def test_tiles_are_cropped_and_never_resized() -> None:
    picture = random_picture(24, 40)
    view = training_picture(as_record(picture), data(tiles=True, crop=24), SUPER_RESOLUTION, random.Random(0))
    windows = [picture[..., left : left + 24] for left in range(0, 20, 4)]
    assert sum(torch.equal(view, window) for window in windows) == 1


def test_a_tile_smaller_than_the_crop_is_a_bad_record() -> None:
    with pytest.raises(BadRecordError, match=r"24x16 is smaller than data\.crop 32"):
        training_picture(
            as_record(random_picture(16, 24)), data(tiles=True, crop=32), SUPER_RESOLUTION, random.Random(0)
        )


def test_flip_mirrors_left_and_right() -> None:
    picture = random_picture(64, 64)
    view = training_picture(as_record(picture), data(flip=1.0), SUPER_RESOLUTION, random.Random(0))
    assert torch.equal(view, picture.flip(-1))


def test_jitter_moves_a_mark_within_its_bounds_over_white() -> None:
    picture = torch.full((3, 40, 40), 255, dtype=torch.uint8)
    picture[:, 18:22, 18:22] = 0
    places = []
    for seed in range(50):
        moved = jitter(picture, 0.1, random.Random(seed))
        assert (moved[:, 0] == 255).all()
        darkness = 255 - moved[0].float()
        places.append(float((darkness.sum(dim=0) * (torch.arange(40) + 0.5)).sum() / darkness.sum()))
        # The area changes by the square of the zoom.
        assert 0.9**2 * 0.95 < float(darkness.sum() / (16 * 255)) < 1.1**2 * 1.05
    # Shifted by up to 0.1 * 40 = 4 pixels, times the zoom.
    assert 15.5 < min(places) < 17.5
    assert 22.5 < max(places) < 24.5


def test_drawn_scenes_are_neither_mirrored_nor_moved() -> None:
    """A coloured ground would get a white edge, and left would be right."""
    stage = StageConfig(name="base", resolution=32, model=MODEL)
    record = open_source(ScenesSource(), 32, (0,)).record(3)
    moving = data(flip=1.0, jitter=0.3)
    assert torch.equal(training_pair(record, moving, stage, random.Random(0))[0], decode(record))
    other = replace(record, drawn=False)
    assert not torch.equal(training_pair(other, moving, stage, random.Random(0))[0], decode(record))


def test_no_jitter_changes_nothing() -> None:
    picture = random_picture(16, 16)
    assert torch.equal(jitter(picture, 0.0, random.Random(0)), picture)


def test_every_variant_is_drawn_and_captions_drop_as_often_as_set() -> None:
    record = Record(None, ("one", "two"), "test")
    rng = random.Random(0)
    chosen = [choose_caption(record, 0.25, rng) for _ in range(2000)]
    # 2000 draws: standard deviation of a share is about 0.01.
    assert chosen.count("") / 2000 == pytest.approx(0.25, abs=0.04)
    assert chosen.count("one") / 2000 == pytest.approx(0.375, abs=0.04)


def test_a_record_without_captions_is_bad_even_when_captions_drop() -> None:
    with pytest.raises(BadRecordError, match="no caption"):
        choose_caption(Record(None, (), "test"), 1.0, random.Random(0))


def test_a_strip_is_a_bad_record_where_it_would_be_padded(stage: StageConfig) -> None:
    strip = as_record(random_picture(2, 42))
    with pytest.raises(BadRecordError, match="a strip of 42x2, beyond 20:1"):
        training_picture(strip, data(aspect="pad"), stage, random.Random(0))
    assert training_picture(strip, data(aspect="crop"), stage, random.Random(0)).shape[-2:] == (8, 8)
    assert training_picture(as_record(random_picture(2, 40)), data(), stage, random.Random(0)).shape[-2:] == (8, 8)


@pytest.mark.parametrize(
    ("caption", "mirrored"),
    [
        ("a cat", True),
        ("a cat left of a dog", False),
        ("flag of Norway", False),
        ("the word STOP", False),
        ("bright", True),
    ],
)
def test_a_picture_is_mirrored_only_if_its_caption_names_no_side(caption: str, mirrored: bool) -> None:
    image = random_picture(16, 16)
    record = replace(as_record(image), captions=(caption,))
    stage = StageConfig(name="base", resolution=16, model=MODEL)
    found = training_picture(record, data(flip=1.0), stage, random.Random(0))
    assert torch.equal(found, image.flip(-1) if mirrored else image)
