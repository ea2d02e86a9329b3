"""The art suite's judge: reads any word and any size, loads its saved weights, learns to match pictures and words."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from PIL import Image

from cascade.errors import CascadeError
from cascade.evaluation.art_data import Art, Concept
from cascade.evaluation.tower import STYLES, Tower, buckets, load_tower, save_tower
from cascade.pictures.images import from_pil, to_float

ROOT = Path(__file__).parents[2]


def test_words_share_buckets_with_their_relatives():
    shared = len(set(buckets("rocket")) & set(buckets("rockets")))
    assert shared > len(set(buckets("rocket")) & set(buckets("lemon")))
    assert buckets("Red apple") == buckets("red, apple!")
    assert buckets("") == buckets("...") != []


def test_features_do_not_depend_on_the_other_pictures_nor_on_their_number():
    tower = load_tower()
    pictures = torch.rand(70, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    features = tower.features(pictures)
    assert features.shape == (70, 256)
    assert torch.equal(features[66:], tower.features(pictures[66:]))


@pytest.mark.parametrize("size", [16, 64, 256])
def test_a_picture_of_any_size_is_read(size: int):
    assert load_tower().features(torch.zeros(1, 3, size, size)).shape == (1, 256)


def test_a_saved_tower_loads_and_says_the_same(tmp_path: Path):
    torch.manual_seed(0)
    tower = Tower().eval()
    save_tower(tower, tmp_path, {"seed": 0})
    again = load_tower(tmp_path)
    pictures = torch.rand(2, 3, 64, 64) * 2 - 1
    # Half precision keeps 11 bits of each weight.
    assert torch.allclose(again.features(pictures), tower.features(pictures), rtol=1e-2, atol=1e-2)
    assert (again.place_texts(["lemon"]) @ tower.place_texts(["lemon"]).T).item() > 0.999


def test_missing_weights_are_named(tmp_path: Path):
    with pytest.raises(CascadeError, match=r"model\.safetensors: no such file"):
        load_tower(tmp_path)


@pytest.mark.slow
def test_the_script_learns_which_words_belong_to_which_picture():
    """Twelve colours, half of them with stripes as their style: words find them, styles are read, twice the same."""
    spec = importlib.util.spec_from_file_location("train_tower", ROOT / "scripts" / "train_tower.py")
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    names = ("red", "lime", "blue", "yellow", "cyan", "magenta", "black", "white", "gray", "navy", "olive", "teal")
    pixels = torch.stack([from_pil(Image.new("RGB", (64, 64), name)) for name in names])
    pixels[1::2, :, ::4] = 128
    concepts = tuple(Concept(name, name, name, "Symbols") for name in names)
    art = Art(pixels, concepts, tuple(STYLES[index % 2] for index in range(len(names))), "")
    first, second = (script.train(art, steps=2, seed=0) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    tower = script.train(art, steps=30, seed=0)
    features = tower.features(to_float(pixels))
    found = (tower.place_features(features) @ tower.place_texts(names).T).argmax(dim=1)
    assert (found == torch.arange(len(names))).float().mean() > 0.9
    script.train_style(tower, art, steps=60, seed=0)
    assert tuple(tower.read_styles(to_float(pixels))) == art.styles
