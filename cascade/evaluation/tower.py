"""The judge of the art suite: a small image tower and a small text tower in one space, and a reader of styles.

Trained by scripts/train_tower.py on the training split alone, never used as a training loss, and independent of the
text encoder that it judges: its words are hashed character n-grams, so that an unknown name is read by its parts.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cascade.files.atomic import write_json
from cascade.files.tensors import load_tensors, load_weights, save_tensors
from cascade.pictures.images import downsample, upsample

BUNDLED_TOWER = Path(__file__).parents[1] / "pretrained" / "tower"
RESOLUTION = 64
STYLES = ("noto", "twemoji", "fluent_flat", "fluent_color", "fluent_3d", "fluent_mono")
"""The drawing styles of the art, in the order of the style reader's outputs."""

_CHANNELS = (32, 48, 96, 256)
_STYLE_CHANNELS = (32, 64, 96)
FEATURES = _CHANNELS[-1]
_EMBEDDING = 128
_BUCKETS = 1 << 14
_GRAMS = (3, 4, 5)
_LARGEST_SCALE = 50.0
_BATCH = 64


class Residual(nn.Module):
    """x + conv(relu(norm(x)))."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(channels)
        self.conv = nn.Conv2d(channels, channels, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> the same shape."""
        return x + self.conv(F.relu(self.norm(x)))


class ImageTower(nn.Module):
    """Pictures -> features: four strided convolutions, residual blocks between them, the mean over positions."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for level, (inputs, outputs) in enumerate(zip((3, *_CHANNELS), _CHANNELS, strict=False)):
            layers += [nn.Conv2d(inputs, outputs, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(outputs)]
            layers += [nn.ReLU(), *([Residual(outputs)] if level else [])]
        self.layers = nn.Sequential(*layers)
        self.norm = nn.BatchNorm2d(FEATURES)

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3, 64, 64) in [-1, 1] -> (B, 256)."""
        return F.relu(self.norm(self.layers(x))).mean(dim=(2, 3))


class TextTower(nn.Module):
    """A bag of hashed words and character n-grams -> a point of the shared space."""

    def __init__(self) -> None:
        super().__init__()
        self.bag = nn.EmbeddingBag(_BUCKETS, _EMBEDDING, mode="mean")
        nn.init.normal_(self.bag.weight, std=0.3)
        self.mix = nn.Sequential(
            nn.Linear(_EMBEDDING, 2 * _EMBEDDING), nn.GELU(), nn.Linear(2 * _EMBEDDING, _EMBEDDING)
        )

    def forward(self, bags: Sequence[Sequence[int]]) -> Tensor:
        """N bags of bucket numbers -> (N, 128)."""
        offsets = torch.tensor([0, *(len(bag) for bag in bags[:-1])]).cumsum(0)
        x = self.bag(torch.tensor([bucket for bag in bags for bucket in bag]), offsets)
        return x + self.mix(x)


class StyleReader(nn.Module):
    """Pictures -> scores of the styles; shallow, because edges and shading, not the subject, show a style."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for inputs, outputs in zip((3, *_STYLE_CHANNELS), _STYLE_CHANNELS, strict=False):
            layers += [nn.Conv2d(inputs, outputs, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(outputs)]
            layers += [nn.ReLU()]
        self.layers = nn.Sequential(*layers)
        self.linear = nn.Linear(2 * _STYLE_CHANNELS[-1], len(STYLES))

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3, 64, 64) in [-1, 1] -> (B, styles)."""
        x = self.layers(x)
        return self.linear(torch.cat([x.mean(dim=(2, 3)), x.amax(dim=(2, 3))], dim=1))


class Tower(nn.Module):
    """Both towers with the scale of their cosines, and the reader of styles."""

    def __init__(self) -> None:
        super().__init__()
        self.image = ImageTower()
        self.project = nn.Linear(FEATURES, _EMBEDDING)
        self.text = TextTower()
        self.log_scale = nn.Parameter(torch.tensor(10.0).log())
        self.style = StyleReader()

    @property
    def scale(self) -> Tensor:
        """Factor on cosines, for the softmax."""
        return self.log_scale.exp().clamp(max=_LARGEST_SCALE)

    def features(self, pictures: Tensor) -> Tensor:
        """Features for distances: (N, 3, H, W) in [-1, 1], any size -> (N, 256) float32."""
        return _in_batches(self.image, pictures)

    @torch.inference_mode()
    def place_features(self, features: Tensor) -> Tensor:
        """(N, 256) -> unit vectors (N, 128) in the space shared with texts."""
        return F.normalize(self.project(features), dim=1)

    @torch.inference_mode()
    def place_texts(self, texts: Sequence[str]) -> Tensor:
        """N texts -> unit vectors (N, 128)."""
        return F.normalize(self.text([buckets(text) for text in texts]), dim=1)

    def read_styles(self, pictures: Tensor) -> list[str]:
        """(N, 3, H, W) in [-1, 1], any size -> the most likely style of each picture."""
        return [STYLES[index] for index in _in_batches(self.style, pictures).argmax(dim=1).tolist()]


@torch.inference_mode()
def _in_batches(network: nn.Module, pictures: Tensor) -> Tensor:
    """`network` over pictures of any size, one output row each.

    The last batch is padded, so that a picture's row does not depend on other pictures or their number.
    """
    rows = []
    for start in range(0, len(pictures), _BATCH):
        batch = at_resolution(pictures[start : start + _BATCH])
        padding = batch.new_zeros(_BATCH - len(batch), *batch.shape[1:])
        rows.append(network(torch.cat([batch, padding]))[: len(batch)])
    return torch.cat(rows)


def buckets(text: str) -> list[int]:
    """Bucket numbers of a text: each whole word, and its runs of 3 to 5 letters; a separate bucket for empty text."""
    numbers = []
    for word in re.findall(r"\w+", text.lower()):
        framed = f"<{word}>"
        grams = {framed[start : start + size] for size in _GRAMS for start in range(len(framed) - size + 1)}
        # A set has no fixed order; zlib's checksum is the same everywhere, Python's hash is not.
        numbers += sorted(zlib.crc32(gram.encode()) % _BUCKETS for gram in grams | {framed})
    return numbers or [zlib.crc32(b"<>") % _BUCKETS]


def at_resolution(pictures: Tensor) -> Tensor:
    """Pictures of any size (N, 3, H, W) -> (N, 3, 64, 64): area mean down, bicubic up."""
    if min(pictures.shape[-2:]) >= RESOLUTION:
        return downsample(pictures, RESOLUTION)
    return upsample(pictures, RESOLUTION)


def save_tower(tower: Tower, folder: str | Path, facts: dict[str, object]) -> None:
    """Write the weights in half precision, and the facts of their training."""
    folder = Path(folder)
    weights = {name: tensor for name, tensor in tower.state_dict().items() if "num_batches" not in name}
    save_tensors(folder / "model.safetensors", weights, torch.float16)
    write_json(folder / "tower.json", facts)


def load_tower(folder: str | Path = BUNDLED_TOWER) -> Tower:
    """The tower in the package, or in another folder. Raises CascadeError for missing or unsuitable weights."""
    path = Path(folder) / "model.safetensors"
    tower = Tower()
    tensors = {name: tensor.float() for name, tensor in load_tensors(path).items()}
    # BatchNorm's batch counts are not used here, so they are not stored.
    counts = {name: tensor for name, tensor in tower.state_dict().items() if "num_batches" in name}
    load_weights(tower, {**tensors, **counts}, path)
    return tower.eval().requires_grad_(False)
