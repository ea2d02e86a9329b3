"""A cascade of transformers has all functions of a cascade of U-Nets, starting with the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_model import TEXT_DIM, tiny_stage, tiny_stage_config
from helpers_text import make_tiny_t5
from helpers_training import TRANSFORMER, log_entries, micro_config, micro_settings, trainer
from PIL import Image

from cascade import CascadePipeline, TextEncoder
from cascade.cli.program import main
from cascade.config.stage import StageConfig
from cascade.config.training import TrainConfig
from cascade.models.transformer import TransformerConfig
from cascade.resources.memory import stage_memory
from cascade.settings import override
from cascade.training.memory import training_memory
from cascade.training.optim import Muon, build_optimizer

SMALL = TransformerConfig(width=16, depth=2, patch=2, bottleneck=8, head_dim=8, embedding_dim=16, text_dim=TEXT_DIM)


def configs() -> list[StageConfig]:
    return [tiny_stage_config("base", 8, model=SMALL), tiny_stage_config("sr16", 16, 8, model=SMALL)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    encoder = TextEncoder.from_pretrained(make_tiny_t5(folder / "t5", TEXT_DIM), max_length=48)
    stages = [tiny_stage(config, seed) for seed, config in enumerate(configs())]
    CascadePipeline(encoder, stages, name="patches", license="CC0-1.0").save_pretrained(folder / "model")
    return folder / "model"


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str]:
    capsys.readouterr()
    status = main([str(argument) for argument in arguments])
    return status, capsys.readouterr().out


def test_it_draws_pictures_of_other_shapes_the_same_from_memory_and_from_disk(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {"seed": 3, "height": 16, "width": 40}
    held = CascadePipeline.from_pretrained(model, device="cpu")("a fox", **options).images[0]
    assert held.size == (40, 16)
    other = CascadePipeline.from_pretrained(model, device="cpu")("a bear", **options).images[0]
    assert held.tobytes() != other.tobytes()
    monkeypatch.setattr("cascade.storage.stage.fits", lambda *_: False)  # so that each layer is read when it runs
    streamed = CascadePipeline.from_pretrained(model, device="cpu", low_memory=True)("a fox", **options).images[0]
    assert streamed.tobytes() == held.tobytes()


def test_the_command_draws_in_batches_of_its_own_choice_and_enlarges(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "prompts.txt").write_text("a fox\na bear\na hat\n")
    call = ("--prompts", tmp_path / "prompts.txt", "--model", model, "--out", tmp_path / "out")
    assert run(capsys, "generate", *call, "--batch-size", "auto")[0] == 0
    assert len(list((tmp_path / "out").rglob("*.png"))) == 3
    Image.new("RGB", (8, 12), "red").save(tmp_path / "small.png")
    enlarge = ("upscale", tmp_path / "small.png", "--model", model, "--out", tmp_path / "large", "--to", 24)
    assert run(capsys, *enlarge)[0] == 0
    with Image.open(next((tmp_path / "large").glob("*.png"))) as large:
        assert large.size == (16, 24)


def test_tiles_are_refused_since_it_looks_at_the_whole_picture(model: Path) -> None:
    with pytest.raises(ValueError, match="stage sr16 sees the whole picture at once"):
        CascadePipeline.from_pretrained(model, device="cpu").upscale(Image.new("RGB", (8, 8)), tile=8)


def test_info_counts_its_weights_arithmetic_and_memory(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, stdout = run(capsys, "info", model, "--json")
    assert status == 0
    base = json.loads(stdout)["parts"][1]
    network = tiny_stage(configs()[0]).network
    assert base["parameters"] == sum(weight.numel() for weight in network.parameters())
    # Two multiplications and additions a weight and token at least: 16 tokens pass every matrix of the blocks.
    matrices = [
        w.numel()
        for b in network.repeated_blocks()
        for n, w in b.named_parameters()
        if w.ndim == 2 and "adapt" not in n
    ]
    assert base["gflop_per_call"] > 2 * 16 * sum(matrices) / 1e9
    config = configs()[0]
    assert config.geometry.least_activations * 4 * 64 < stage_memory(config).activations


# --- training --------------------------------------------------------------------------------------------------------


def test_a_run_trains_assembles_and_draws(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    t5, path = make_tiny_t5(tmp_path / "t5", dim=16), tmp_path / "config.yaml"
    settings = override(micro_settings(tmp_path / "run"), [*TRANSFORMER, f"text.encoder={t5}", "text.max_length=200"])
    path.write_text(json.dumps(settings))
    muon = ("training.optimizer.kind=muon", "training.activation_checkpointing=true")
    assert run(capsys, "train", path, "training.steps=2", *muon)[0] == 0
    parts = ("--text-encoder", t5, "--stage", tmp_path / "run", "--out", tmp_path / "m")
    assert run(capsys, "assemble", *parts, "--name", "m", "--license", "CC0-1.0")[0] == 0
    assert run(capsys, "generate", "a fox", "--model", tmp_path / "m", "--out", tmp_path / "out")[0] == 0


def losses(output: Path, *changes: str) -> list[dict[str, float]]:
    assert trainer(micro_config(output, *TRANSFORMER, *changes)).run()
    return log_entries(output)


def test_activation_checkpointing_gives_the_same_losses_with_dropout(tmp_path: Path) -> None:
    dropout = "stage.model.dropout=0.3"
    plain = losses(tmp_path / "plain", dropout)
    assert losses(tmp_path / "again", dropout, "training.activation_checkpointing=true") == plain
    assert losses(tmp_path / "without") != plain


def test_muon_moves_the_matrices_of_its_blocks_and_adamw_the_rest(tmp_path: Path) -> None:
    config = micro_config(tmp_path, *TRANSFORMER, "training.optimizer.kind=muon")
    network = tiny_stage(config.stage).network.requires_grad_(True)
    optimizer = build_optimizer(network, config.training.optimizer)
    assert isinstance(optimizer, Muon)
    names = {weight: name for name, weight in network.named_parameters()}
    by_muon = {names[weight] for weight in optimizer.param_groups[0]["params"]}
    assert by_muon == {name for name, w in network.named_parameters() if name.startswith("blocks.") and w.ndim == 2}
    assert "blocks.1.attention.qkv.weight" in by_muon


def test_training_memory_is_counted_and_recomputing_activations_takes_less() -> None:
    def counted(*changes: str) -> int:
        deep = [change.replace("depth: 2", "depth: 8") for change in TRANSFORMER]
        config: TrainConfig = micro_config(Path("run"), *deep, *changes)
        return training_memory(config).activations

    assert 0 < counted("training.activation_checkpointing=true") < 0.7 * counted()


def test_it_draws_in_bfloat16(model: Path) -> None:
    pipeline = CascadePipeline.from_pretrained(model, device="cpu", dtype="bfloat16")
    assert pipeline("a fox", seed=1).images[0].size == (16, 16)
    assert next(pipeline.slots[0].load().network.parameters()).dtype == torch.bfloat16
