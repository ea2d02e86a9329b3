"""CLIP score and Frechet distance with weights provided by the user: real formats, random numbers."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

from cascade.errors import CascadeError
from cascade.evaluation.published import ClipScorer, Inception, Published, frechet_distance, load_inception
from cascade.evaluation.report import Request


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CLIP of a few thousand random weights, as transformers writes it."""
    from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

    folder = tmp_path_factory.mktemp("clip")
    letters = [*"abcdefghijklmnopqrstuvwxyz"]
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({token: index for index, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = CLIPTokenizer.from_pretrained(folder, model_max_length=16)
    tokenizer.save_pretrained(folder)
    tower = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {"vocab_size": len(tokens), "max_position_embeddings": 16, "eos_token_id": len(tokens) - 1}
    config = CLIPConfig(
        text_config={**tower, **text, "bos_token_id": len(tokens) - 2, "pad_token_id": len(tokens) - 1},
        vision_config={**tower, "image_size": 32, "patch_size": 8},
        projection_dim=8,
    )
    torch.manual_seed(0)
    CLIPModel(config).save_pretrained(folder)
    CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


def test_a_clip_score_is_a_hundred_times_the_cosine_and_not_below_zero(clip: Path):
    pictures = [Image.new("RGB", (48, 40), colour) for colour in ("red", "blue", "white")]
    prompts = ["a red thing", "a blue thing", "nothing"]
    scorer = ClipScorer.from_pretrained(str(clip))
    scores = scorer.scores(pictures, prompts)
    inputs = scorer.tokenizer(prompts, padding="max_length", return_tensors="pt")
    with torch.inference_mode():
        logits = scorer.model(**inputs, **scorer.processor(images=pictures, return_tensors="pt")).logits_per_image
        cosines = logits.diagonal() / scorer.model.logit_scale.exp()
    assert torch.allclose(scores, 100 * cosines.clamp(min=0), atol=1e-3)
    # A short last batch changes nothing.
    assert torch.allclose(scorer.scores(pictures[:1], prompts[:1]), scores[:1], atol=1e-3)


def test_clip_figures_are_reported_with_those_of_true_pictures(clip: Path):
    published = Published.load(Request(clip=str(clip)))
    red, blue = Image.new("RGB", (32, 32), "red"), Image.new("RGB", (32, 32), "blue")
    (figure,) = published.figures("unseen", [red], [blue], ["a thing"])
    assert published.clip is not None
    assert figure.value == pytest.approx(float(published.clip.scores([red], ["a thing"])))
    assert figure.reference == pytest.approx(float(published.clip.scores([blue], ["a thing"])))
    assert published.distances(*(torch.zeros(4, 3, 32, 32) for _ in range(3))) == []


def test_nothing_is_measured_without_weights():
    assert Published.load(Request()).figures("unseen", [], [], []) == []


@pytest.mark.parametrize("option", ["clip", "inception"])
def test_weights_that_are_not_there_are_named(option: str, tmp_path: Path):
    with pytest.raises(CascadeError, match=rf"(--{option} )?{tmp_path}"):
        Published.load(Request(**{option: str(tmp_path)}))


def test_without_torchmetrics_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setitem(sys.modules, "torchmetrics", None)
    with pytest.raises(CascadeError, match=r"pip install 'cascade-diffusion\[metrics\]'"):
        load_inception(str(tmp_path))


class Means(nn.Module):
    """Three features: the mean of each channel."""

    num_features = 3

    def forward(self, pictures: Tensor) -> Tensor:
        return pictures.mean(dim=(2, 3))


def test_the_frechet_distance_of_a_shift_is_its_square():
    """Equal covariances cancel, so |m1 - m2|^2 remains."""
    pictures = torch.rand(40, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    shifted = pictures + torch.tensor([0.0, 3.0, 4.0]).view(1, 3, 1, 1)
    means = Means()
    assert frechet_distance(means, pictures, shifted) == pytest.approx(25, rel=1e-3)  # type: ignore[arg-type]
    assert frechet_distance(means, pictures, pictures) == pytest.approx(0, abs=1e-3)  # type: ignore[arg-type]


def test_the_network_is_inception_v3():
    """torchvision's 27,161,264 parameters, less the classifier's 2,049,000 and the auxiliary head's 3,326,696."""
    with torch.device("meta"):
        network = Inception()
    assert sum(parameter.numel() for parameter in network.parameters()) == 21_785_568
    shapes = {name: tuple(parameter.shape) for name, parameter in network.named_parameters()}
    assert shapes["Mixed_6b.branch7x7dbl_3.conv.weight"] == (128, 128, 1, 7)
    assert shapes["Mixed_7c.branch3x3dbl_3b.conv.weight"] == (384, 384, 3, 1)
    assert shapes["Mixed_7b.branch_pool.bn.weight"] == (192,)


@pytest.mark.slow
def test_inception_weights_load_from_safetensors_and_give_a_distance(tmp_path: Path):
    torch.manual_seed(0)
    weights = {name: tensor.half() for name, tensor in Inception().state_dict().items() if "num_batches" not in name}
    path = tmp_path / "model.safetensors"
    save_file({**weights, "fc.weight": torch.zeros(1008, 2048)}, path)
    network = load_inception(str(tmp_path))
    pictures = torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    assert network(pictures).shape == (3, 2048)
    assert frechet_distance(network, pictures, pictures) == pytest.approx(0, abs=1e-2)
    assert frechet_distance(network, pictures, -pictures) > 0
    del weights["Mixed_7a.branch3x3_1.bn.bias"]
    save_file(weights, path)
    with pytest.raises(CascadeError, match=r"Mixed_7a\.branch3x3_1\.bn\.bias is missing"):
        load_inception(str(path))
