"""`auto`: the machine's faster number format, measured once, and kept by a run."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch
from helpers_model import make_tiny_cascade, tiny_stage_config
from helpers_training import micro_config, trainer

from cascade import CascadePipeline, system
from cascade.cli.program import main
from cascade.config.stage import read_stage_config
from cascade.resources import number_format
from cascade.resources.number_format import Work, faster_format, settled_dtype, time_share, warn_if_slow
from cascade.settings import read_yaml
from cascade.storage.index import read_index
from cascade.storage.training import load_train_config

CPU = torch.device("cpu")
WORK = [Work(tiny_stage_config("base", 8))]


def takes(monkeypatch: pytest.MonkeyPatch, share: float) -> list[int]:
    """bfloat16 takes `share` of float32's time; how often that was measured."""
    calls: list[int] = []

    def measured(*_arguments: object) -> float:
        calls.append(1)
        return share

    monkeypatch.setattr(number_format, "_measured", measured)
    return calls


@pytest.fixture(autouse=True)
def nothing_known(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A machine of which nothing is remembered; the folder where that would be."""
    monkeypatch.setattr(system, "cache_folder", lambda: tmp_path / "cache")
    return tmp_path / "cache" / "cascade"


@pytest.mark.parametrize(("share", "expected"), [(0.5, torch.bfloat16), (0.97, torch.float32), (7.0, torch.float32)])
def test_auto_is_bfloat16_where_that_is_clearly_faster_and_says_so_in_one_line(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, share: float, expected: torch.dtype
) -> None:
    takes(monkeypatch, share)
    with caplog.at_level(logging.INFO, "cascade.load"):
        assert faster_format(WORK, CPU) == expected
    (line,) = caplog.messages
    assert line.endswith(f"bfloat16 takes {share:.2g} of float32's time here")


def test_what_was_measured_is_remembered_for_a_machine_and_a_stage(
    monkeypatch: pytest.MonkeyPatch, nothing_known: Path
) -> None:
    calls = takes(monkeypatch, 0.5)
    for _ in range(2):
        assert time_share(WORK, CPU, torch.bfloat16) == 0.5
    assert len(calls) == 1
    time_share([Work(tiny_stage_config("base", 16))], CPU, torch.bfloat16)
    time_share([Work(WORK[0].config, trained=True)], CPU, torch.bfloat16)
    assert len(calls) == 3
    (nothing_known / "number-formats.json").write_text("{damaged", encoding="utf-8")
    assert time_share(WORK, CPU, torch.bfloat16) == 0.5
    assert len(calls) == 4


def test_a_home_that_cannot_be_written_is_no_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    monkeypatch.setattr(system, "cache_folder", lambda: tmp_path / "file" / "cache")
    takes(monkeypatch, 0.5)
    assert faster_format(WORK, CPU) == torch.bfloat16


@pytest.mark.parametrize("trained", [False, True])
def test_the_measurement_finds_the_format_whose_layers_are_slowed_down(
    monkeypatch: pytest.MonkeyPatch, trained: bool
) -> None:
    """The clock of one format runs ten times as fast: the ratio of the two moves by that, whatever the machine."""
    work = [Work(read_stage_config(read_index(None).stages[0]), 2, trained)]
    honest = number_format._seconds

    def slowed(module: torch.nn.Module, x: torch.Tensor, trained: bool) -> float:
        return honest(module, x, trained) * (1000 if x.dtype == torch.bfloat16 else 1)

    monkeypatch.setattr(number_format, "_seconds", slowed)
    assert time_share(work, CPU, torch.bfloat16) > 50
    assert torch.get_num_threads() >= 1


def test_what_is_measured_has_the_shapes_of_the_stage_and_is_small() -> None:
    config = read_stage_config(read_index(None).stages[0])
    layers = number_format._largest(Work(config, pictures=16, trained=True))
    assert layers
    for layer in layers:
        cut = layer.cut()
        operations = layer.operations * torch.Size(cut).numel() / torch.Size(layer.shape).numel()
        assert operations <= 2 * number_format._OPERATIONS
        assert cut[1] == layer.shape[1] == layer.module.in_channels
        assert layer.shape[0] == 16


def test_a_slow_format_that_was_asked_for_is_used_with_one_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    takes(monkeypatch, 6.8)
    assert settled_dtype("bfloat16", CPU, [WORK[0].config]) == torch.bfloat16
    assert caplog.messages == ["bfloat16 takes 6.8 times as long as float32 on device cpu"]
    caplog.clear()
    takes(monkeypatch, 0.5)
    warn_if_slow([Work(tiny_stage_config("base", 16))], CPU, torch.bfloat16)
    assert caplog.messages == []


def test_drawing_is_in_float32_on_a_cpu_unless_auto_is_asked_for(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    calls = takes(monkeypatch, 0.5)
    folder = make_tiny_cascade(tmp_path / "tiny")
    assert CascadePipeline.from_pretrained(folder, device="cpu").dtype == torch.float32
    assert not calls
    assert CascadePipeline.from_pretrained(folder, device="cpu", dtype="auto").dtype == torch.bfloat16
    assert CascadePipeline.from_pretrained(folder, device="cpu").to(dtype="auto").dtype == torch.bfloat16


def test_a_batch_keeps_the_format_that_it_began_with(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    model, out = make_tiny_cascade(tmp_path / "tiny"), tmp_path / "out"
    settings = ["--dtype", "auto", "--device", "cpu", "--seed", "1"]
    command = ["generate", "--model", str(model), "--out", str(out), *settings]
    takes(monkeypatch, 0.5)
    assert main([*command, "a"]) == 0
    assert json.loads((out / "run.json").read_text(encoding="utf-8"))["dtype"] == "bfloat16"
    monkeypatch.setattr(number_format, "_remembered", dict)
    takes(monkeypatch, 7.0)
    assert main([*command, "a", "b"]) == 0
    lines = [json.loads(line) for line in (out / "manifest.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [line["settings"]["dtype"] for line in lines] == ["bfloat16", "bfloat16"]


def test_training_writes_its_precision_down_and_a_resumed_run_keeps_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    takes(monkeypatch, 0.5)
    config = micro_config(tmp_path / "run", "training.precision=auto", "training.steps=2")
    assert trainer(config).run()
    assert read_yaml(tmp_path / "run" / "config.yaml")["training"]["precision"] == "bf16"
    monkeypatch.setattr(number_format, "_remembered", dict)
    takes(monkeypatch, 7.0)
    caplog.clear()
    longer = micro_config(tmp_path / "run", "training.precision=auto", "training.steps=3")
    run = trainer(longer)
    assert run.run(resume=True)
    assert run.config.training.precision == "bf16"
    assert not [line for line in caplog.messages if "precision" in line]


def test_training_in_a_slow_precision_is_done_with_one_warning(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    takes(monkeypatch, 5.9)
    run = trainer(micro_config(tmp_path / "run", "training.precision=bf16", "training.steps=1"))
    assert run.run()
    assert [line for line in caplog.messages if "as long as" in line] == [
        "bfloat16 takes 5.9 times as long as float32 on device cpu"
    ]


def test_info_says_where_and_in_which_format_a_cascade_is_drawn_and_why(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("cascade.system.device.own_gpu", lambda: None)
    takes(monkeypatch, 7.0)
    assert main(["info", str(make_tiny_cascade(tmp_path / "tiny"))]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == (
        "drawn on the processor, since torch sees no GPU, in float32;"
        " bfloat16 takes 7 times as long here, so --dtype auto takes float32"
    )
    monkeypatch.setattr(number_format, "has_bfloat16", lambda _: False)
    monkeypatch.setattr("cascade.system.device.has_bfloat16", lambda _: False)
    monkeypatch.setattr(number_format, "name_of", lambda _: "Tesla T4")
    monkeypatch.setattr("cascade.system.device.name_of", lambda _: "Tesla T4")
    said = number_format.explained(torch.device("cuda", 0), [])
    assert said == "drawn on Tesla T4 in float32: it does not support bfloat16"


@pytest.mark.parametrize("preset", ["small/base", "bundled/sr256", "imagen/sr1024", "deepfloyd/base"])
def test_presets_leave_the_precision_to_the_machine(preset: str) -> None:
    path = Path(__file__).parents[1] / "configs" / f"{preset}.yaml"
    assert load_train_config(path).training.precision == "auto"
