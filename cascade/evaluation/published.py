"""The two commonly published figures, with weights provided by the user: CLIP score and Frechet inception distance.

Both are reported with the figure of the true pictures. Frechet distances of a few hundred pictures are far larger than
those of the 30,000 in papers, and comparable only for equal numbers of pictures: see docs/evaluation.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from cascade.errors import CascadeError
from cascade.evaluation.report import Figure, Request, judge_sha256
from cascade.files.tensors import load_tensors, load_weights

# --- inception -------------------------------------------------------------------------------------------------------
# Inception v3 for the Frechet inception distance, with weights provided by the user.
#
# No package without torchvision contains this network, so it is defined here, with the parameter names shared by
# torchvision, pytorch-fid and torch-fidelity. It differs from torchvision's in two details on which published
# distances depend: means at the edge exclude the padding, and the last block takes a maximum. Source: Szegedy et al.
# (2016), arXiv:1512.00567; Heusel et al. (2017), arXiv:1706.08500, for its use.

RESOLUTION = 299
FEATURES = 2048


class Conv(nn.Module):
    """Convolution, batch normalization, ReLU; keeps height and width unless `valid` or strided."""

    def __init__(self, inputs: int, outputs: int, size: int | tuple[int, int], stride: int = 1, valid: bool = False):
        super().__init__()
        rows, columns = (size, size) if isinstance(size, int) else size
        padding = (0, 0) if valid or stride > 1 else (rows // 2, columns // 2)
        self.conv = nn.Conv2d(inputs, outputs, (rows, columns), stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(outputs, eps=0.001)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C', H', W')."""
        return F.relu(self.bn(self.conv(x)))


def _mean(x: Tensor) -> Tensor:
    return F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)


def _largest(x: Tensor) -> Tensor:
    return F.max_pool2d(x, 3, stride=1, padding=1)


class Block(nn.Module):
    """Parallel branches joined along the channels; a branch is a chain of convolutions, possibly forked at its end.

    branches: {branch: [(name suffix, convolution), ...]} in the order of their outputs.
    """

    def __init__(self, branches: dict[str, list[tuple[str, Conv]]], pool: str = "") -> None:
        super().__init__()
        self._chains = {branch: [f"{branch}{suffix}" for suffix, _ in chain] for branch, chain in branches.items()}
        self._pool = pool
        for branch, chain in branches.items():
            for suffix, convolution in chain:
                self.add_module(f"{branch}{suffix}", convolution)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C', H', W')."""
        outputs = []
        for branch, names in self._chains.items():
            y = x
            if branch == "branch_pool":
                y = _largest(x) if self._pool == "max" else _mean(x)
            forks = names[-2:] if names[-1].endswith("b") else []
            for name in names[: len(names) - len(forks)]:
                y = self.get_submodule(name)(y)
            outputs += [self.get_submodule(name)(y) for name in forks] or [y]
        if self._pool == "reduce":
            outputs.append(F.max_pool2d(x, 3, stride=2))
        return torch.cat(outputs, dim=1)


def _block_a(inputs: int, pooled: int) -> Block:
    return Block(
        {
            "branch1x1": [("", Conv(inputs, 64, 1))],
            "branch5x5": [("_1", Conv(inputs, 48, 1)), ("_2", Conv(48, 64, 5))],
            "branch3x3dbl": [("_1", Conv(inputs, 64, 1)), ("_2", Conv(64, 96, 3)), ("_3", Conv(96, 96, 3))],
            "branch_pool": [("", Conv(inputs, pooled, 1))],
        }
    )


def _block_b(inputs: int) -> Block:
    double = [("_1", Conv(inputs, 64, 1)), ("_2", Conv(64, 96, 3)), ("_3", Conv(96, 96, 3, stride=2))]
    return Block({"branch3x3": [("", Conv(inputs, 384, 3, stride=2))], "branch3x3dbl": double}, pool="reduce")


def _block_c(inputs: int, inner: int) -> Block:
    return Block(
        {
            "branch1x1": [("", Conv(inputs, 192, 1))],
            "branch7x7": [
                ("_1", Conv(inputs, inner, 1)),
                ("_2", Conv(inner, inner, (1, 7))),
                ("_3", Conv(inner, 192, (7, 1))),
            ],
            "branch7x7dbl": [
                ("_1", Conv(inputs, inner, 1)),
                ("_2", Conv(inner, inner, (7, 1))),
                ("_3", Conv(inner, inner, (1, 7))),
                ("_4", Conv(inner, inner, (7, 1))),
                ("_5", Conv(inner, 192, (1, 7))),
            ],
            "branch_pool": [("", Conv(inputs, 192, 1))],
        }
    )


def _block_d(inputs: int) -> Block:
    return Block(
        {
            "branch3x3": [("_1", Conv(inputs, 192, 1)), ("_2", Conv(192, 320, 3, stride=2))],
            "branch7x7x3": [
                ("_1", Conv(inputs, 192, 1)),
                ("_2", Conv(192, 192, (1, 7))),
                ("_3", Conv(192, 192, (7, 1))),
                ("_4", Conv(192, 192, 3, stride=2)),
            ],
        },
        pool="reduce",
    )


def _block_e(inputs: int, pool: str = "") -> Block:
    def fork(number: str) -> list[tuple[str, Conv]]:
        return [(f"_{number}a", Conv(384, 384, (1, 3))), (f"_{number}b", Conv(384, 384, (3, 1)))]

    return Block(
        {
            "branch1x1": [("", Conv(inputs, 320, 1))],
            "branch3x3": [("_1", Conv(inputs, 384, 1)), *fork("2")],
            "branch3x3dbl": [("_1", Conv(inputs, 448, 1)), ("_2", Conv(448, 384, 3)), *fork("3")],
            "branch_pool": [("", Conv(inputs, 192, 1))],
        },
        pool,
    )


class Inception(nn.Module):
    """Network from pictures to the 2048 features before the classifier."""

    num_features = FEATURES  # read by torchmetrics

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = Conv(3, 32, 3, stride=2)
        self.Conv2d_2a_3x3 = Conv(32, 32, 3, valid=True)
        self.Conv2d_2b_3x3 = Conv(32, 64, 3)
        self.Conv2d_3b_1x1 = Conv(64, 80, 1)
        self.Conv2d_4a_3x3 = Conv(80, 192, 3, valid=True)
        self.Mixed_5b, self.Mixed_5c, self.Mixed_5d = _block_a(192, 32), _block_a(256, 64), _block_a(288, 64)
        self.Mixed_6a = _block_b(288)
        self.Mixed_6b, self.Mixed_6c = _block_c(768, 128), _block_c(768, 160)
        self.Mixed_6d, self.Mixed_6e = _block_c(768, 160), _block_c(768, 192)
        self.Mixed_7a = _block_d(768)
        self.Mixed_7b, self.Mixed_7c = _block_e(1280), _block_e(2048, pool="max")

    @torch.inference_mode()
    def forward(self, pictures: Tensor) -> Tensor:
        """(B, 3, H, W) in [-1, 1] -> (B, 2048); resized to 299 px, bilinear, with antialiasing where it shrinks."""
        x = F.interpolate(pictures, size=(RESOLUTION, RESOLUTION), mode="bilinear", antialias=True)
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))  # (B, 64, 147, 147)
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(F.max_pool2d(x, 3, stride=2)))  # (B, 192, 71, 71)
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(F.max_pool2d(x, 3, stride=2))))  # (B, 288, 35, 35)
        x = self.Mixed_6e(self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x)))))  # (B, 768, 17, 17)
        x = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(x)))  # (B, 2048, 8, 8)
        return x.mean(dim=(2, 3))


# --- published -------------------------------------------------------------------------------------------------------

_BATCH = 16
_UNUSED = ("fc.", "AuxLogits.")
"""Parts of a stored Inception that do not contribute to the features."""


@dataclass(frozen=True)
class ClipScorer:
    """The three parts of CLIP; typed Any, because transformers is imported on demand."""

    model: Any
    tokenizer: Any
    processor: Any

    @classmethod
    def from_pretrained(cls, source: str) -> ClipScorer:
        """A local folder or a hub id, safetensors only. Raises CascadeError when it cannot be loaded."""
        from transformers import CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

        try:
            return cls(
                CLIPModel.from_pretrained(source, use_safetensors=True).eval(),
                CLIPTokenizer.from_pretrained(source),
                CLIPImageProcessorPil.from_pretrained(source),
            )
        except (OSError, ValueError, TypeError, KeyError) as error:
            reason = " ".join(str(error).split())[:200]
            raise CascadeError(f"--clip {source}: not a CLIP folder or hub id with safetensors: {reason}") from None

    @torch.inference_mode()
    def scores(self, pictures: Sequence[Image.Image], prompts: Sequence[str]) -> Tensor:
        """(N,): 100 max(cos, 0) for each picture and its prompt.

        Source: Hessel et al. (2021), arXiv:2104.08718, with the factor 100 of torchmetrics in place of 2.5.
        """
        parts = []
        for start in range(0, len(pictures), _BATCH):
            texts, images = prompts[start : start + _BATCH], pictures[start : start + _BATCH]
            tokens = self.tokenizer(list(texts), padding="max_length", truncation=True, return_tensors="pt")
            pixels = self.processor(images=list(images), return_tensors="pt")
            output = self.model(**tokens, **pixels)
            image = torch.nn.functional.normalize(output.image_embeds, dim=1)
            parts.append((image * torch.nn.functional.normalize(output.text_embeds, dim=1)).sum(dim=1))
        return 100 * torch.cat(parts).clamp(min=0)


@dataclass(frozen=True)
class Published:
    """The networks whose weights the request names."""

    clip: ClipScorer | None
    inception: Inception | None

    @classmethod
    def load(cls, request: Request) -> Published:
        """Load the networks, before drawing, so that a wrong name fails immediately. Raises CascadeError."""
        return cls(
            ClipScorer.from_pretrained(request.clip) if request.clip else None,
            load_inception(request.inception) if request.inception else None,
        )

    def sha256(self) -> dict[str, str]:
        """SHA-256 of the weights, by network."""
        brought = {"clip": self.clip.model if self.clip else None, "inception": self.inception}
        return {name: judge_sha256(network) for name, network in brought.items() if network is not None}

    def figures(
        self, name: str, pictures: Sequence[Image.Image], true: Sequence[Image.Image], prompts: Sequence[str]
    ) -> list[Figure]:
        """The CLIP scores of drawn and of true pictures for the same prompts."""
        if self.clip is None:
            return []
        ours, theirs = (float(self.clip.scores(part, prompts).mean()) for part in (pictures, true))
        return [Figure(f"CLIP score, {name} subjects", ours, "of 100", "higher", len(prompts), theirs)]

    def distances(self, drawn: Tensor, true: Tensor, others: Tensor) -> list[Figure]:
        """The Frechet distance of drawn pictures to other true pictures; the floor is that of as many true ones.

        drawn, true, others: (N, 3, H, W) in [-1, 1].
        """
        if self.inception is None or min(len(drawn), len(others)) < 2:
            return []
        ours, floor = (frechet_distance(self.inception, part, others) for part in (drawn, true))
        return [Figure("Frechet inception distance", ours, "", "lower", len(drawn), floor)]


def frechet_distance(inception: Inception, one: Tensor, other: Tensor) -> float:
    """Frechet distance between two sets of pictures (N, 3, H, W) in [-1, 1], at least two in each."""
    from torchmetrics.image.fid import FrechetInceptionDistance

    distance = FrechetInceptionDistance(feature=inception)
    for pictures, real in ((one, False), (other, True)):
        for start in range(0, len(pictures), _BATCH):
            distance.update(pictures[start : start + _BATCH], real=real)
    return float(distance.compute())


def load_inception(source: str) -> Inception:
    """Inception from a safetensors file, a folder with model.safetensors, or a hub id. Raises CascadeError."""
    try:
        import torchmetrics  # noqa: F401 - checks that it is installed
    except ImportError:
        raise CascadeError("--inception: needs torchmetrics; pip install 'cascade-diffusion[metrics]'") from None
    path = _weights_file(source)
    stored = load_tensors(path)
    network = Inception()
    counts = {name: tensor for name, tensor in network.state_dict().items() if "num_batches" in name}
    used = {name: tensor for name, tensor in stored.items() if not name.startswith(_UNUSED)}
    load_weights(network, {**counts, **used}, path)
    return network.eval().requires_grad_(False)


def _weights_file(source: str) -> Path:
    path = Path(source)
    if path.is_dir():
        return path / "model.safetensors"
    if path.is_file():
        return path
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(source, "model.safetensors"))
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise CascadeError(f"--inception {source}: neither a file, a folder, nor a hub id: {reason}") from None
