"""Pictures that are packed, read, and cut into batches on a device."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from gpu import pictures
from gpu.pictures import Captions, Library, Mixture
from gpu.views import EnlargingViews
from helpers_art import picture, record
from helpers_text import make_tiny_t5
from PIL import Image

from cascade.errors import CascadeError
from cascade.storage.index import BUNDLED
from cascade.text.t5 import TextEncoder

CPU = torch.device("cpu")
BUNDLED_ENCODER = BUNDLED / "text_encoder"
Pack = Callable[..., Path]


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_t5(tmp_path_factory.mktemp("t5") / "t5", 32)


@pytest.fixture(scope="module")
def library(packed: Pack, encoder: Path) -> Library:
    """Three styles: two pictures that may be mirrored, one that may not, one without a white edge."""
    full = Image.new("RGB", (256, 256), "black")
    file = packed(
        [
            record(picture("red", x=0.3), "noto", "a red star", "star"),
            record(picture("blue", x=0.3), "noto", "a blue star"),
            record(picture("green", x=0.3), "sign", "an arrow to the left"),
            record(full, "full", "black"),
        ]
    )
    return pictures.load([file], encoder, CPU, Mixture({"noto": 3.0, "sign": 1.0, "full": 0.5}, scenes=6))


def seed(number: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(number)


def pixels(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1)


def number_of(library: Library, style: str) -> int:
    return library.art.styles.index(style)


def test_a_picture_of_the_size_arrives_bit_for_bit_a_larger_one_as_its_area_mean(packed: Pack, encoder: Path) -> None:
    large = picture("red", 1024)
    file = packed([record(picture("red"), "small", "a star"), record(large, "tall", "a star")])
    art = pictures.load([file], encoder, CPU, Mixture({})).art
    assert torch.equal(art.pixels[art.styles.index("small")], pixels(picture("red")))
    mean = torch.nn.functional.avg_pool2d(pixels(large).float(), 4)
    # Pillow rounds twice: rows, then columns.
    assert (art.pixels[art.styles.index("tall")].float() - mean).abs().max() <= 1


def test_pictures_with_sides_in_their_caption_are_never_mirrored(library: Library) -> None:
    assert library.art.flips.tolist() == [style != "sign" for style in library.art.styles]


def test_pictures_without_a_white_edge_are_never_moved(library: Library) -> None:
    assert library.art.moves.tolist() == [style != "full" for style in library.art.styles]


def test_unmoved_pictures_are_area_means(library: Library) -> None:
    art = library.art
    still = replace(art, flips=torch.zeros_like(art.flips), moves=torch.zeros_like(art.moves))
    who = torch.arange(len(art.pixels))
    expected = torch.nn.functional.avg_pool2d(art.pixels.float() / 127.5 - 1, 4)
    assert torch.allclose(still.zoomed(who, 64, seed()), expected, atol=1e-4)  # float32, positions of a grid


def test_an_unmoved_picture_is_mirrored_half_of_the_time(library: Library) -> None:
    art = replace(library.art, moves=torch.zeros_like(library.art.moves))
    who = torch.zeros(100, dtype=torch.long) + number_of(library, "noto")
    x = art.zoomed(who, 64, seed())
    mean = torch.nn.functional.avg_pool2d(art.pixels[who[:1]].float() / 127.5 - 1, 4)
    same = (x - mean).abs().amax((1, 2, 3)) < 1e-4
    mirrored = (x - mean.flip(-1)).abs().amax((1, 2, 3)) < 1e-4
    assert torch.equal(same, ~mirrored)
    assert abs(int(mirrored.sum()) - 50) < 25  # five standard errors


def test_moved_pictures_stay_on_white(library: Library) -> None:
    who = torch.zeros(64, dtype=torch.long) + number_of(library, "noto")
    x = library.art.zoomed(who, 64, seed())
    assert x.std(0).max() > 0.1, "nothing was moved"
    assert torch.allclose(x[:, :, 0], torch.ones(64, 3, 64), atol=1e-4)


def test_a_crop_is_a_slice(library: Library) -> None:
    who = torch.tensor([0, 1, 2])
    offset = torch.tensor([[0, 4, 100], [8, 0, 128]])
    found = pictures.cut(library.art.pixels, who, offset, 128)
    for place in range(3):
        top, left = offset[:, place].tolist()
        assert torch.equal(found[place], library.art.pixels[who[place], :, top : top + 128, left : left + 128])


def test_beyond_an_edge_the_edge_goes_on() -> None:
    lines = torch.arange(4).expand(1, 1, 4, 4)
    found = pictures.cut(lines, torch.tensor([0]), torch.tensor([[0], [-2]]), 4)
    assert found[0, 0, 0].tolist() == [0, 0, 0, 1]


@pytest.mark.parametrize("size", [128, 256])
def test_a_cropped_picture_is_the_slice_at_its_offset_some_of_them_mirrored(library: Library, size: int) -> None:
    art = library.art
    who = torch.arange(len(art.pixels)).repeat(16)
    x, offset, mirrored = art.cropped(who, size, 4, seed())
    assert (offset % 4 == 0).all()
    assert not mirrored[~art.flips[who]].any()
    assert 0 < int(mirrored.sum()) < int(art.flips[who].sum())
    around = torch.nn.functional.pad(art.pixels.float(), (8,) * 4, mode="replicate")
    for place, number in enumerate(who.tolist()):
        top, left = (offset[:, place] + 8).tolist()
        slice_ = around[number, :, top : top + size, left : left + size] / 127.5 - 1
        assert torch.equal(x[place], slice_.flip(-1) if mirrored[place] else slice_)


@pytest.mark.parametrize("size", [128, 256])
def test_the_bases_drawing_lies_where_its_picture_does(library: Library, size: int) -> None:
    # Random colours of 4 x 4 pixels: their area mean is a whole number, and no two places are alike.
    own = torch.randint(256, (len(library.art.pixels), 3, 64, 64), generator=seed(1), dtype=torch.uint8)
    art = replace(library.art, pixels=own.repeat_interleave(4, -1).repeat_interleave(4, -2))
    coloured = replace(library, art=art)
    drawn = torch.ones(len(own), dtype=torch.bool)
    seen = EnlargingViews(coloured, own, drawn, share=1.0, most=0.0)(32, size, seed())
    plain = EnlargingViews(coloured, most=0.0)(32, size, seed())
    assert torch.equal(seen.x, plain.x)
    assert torch.allclose(seen.cond.low_res, plain.cond.low_res, atol=1e-5)  # float32: a mean of 16 equal numbers
    others = EnlargingViews(coloured, own.roll(1, 3), drawn, share=1.0, most=0.0)(32, size, seed())
    assert (others.cond.low_res - plain.cond.low_res).abs().mean() > 0.3, "a pixel beside it would not be noticed"


def test_only_pictures_that_the_base_has_drawn_are_seen_so(library: Library) -> None:
    own = torch.zeros(len(library.art.pixels), 3, 64, 64, dtype=torch.uint8)
    drawn = torch.zeros(len(own), dtype=torch.bool)
    black = EnlargingViews(library, own, ~drawn, share=1.0, most=0.0)(16, 128, seed())
    none = EnlargingViews(library, own, drawn, share=1.0, most=0.0)(16, 128, seed())
    plain = EnlargingViews(library, most=0.0)(16, 128, seed())
    assert torch.equal(none.cond.low_res, plain.cond.low_res)
    # log SNR of no noise at all is clipped, which leaves a little of it
    assert torch.allclose(black.cond.low_res, torch.full_like(black.cond.low_res, -1), atol=0.05)


def test_captions_are_a_pictures_own_or_the_null_text() -> None:
    captions = Captions(rows=torch.tensor([1, 2, 3, 4]), first=torch.tensor([0, 3]), count=torch.tensor([3, 1]))
    who = torch.tensor([0, 1]).repeat(5000)
    rows = captions.chosen(who, torch.rand(2, 10_000, generator=seed()), 0.1)
    assert set(rows[who == 0].tolist()) == {0, 1, 2, 3}
    assert set(rows[who == 1].tolist()) == {0, 4}
    assert abs(float((rows == 0).float().mean()) - 0.1) < 0.015  # five standard errors
    styled = float((rows[who == 0] == 1).float().mean()) / 0.9
    assert abs(styled - (pictures.STYLED + (1 - pictures.STYLED) / 3)) < 0.04


def test_styles_are_picked_by_their_shares(library: Library) -> None:
    who = library.art.pick(torch.rand(2, 9000, generator=seed()))
    styles = [library.art.styles[k] for k in who.tolist()]
    for style, share in (("noto", 3 / 4.5), ("sign", 1 / 4.5), ("full", 0.5 / 4.5)):
        assert abs(styles.count(style) / 9000 - share) < 0.026  # five standard errors
    assert len(set(who.tolist())) == 4, "every picture is met"


def test_styles_that_are_not_named_share_the_rest_and_those_of_none_are_left_out(packed: Pack, encoder: Path) -> None:
    file = packed([record(picture("red"), style, "a star") for style in ("a", "b", "c", "d")])
    art = pictures.load([file], encoder, CPU, Mixture({"a": 1.0, "d": 0.0}, rest=1.0)).art
    assert art.styles == ("a", "b", "c")
    assert torch.allclose(art.bounds, torch.tensor([0.5, 0.75, 1.0]))


def test_scenes_have_captions_that_are_embedded(library: Library) -> None:
    assert library.scenes is not None
    assert library.scenes.pixels.shape == (6, 3, 64, 64)
    assert library.scenes.captions.count.tolist() == [3] * 6
    assert int(library.scenes.captions.rows.max()) < len(library.words.tokens)


@pytest.mark.parametrize("bundled", [False, True])
def test_texts_read_together_are_those_that_the_encoder_reads_one_by_one(encoder: Path, bundled: bool) -> None:
    encoder = BUNDLED_ENCODER if bundled else encoder
    texts = ["", "a red star", "übrigens ☃", "a star " * 30]
    words = pictures.embed(texts, encoder, CPU)
    alone = TextEncoder.from_pretrained(encoder, max_length=pictures.MOST_TOKENS)
    with pytest.warns(UserWarning, match="more than max_length"):
        expected = alone.encode(texts)
    tokens, mask = words.rows(torch.arange(4))
    longest = expected.mask.shape[1]
    assert torch.equal(mask[:, :longest], expected.mask)
    assert not mask[:, longest:].any()
    kept = expected.tokens * expected.mask[..., None]
    assert torch.allclose(tokens[:, :longest], kept, atol=2e-3 * float(kept.abs().max()))  # kept in float16


def an_array() -> bytes:
    out = io.BytesIO()
    np.save(out, np.zeros(3))
    return out.getvalue()


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 no archive", b"a picture", an_array()])
def test_another_file_is_named_in_one_line(tmp_path: Path, encoder: Path, content: bytes) -> None:
    file = tmp_path / "other.npz"
    file.write_bytes(content)
    with pytest.raises(CascadeError, match=r"other\.npz: not a file of pack_pictures\.py"):
        pictures.load([file], encoder, CPU, Mixture({}))


def test_packs_without_a_picture_of_a_style_with_a_share_are_named(packed: Pack, encoder: Path) -> None:
    file = packed([record(picture("red"), "noto", "a star")])
    with pytest.raises(CascadeError, match=r"art\.npz: no picture of a style that has a share"):
        pictures.load([file], encoder, CPU, Mixture({"noto": 0.0}))


def test_pictures_packed_at_another_size_are_refused(packed: Pack, encoder: Path) -> None:
    file = packed([record(picture("red"), "noto", "a star")], "--size", "128")
    with pytest.raises(CascadeError, match=r"128 x 128; pack pictures with --size 256"):
        pictures.load([file], encoder, CPU, Mixture({}))


def test_a_folder_that_is_no_text_encoder_is_reported_before_reading(tmp_path: Path) -> None:
    with pytest.raises(CascadeError, match=r"tokenizer\.json"):
        pictures.load([tmp_path / "none.npz"], tmp_path, CPU, Mixture({}))


def test_processes_give_the_results_of_a_single_one() -> None:
    jobs = [(number, 1) for number in range(5)]
    with pictures._workers(len(jobs)) as run, pictures._workers(1) as alone:
        assert run is not map
        assert alone is map
        for found, expected in zip(run(pictures._drawn, jobs), alone(pictures._drawn, jobs), strict=True):
            assert np.array_equal(found[0], expected[0])
            assert found[1] == expected[1]
