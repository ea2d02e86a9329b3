"""The commands work as in their help; test_wrong_input.py has wrong calls."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_model import STAGES, make_tiny_cascade, tiny_configs, tiny_stage
from helpers_text import make_tiny_t5
from helpers_training import SUPER_RESOLUTION, micro_settings
from PIL import Image
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from cascade import CascadePipeline, __version__
from cascade.cli.data import Reading
from cascade.cli.program import main
from cascade.cli.train import find_config, known_presets
from cascade.conditioning import Conditioning
from cascade.config.data import TextConfig
from cascade.config.sampling import SamplingConfig
from cascade.resources.memory import StageCost
from cascade.settings import to_yaml
from cascade.stage import Stage
from cascade.storage.training import load_train_config
from cascade.text.cache import EmbeddingCache
from cascade.text.t5_files import TokenCounter


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_cascade(tmp_path_factory.mktemp("models") / "tiny")


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    """(exit status, stdout, stderr) of a command line."""
    capsys.readouterr()
    status = main([str(argument) for argument in arguments])
    return (status, *capsys.readouterr())


def manifest(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "manifest.jsonl").read_text().splitlines()]


def names(out: Path) -> list[str]:
    return sorted(str(path.relative_to(out)) for path in out.rglob("[!.]*.*"))


# --- the program -------------------------------------------------------------------------------------------


def test_the_module_is_the_same_program_and_help_loads_nothing_heavy() -> None:
    code = "import sys; from cascade.cli.program import main; main(['generate', '--help']); print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "--num-images-per-prompt" in loaded
    assert not {"transformers", "accelerate", "datasets"} & set(loaded.split())


def test_version_and_help_succeed_and_no_command_is_a_wrong_call(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(capsys, "--version")[:2] == (0, f"cascade, version {__version__}\n")
    assert run(capsys, "--help")[0] == 0
    status, out, err = run(capsys)
    assert (status, out) == (2, "")
    assert "generate" in err


def test_a_closed_pipe_and_ctrl_c_end_without_a_traceback(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_arguments: object, **_options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("cascade.drawing.engine.draw_batch", interrupted)
    status, _, err = run(capsys, "generate", "a", "--model", model, "--out", tmp_path / "out")
    assert (status, err.strip()) == (1, "cascade: stopped")
    assert not (tmp_path / "out").exists()
    code = "import sys; from cascade.cli.program import main; sys.exit(main(['info', sys.argv[1]]))"
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w") as broken:
        process = subprocess.run(
            [sys.executable, "-c", code, str(model)], stdout=broken, stderr=subprocess.PIPE, text=True, check=False
        )
    assert (process.returncode, process.stderr) == (1, "")


# --- generate ----------------------------------------------------------------------------------------------


def test_generate_writes_what_the_pipeline_draws(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    options = ("--model", model, "--out", out, "--seed", 7, "-n", 2, "--save-stages", "--grid", "--device", "cpu")
    status, stdout, stderr = run(capsys, "generate", "a red apple", "A fox!", *options)
    assert (status, stdout, stderr) == (0, f"4 pictures in {out}\n", "")
    expected = CascadePipeline.from_pretrained(model, device="cpu")(
        ["a red apple", "A fox!"], seed=7, num_images_per_prompt=2
    )
    stems = ["000000-0-a-red-apple", "000000-1-a-red-apple", "000001-0-a-fox", "000001-1-a-fox"]
    for resolution, images in expected.stages.items():
        for stem, image in zip(stems, images, strict=True):
            file = f"{stem}.png" if resolution == 32 else f"stages/{stem}-{resolution}.png"
            with Image.open(out / file) as written:
                assert written.tobytes() == image.tobytes(), file
    assert len(names(out)) == 4 + 8 + len(["grid.png", "manifest.jsonl", "run.json"])
    assert [line["seed"] for line in manifest(out)] == [7] * 4


def test_every_option_reaches_the_picture(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = {
        "--steps": "base=3,sr16=1",
        "--guidance": "4",
        "--sampler": "base=ddpm",
        "--aug-level": "sr16=0.2",
        "--threshold": "base=0.9,sr16=none",
        "--until": "16",
        "--height": "24",
        "--width": "16",
        "--negative-prompt": "a star",
        "--batch-size": "2",
        "--dtype": "bfloat16",
        "--device": "cpu",
    }
    flat = [part for option in options.items() for part in option]
    assert run(capsys, "generate", "a", "--seed", 1, "--model", model, "--out", tmp_path / "out", *flat)[0] == 0
    line = manifest(tmp_path / "out")[0]
    stages = line["settings"].pop("stages")
    assert line["negative_prompt"] == "a star"
    assert line["settings"] == {"height": 24, "width": 16, "batch_size": 2, "device": "cpu", "dtype": "bfloat16"}
    assert list(stages) == ["base", "sr16"]
    kept = ("steps", "guidance", "sampler", "aug_level", "threshold")
    assert [stages["base"][name] for name in kept] == [3, 4.0, "ddpm", 0.0, 0.9]
    assert [stages["sr16"][name] for name in kept] == [1, 4.0, "ddim", 0.2, None]
    again = CascadePipeline.from_pretrained(model, device="cpu", dtype="bfloat16")(
        "a",
        seed=1,
        steps={"base": 3, "sr16": 1},
        guidance=4.0,
        sampler={"base": "ddpm"},
        aug_level={"sr16": 0.2},
        threshold={"base": 0.9, "sr16": "none"},
        until=16,
        height=24,
        width=16,
        negative_prompt="a star",
        batch_size=2,
    )
    with Image.open(tmp_path / "out" / line["file"]) as written:
        assert written.tobytes() == again.images[0].tobytes()


def test_a_seed_that_was_drawn_is_reported_and_draws_the_same_again(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    call = ("generate", "a", "b", "--model", model, "--until", 8, "--preset", "fast")
    _, stdout, _ = run(capsys, *call, "--out", tmp_path / "1")
    first, last = stdout.splitlines()
    assert first.startswith("seed: ")
    assert last == f"2 pictures in {tmp_path / '1'}"
    run(capsys, *call, "--out", tmp_path / "2", "--seed", first.removeprefix("seed: "), "--low-memory", "--quiet")
    sums = [[(line["run_seed"], line["seed"], line["sha256"]) for line in manifest(tmp_path / n)] for n in "12"]
    assert sums[0] == sums[1]


def test_a_prompt_file_is_drawn_line_by_line_and_bad_lines_are_named(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, out = tmp_path / "p.jsonl", tmp_path / "out"
    file.write_text(
        '{"prompt": "a fox", "seed": 3, "id": "fox"}\nbad\n{"prompt": "a", "steps": {"bse": 1}}\n"a star"\n'
    )
    status, stdout, stderr = run(
        capsys, "generate", "--prompts", file, "--model", model, "--out", out, "--seed", 1, "--until", 8
    )
    assert status == 1
    assert stdout == f"2 pictures in {out}, 2 failed\n"
    assert [line.partition(": ")[0] for line in stderr.splitlines()] == [f"{file}:2", f"{file}:3"]
    assert [(line["id"], line["file"]) for line in manifest(out)] == [
        ("fox", "000000-a-fox.png"),
        ("000003", "000003-a-star.png"),
    ]


def test_prompts_come_from_standard_input(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO("a fox\nключ\n".encode())))
    status, stdout, _ = run(
        capsys, "generate", "--prompts", "-", "--model", model, "--out", tmp_path / "out", "--seed", 1, "--quiet"
    )
    assert (status, stdout) == (0, "")
    assert [line["prompt"] for line in manifest(tmp_path / "out")] == ["a fox", "ключ"]


def test_overwrite_starts_a_new_manifest(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    call = ("generate", "--model", model, "--out", tmp_path / "out", "--seed", 1, "--until", 8)
    assert run(capsys, *call, "a", "b")[0] == 0
    assert run(capsys, *call, "c")[0] == 2
    assert [line["prompt"] for line in manifest(tmp_path / "out")] == ["a", "b"]
    assert run(capsys, *call, "c", "--overwrite")[0] == 0
    assert [line["prompt"] for line in manifest(tmp_path / "out")] == ["c"]


def test_a_prompt_that_is_cut_is_drawn_with_a_warning_of_one_line(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        status, _, stderr = run(
            capsys, "generate", "a red apple " * 30, "--model", model, "--out", tmp_path / "out", "--until", 8
        )
    assert status == 0
    assert stderr.startswith("cascade: warning: the prompt 'a red apple")
    assert len(stderr.splitlines()) == 1


# --- info and assemble -------------------------------------------------------------------------------------


def test_info_counts_parameters_bytes_and_arithmetic(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, stdout, _ = run(capsys, "info", model, "--json")
    assert status == 0
    described = json.loads(stdout)
    assert (described["name"], described["license"], described["format"]) == ("tiny", "CC0-1.0", 1)
    text, *stages = described["parts"]
    pipeline = CascadePipeline.from_pretrained(model, device="cpu")
    assert text["parameters"] == pipeline.text_encoder.parameters_count
    for part, slot, name in zip(stages, pipeline.slots, STAGES, strict=True):
        network = slot.load().network
        assert part["name"] == name
        assert part["parameters"] == sum(parameter.numel() for parameter in network.parameters())
        assert part["bytes"] == sum(file.stat().st_size for file in (model / name).iterdir())
        assert (part["steps"], part["calls"]) == (2, 4)
        assert part["gflop_per_picture"] == pytest.approx(4 * part["gflop_per_call"])
    table = run(capsys, "info", model)[1].splitlines()
    assert table[0] == "tiny, licence CC0-1.0, format 1"
    ways_to_load, what_is_free, where = 4, 1, 2
    assert len(table) == 2 + len(["header", "text encoder", *STAGES, "all"]) + 1 + ways_to_load + what_is_free + where


@pytest.mark.parametrize("index", [0, 1])
def test_arithmetic_counted_without_memory_is_that_of_the_real_network(index: int) -> None:
    config = tiny_configs()[index]
    stage = tiny_stage(config)
    low = None if config.low_resolution is None else torch.zeros(1, 3, 8, 8)
    level = None if low is None else torch.zeros(1, 1, 1, 1)
    cond = Conditioning(torch.randn(1, 5, 32), torch.ones(1, 5, dtype=torch.bool), low, level)
    prepared = stage.network.prepare(stage.enlarge(cond))
    size = config.resolution
    # torch does not count what the fused attention of a CPU does.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        stage.network(torch.randn(1, 3, size, size), torch.zeros(1, 1, 1, 1), prepared)
    expected = counter.get_total_flops() / 1e9
    assert StageCost(config).flops_per_call(5) / 1e9 == pytest.approx(expected)


@pytest.mark.parametrize(
    ("changes", "calls"),
    [
        ({"guidance": 1.0}, 6),
        ({"guidance": 2.0}, 12),
        ({"guidance": 2.0, "sampler": "heun"}, 22),
        ({"guidance": 2.0, "guidance_interval": (-2.0, 2.0)}, 9),
    ],
)
def test_network_calls_are_those_of_the_sampler(changes: dict[str, Any], calls: int) -> None:
    config, settings = tiny_configs()[0], SamplingConfig(**{"steps": 6, **changes})
    assert StageCost(config).calls(settings) == calls == seen_by(tiny_stage(config), settings)


def seen_by(stage: Stage, settings: SamplingConfig) -> int:
    """Pictures that pass through the network while one is drawn."""
    seen = []
    handle = stage.network.register_forward_hook(lambda _network, inputs, _output: seen.append(len(inputs[0])))
    cond = Conditioning(torch.randn(1, 2, 32), torch.ones(1, 2, dtype=torch.bool))
    rng = [torch.Generator().manual_seed(0)]
    with torch.inference_mode():
        stage.sample(cond, cond, torch.randn(1, 3, 8, 8, generator=rng[0]), rng, settings)
    handle.remove()
    return sum(seen)


def test_assemble_makes_a_model_of_stages(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stages = [part for name in STAGES[:2] for part in ("--stage", model / name)]
    status, stdout, _ = run(
        capsys, "assemble", "--text-encoder", model / "text_encoder", *stages, "--out", tmp_path / "mine",
        "--name", "mine", "--license", "CC0-1.0", "--dtype", "bfloat16", "--max-text-length", 48,
    )  # fmt: skip
    assert (status, stdout) == (0, f"mine: base, sr16 in {tmp_path / 'mine'}\n")
    sizes = [(folder / "base" / "model.safetensors").stat().st_size for folder in (model, tmp_path / "mine")]
    assert sizes[1] < 0.6 * sizes[0]
    pipeline = CascadePipeline.from_pretrained(tmp_path / "mine", device="cpu")
    assert (pipeline.name, pipeline.text_encoder.max_length) == ("mine", 48)
    assert pipeline("a fox", seed=1).images[0].size == (16, 16)


# --- train and encode --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def t5(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_t5(tmp_path_factory.mktemp("text") / "t5", dim=16)


def training(tmp_path: Path, t5: Path) -> Path:
    settings = micro_settings(tmp_path / "run") | {"text": {"encoder": str(t5), "max_length": 200}}
    path = tmp_path / "config.yaml"
    path.write_text(json.dumps(settings))  # JSON is YAML
    return path


def test_train_leaves_a_stage_that_assembles_and_draws(
    tmp_path: Path, t5: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = training(tmp_path, t5)
    status, stdout, _ = run(capsys, "train", config, "training.steps=2")
    assert (status, stdout) == (0, f"stage base is trained: {tmp_path / 'run' / 'stage'}\n")
    assert run(capsys, "train", config, "training.steps=3", "--resume")[0] == 0
    assert (tmp_path / "run" / "checkpoints" / "step-00000003").is_dir()
    model = tmp_path / "model"
    parts = ("--text-encoder", t5, "--stage", tmp_path / "run", "--out", model, "--name", "m", "--license", "CC0-1.0")
    assert run(capsys, "assemble", *parts)[0] == 0
    assert run(capsys, "generate", "a fox", "--model", model, "--out", tmp_path / "out")[0] == 0


def test_a_run_that_is_asked_to_stop_saves_and_prints_how_to_resume(
    tmp_path: Path, t5: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from cascade.training.trainer import Trainer

    def step(trainer: Trainer, number: int, data: Any, original: Any = Trainer._step) -> Any:
        if number == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(trainer, number, data)

    monkeypatch.setattr(Trainer, "_step", step)
    status, _, stderr = run(capsys, "train", training(tmp_path, t5), "training.steps=9")
    assert status == 1
    assert stderr.splitlines()[-1] == "cascade: stopped after step 3; continue with --resume"


def test_encode_fills_the_cache_with_the_captions_of_the_files(
    tmp_path: Path, t5: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for number, caption in enumerate(["a fox", "a star", "a fox"]):
        Image.new("RGB", (8, 8)).save(pictures / f"{number}.png")
        (pictures / f"{number}.txt").write_text(caption)
    call = ("encode", training(tmp_path, t5), f"text.cache={tmp_path / 'cache'}", "--device", "cpu")
    source = f"data.sources=[{{kind: folder, path: {pictures}}}]"
    status, stdout, _ = run(capsys, *call, source)
    assert status == 0
    assert stdout.startswith(f"3 captions encoded, 3 in {tmp_path / 'cache'}, ")  # the null text is the third
    assert run(capsys, *call, source)[1].startswith("0 captions encoded, 3 in ")


def test_encode_knows_all_that_a_run_asks_its_encoder_for(
    tmp_path: Path, t5: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Held-out captions and sample prompts as well: else the encoder would be loaded in the middle of the run."""
    for name in ("pictures", "held-out"):
        (tmp_path / name).mkdir()
        Image.new("RGB", (8, 8)).save(tmp_path / name / "0.png")
        (tmp_path / name / "0.txt").write_text(f"of {name}")
    cache = tmp_path / "cache"
    changes = (
        f"data.sources=[{{kind: folder, path: {tmp_path}/pictures}}]",
        f"training.validation={{sources: [{{kind: folder, path: {tmp_path}/held-out}}]}}",
        "training.sample_prompts=[a star]",
        f"text.cache={cache}",
    )
    assert run(capsys, "encode", training(tmp_path, t5), *changes, "--device", "cpu")[0] == 0
    found = EmbeddingCache.open(cache)
    assert not found.missing(["", "of pictures", "of held-out", "a star"])
    assert len(found) == 4


def test_an_encode_that_is_asked_to_stop_keeps_its_embeddings_and_resumes(
    tmp_path: Path, t5: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from cascade.text.t5 import TextEncoder

    def encode_and_stop(encoder: TextEncoder, *arguments: Any, original: Any = TextEncoder.encode) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        return original(encoder, *arguments)

    prompts = ", ".join(f"fox {number}" for number in range(20))
    changes = (f"training.sample_prompts=[{prompts}]", f"text.cache={tmp_path / 'cache'}")
    call = ("encode", training(tmp_path, t5), *changes, "--device", "cpu")
    with monkeypatch.context() as patch:
        patch.setattr(TextEncoder, "encode", encode_and_stop)
        status, stdout, stderr = run(capsys, *call)
    assert (status, stderr.splitlines()[-1]) == (1, "cascade: stopped; the same command continues")
    assert stdout.startswith("16 captions encoded, 16 in ")
    status, stdout, _ = run(capsys, *call)
    assert status == 0
    assert stdout.startswith("5 captions encoded, 21 in ")


def test_check_data_counts_names_and_draws(tmp_path: Path, t5: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for number, caption in enumerate(["a fox", "a star", "a fox", "a " + "red " * 80]):
        Image.new("RGB", (8 + number, 8)).save(pictures / f"{number}.png")
        (pictures / f"{number}.txt").write_text(caption)
    source = f"data.sources=[{{kind: folder, path: {pictures}}}]"
    options = ("text.max_length=64", "--sheet", tmp_path / "sheet.png", "--views", 3)
    call = ("check-data", training(tmp_path, t5), source, *options)
    status, stdout, _ = run(capsys, *call)
    assert status == 0
    for line in (
        f"folder {pictures}: 4 records, 4 inspected",
        "  pictures: 8x8 to 11x8, median 10x8",
        "  bad: 0",
        "  copies: 0",
        "  captions: 3 distinct, 1 of them used more than once",
        "captions: 3 to 82 tokens, median 3; 1 of 3 are longer than text.max_length 64 and would be cut",
        f"    cut after {('a' + 62 * ' red')[-60:]!r}",
        f"the first 3 views: {tmp_path / 'sheet.png'}",
    ):
        assert line in stdout.splitlines(), stdout
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.width == 3 * 192 + 2 * 2
    (pictures / "2.png").write_bytes(b"no picture")
    status, stdout, _ = run(capsys, *call)
    assert status == 1
    assert f"    {pictures / '2.png'}: broken picture" in stdout


def test_check_data_looks_at_held_out_data_and_compares_tiles_with_the_crop(
    tmp_path: Path, t5: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, size in (("tiles", (4, 4)), ("held-out", (2, 4))):
        (tmp_path / name).mkdir()
        Image.new("RGB", size).save(tmp_path / name / "0.png")
        (tmp_path / name / "0.txt").write_text(name)
    changes = (
        *SUPER_RESOLUTION,
        f"data={{tiles: true, crop: 4, sources: [{{kind: folder, path: {tmp_path}/tiles}}]}}",
        f"training.validation={{sources: [{{kind: folder, path: {tmp_path}/held-out}}]}}",
    )
    status, stdout, _ = run(capsys, "check-data", training(tmp_path, t5), *changes, "--sheet", tmp_path / "sheet.png")
    assert status == 1
    assert "  pictures: 4x4 to 4x4, median 4x4\n  bad: 0\n" in stdout, "8 px are those of the whole picture"
    assert f"held-out folder {tmp_path}/held-out: 1 records" in stdout
    assert "0.png: the tile of 2x4 is smaller than data.crop 4" in stdout


def test_check_data_tells_of_a_sheet_that_cannot_be_written_before_it_looks(
    tmp_path: Path, t5: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("cascade.data.survey.survey", lambda *_: pytest.fail("it looked"))
    (tmp_path / "file").write_text("")
    status, _, stderr = run(capsys, "check-data", training(tmp_path, t5), "--sheet", tmp_path / "file" / "sheet.png")
    assert status == 2
    assert "file/sheet.png: cannot be written: " in stderr


def test_captions_are_shown_as_the_encoder_reads_them(t5: Path) -> None:
    reading = Reading(TokenCounter(t5), TextConfig(captions="lower", max_length=5))
    assert reading.label(" A Red FOX ") == "a red fox"
    assert reading.label("A red fox of the sea") == "[cut to 5 tokens] a red fox of"
    assert reading.label("") == ""
    assert reading.describe(["A red fox of the sea", "a red fox of THE sea"])[1:] == ["    cut after 'a red fox of'"]


def test_presets_are_the_files_that_come_along() -> None:
    assert {"tiny/base", "small/base", "imagen/base"} <= set(known_presets())
    for name in known_presets():
        assert to_yaml(load_train_config(find_config(f"preset:{name}")))
