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
from PIL import Image
from torch import Tensor

from cascade.checkpoint import load_tensors, load_weights
from cascade.errors import CascadeError
from cascade.evaluation.inception import Inception
from cascade.evaluation.report import Figure, Request, judge_sha256

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
