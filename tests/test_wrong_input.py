"""Every wrong call gives a one-line error, exits with status 2, and leaves no partial files."""

# ruff: noqa: E501 - two tables with a case a line

from __future__ import annotations

import json
import shlex
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_model import TEXT_DIM, make_tiny_cascade, tiny_stage, tiny_stage_config
from helpers_text import make_tiny_t5
from helpers_training import micro_settings

from cascade.cli.program import main
from cascade.config.stage import save_stage
from cascade.errors import CascadeError
from cascade.models.unet import UNet
from cascade.storage.index import find_stage


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_cascade(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def t5(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_t5(tmp_path_factory.mktemp("text") / "t5", dim=16)


@dataclass(frozen=True)
class World:
    """A folder to work in, a model and a text encoder to read, and a patch that is undone."""

    folder: Path
    model: Path
    text: Path
    patch: pytest.MonkeyPatch

    @property
    def own(self) -> Path:
        """A copy of the model, to be damaged."""
        copy = self.folder / "model"
        if not copy.exists():
            shutil.copytree(self.model, copy)
        return copy


@dataclass(frozen=True)
class Case:
    """A wrong call. {model}, {own} and {folder} stand for paths; `prepare` makes the world wrong first."""

    name: str
    arguments: str
    message: str
    prepare: Callable[[World], object] = lambda world: world


def written(name: str, content: str) -> Callable[[World], object]:
    return lambda world: (world.folder / name).write_text(content)


def damaged(file: str, content: bytes) -> Callable[[World], object]:
    return lambda world: (world.own / file).write_bytes(content)


def edited(file: str, **changes: object) -> Callable[[World], object]:
    """A JSON file of the model with other values at its top."""

    def edit(world: World) -> None:
        path = world.own / file
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return edit


def removed(name: str) -> Callable[[World], object]:
    return lambda world: shutil.rmtree(world.own / name) if (world.own / name).is_dir() else (world.own / name).unlink()


def truncated(file: str) -> Callable[[World], object]:
    return lambda world: (world.own / file).write_bytes((world.own / file).read_bytes()[:-100])


def other_network(**changes: object) -> Callable[[World], object]:
    """The base stage's settings say another network than its weights are of."""
    model = tiny_stage_config("base", 8).model.model_dump(mode="json") | changes
    return edited("base/stage.json", model=model)


def wider_text(world: World) -> None:
    """A base stage that was trained behind another text encoder."""
    model = tiny_stage_config("base", 8).model.model_copy(update={"text_dim": 64})
    config = tiny_stage_config("base", 8, model=model)
    save_stage(world.own / "base", config, tiny_stage(config).network.state_dict())


def forward(network_call: Callable[..., Any]) -> Callable[[World], object]:
    return lambda world: world.patch.setattr(UNet, "forward", network_call)


def runs_out_of_memory(network: UNet, z: torch.Tensor, *_conditions: object) -> torch.Tensor:
    if network.low_res_channels and z.shape[-1] == 32:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")
    return z.clone()


def cannot_allocate(_network: UNet, *_conditions: object) -> torch.Tensor:
    torch.empty(1 << 50)


def gives_nan(_network: UNet, z: torch.Tensor, *_conditions: object) -> torch.Tensor:
    return torch.full_like(z, float("nan"))


GENERATE = "generate fox --out {folder}/out --seed 1 --model "
DRAW = GENERATE + "{model} "
OWN = GENERATE + "{own}"
FILE = "generate --out {folder}/out --seed 1 --model {model} --prompts "

DRAWING = [
    Case("no prompt", "generate --out {folder}/out", "give either prompts or --prompts FILE"),
    Case("prompts twice", DRAW + "--prompts p.txt", "give either prompts or --prompts FILE"),
    Case("unknown option", DRAW + "--stepz 3", "No such option '--stepz'"),
    Case("unknown stage", DRAW + "--steps bse=3", "steps: no stage is called 'bse'; this cascade has base, sr16, sr32; did you mean base?"),
    Case("steps not a number", DRAW + "--steps base=x", "Invalid value for '--steps': 'x' is not a whole number."),
    Case("steps zero", DRAW + "--steps 0", "stage base: steps: should be greater than 0, not 0"),
    Case("stage twice", DRAW + "--steps base=1,base=2", "each stage once as in base=20,sr256=4"),
    Case("steps half", DRAW + "--steps base=1,2", "each stage once as in base=20,sr256=4"),
    Case("unknown sampler", DRAW + "--sampler euler", "stage base: sampler: 'euler' is not one of ddpm, ddim, heun, dpm++"),
    Case("threshold", DRAW + "--threshold often", "'often'; expected a quantile such as 0.995, clip or none"),
    Case("threshold too large", DRAW + "--threshold 2", "stage base: threshold: should be less than 1"),
    Case("guidance", DRAW + "--guidance nan", "Invalid value for '--guidance': 'nan' is not a number"),
    Case("aug level", DRAW + "--aug-level 1", "stage sr16: aug_level: should be less than 1, not 1.0"),
    Case("preset", DRAW + "--preset slow", "'slow' is not one of 'fast', 'default', 'best'"),
    Case("until", DRAW + "--until 12", "until: no stage draws 12 px; choose one of 8, 16, 32"),
    Case("height", DRAW + "--height 30", "height: 30 is not possible; expected a multiple of 8"),
    Case("negative count", DRAW + "-n -1", "Invalid value for '-n' / '--num-images-per-prompt': -1 is not in the range x>=1"),
    Case("bad seed", DRAW + "--seed apple", "Invalid value for '--seed': 'apple' is not a valid integer range"),
    Case("seed below 0", DRAW + "--seed -1", "Invalid value for '--seed': -1 is not in the range"),
    Case("unknown device", DRAW + "--device abacus", "device: abacus cannot be used here"),
    Case("unknown dtype", DRAW + "--dtype int3", "dtype: 'int3'; expected one of float32, bfloat16, float16, auto"),
    Case("fp16 on a CPU", DRAW + "--dtype float16 --device cpu", "dtype: float16 needs a GPU; on a CPU use bfloat16"),
    Case("no model", GENERATE + "{folder}/none", "none: no such model folder; give a folder with cascade.json, a hub id, or `bundled`"),
    Case("no cascade.json", GENERATE + "{folder}", "cascade.json: no such file"),
    Case("cascade.json damaged", OWN, "cascade.json: not readable as JSON", damaged("cascade.json", b"{")),
    Case("format", OWN, "cascade.json: format 99; this version of cascade reads format 1", edited("cascade.json", format=99)),
    Case("stage format", OWN, "stage.json: format 0; this version", edited("sr16/stage.json", format=0)),
    Case("no stages", OWN, "cascade.json: stages: expected a list of stage names", edited("cascade.json", stages=[])),
    Case("text length", OWN, "cascade.json: max_text_length: expected a whole number", edited("cascade.json", max_text_length="long")),
    Case("stage missing", OWN, "sr16/stage.json: no such file", removed("sr16")),
    Case("stage setting", OWN, "stage.json: resolutoin is not a setting; did you mean resolution?", edited("sr16/stage.json", resolutoin=3)),
    Case("weights missing", OWN, "sr16/model.safetensors: no such file", removed("sr16/model.safetensors")),
    Case("weights truncated", OWN, "sr16/model.safetensors: damaged, or not safetensors", truncated("sr16/model.safetensors")),
    Case("weights scrambled", OWN, "sr16/model.safetensors: damaged, or not safetensors", damaged("sr16/model.safetensors", b"these are no weights")),
    Case("weights of other settings", OWN, "the weights belong to other settings", other_network(channels=[8, 24])),
    Case("sizes do not chain", OWN, "stage sr32 starts from 16 px, but stage base before it draws 8 px", edited("cascade.json", stages=["base", "sr32"])),
    Case("text width", OWN, f"stage base: reads text of width 64, the text encoder gives {TEXT_DIM}", wider_text),
    Case("text encoder missing", OWN, "text_encoder: no such folder", removed("text_encoder")),
    Case("out of memory", DRAW, "out of memory in stage sr32; use a smaller batch_size", forward(runs_out_of_memory)),
    Case("out of memory on a CPU", DRAW, "out of memory in stage base", forward(cannot_allocate)),
    Case("prompt file missing", FILE + "{folder}/p.txt", "p.txt: no such file"),
    Case("prompt file is a folder", FILE + "{folder}/p.txt", "p.txt: no prompts in it; write one per line", lambda world: (world.folder / "p.txt").mkdir()),
    Case("prompt file empty", FILE + "{folder}/p.txt", "p.txt: no prompts in it; write one per line", written("p.txt", "\n")),
    Case("prompt file of another kind", FILE + "{folder}/p.doc", "expected one of .txt, .jsonl, .ndjson, .csv, .tsv (also compressed: .gz), .parquet, a folder of captions or of Parquet files, or `-`"),
    Case("prompt table header", FILE + "{folder}/p.csv", "p.csv:1: 'promt' is not a column; did you mean prompt?", written("p.csv", "promt\nfox\n")),
    Case("output below a file", "generate fox --model {model} --out {folder}/file/out", "file/out: cannot be written", written("file", "")),
    Case("output is a file", "generate fox --model {model} --out {folder}/file", "file: cannot be written", written("file", "")),
]  # fmt: skip


def settings(world: World) -> dict[str, Any]:
    return micro_settings(world.folder / "out") | {"text": {"encoder": str(world.text), "max_length": 200}}


def good_settings(world: World) -> None:
    (world.folder / "config.yaml").write_text(json.dumps(settings(world)))  # JSON is YAML


def no_art(world: World) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    columns = ("image", "id", "caption", "captions", "style", "group")
    parquet.write_table(
        pa.table({name: pa.array([], pa.string()) for name in columns}), world.folder / "train-64.parquet"
    )


def later_settings(world: World) -> None:
    (world.folder / "config.yaml").write_text(json.dumps(settings(world) | {"format": 2}))


def no_data(world: World) -> None:
    (world.folder / "config.yaml").write_text(json.dumps({k: v for k, v in settings(world).items() if k != "data"}))


def if_folder(**unet: object) -> Callable[[World], object]:
    """A folder of DeepFloyd IF in diffusers' layout whose network's settings are these, and whose index is empty."""

    def write(world: World) -> None:
        (world.folder / "if" / "unet").mkdir(parents=True)
        (world.folder / "if" / "model_index.json").write_text('{"_class_name": "IFPipeline"}')
        (world.folder / "if" / "unet" / "config.json").write_text(json.dumps(unet))
        (world.folder / "if" / "unet" / "diffusion_pytorch_model.safetensors.index.json").write_text("{}")

    return write


IF_KINDS: dict[str, object] = {
    "mid_block_type": "UNetMidBlock2DSimpleCrossAttn", "act_fn": "gelu", "resnet_time_scale_shift": "scale_shift",
    "cross_attention_norm": "group_norm", "addition_embed_type": "text", "out_channels": 6, "sample_size": 64,
    "time_embedding_act_fn": "gelu", "resnet_skip_time_act": True,
}  # fmt: skip
IF_SIZES: dict[str, object] = {
    "block_out_channels": [32], "layers_per_block": 1, "down_block_types": ["ResnetDownsampleBlock2D"], "attention_head_dim": 8,
    "encoder_hid_dim": 8, "cross_attention_dim": 32, "addition_embed_type_num_heads": 1, "norm_num_groups": 8,
}  # fmt: skip

TRAIN = "train {folder}/config.yaml "

TRAINING = [
    Case("config missing", "train {folder}/none.yaml", "none.yaml: no such file"),
    Case("config is a folder", "train {folder}", "cannot be read: Is a directory; give a YAML file"),
    Case("config is empty", TRAIN, "config.yaml: expected settings as `name: value`, found nothing", written("config.yaml", "")),
    Case("config is no text", TRAIN, "config.yaml: not UTF-8; save the file as UTF-8", lambda world: (world.folder / "config.yaml").write_bytes(b"\x89PNG")),
    Case("YAML broken", TRAIN, "config.yaml: not valid YAML", written("config.yaml", "a: [1\nb: }")),
    Case("YAML a list", TRAIN, "config.yaml: expected settings as `name: value`, found list", written("config.yaml", "- a")),
    Case("unknown setting", TRAIN + "training.stepz=3", "training.stepz is not a setting; did you mean training.steps?", good_settings),
    Case("wrong type", TRAIN + "training.steps=many", 'training.steps: should be a valid integer, not "many"', good_settings),
    Case("setting missing", TRAIN, "config.yaml: data is missing", no_data),
    Case("no assignment", TRAIN + "training.steps", "'training.steps': expected key=value, such as training.steps=100", good_settings),
    Case("unknown preset", "train preset:tiny/bas", "preset:tiny/bas: no such preset; expected one of "),
    Case("missing tracker", TRAIN + "training.trackers=[clearml]", "training.trackers: clearml is not installed", good_settings),
    Case("fp16 on a CPU", TRAIN + "training.precision=fp16", "training.precision: fp16 needs a GPU; on a CPU use bf16", good_settings),
    Case("nothing to resume", TRAIN + "--resume", "no usable checkpoint to resume from; start the run without --resume", good_settings),
    Case("text width", TRAIN + "stage.model.text_dim=32", "set stage.model.text_dim=16", good_settings),
    Case("data missing", TRAIN + "'data.sources=[{{kind: folder, path: {folder}/none}}]'", "none: no such folder", good_settings),
    Case("config of a later version", TRAIN, "config.yaml: format 2; this version of cascade reads format 1", later_settings),
    Case("cache is a file", "encode {folder}/config.yaml text.cache={folder}/file", "file: cannot be written: File exists", lambda world: (good_settings(world), written("file", "")(world))),
    Case("no cache to fill", "encode {folder}/config.yaml", "text.cache is not set; name a folder with text.cache=FOLDER", good_settings),
    Case("no such stage", "assemble --text-encoder {model}/text_encoder --stage {folder} --out {folder}/out --name a --license b", "no stage here; give a folder with stage.json"),
    Case("stages that do not chain", "assemble --text-encoder {model}/text_encoder --stage {model}/sr16 --out {folder}/out --name a --license b", "stage sr16: the first stage must be a base stage"),
    Case("option missing", "assemble --stage {model}/base", "Missing option '--text-encoder'"),
    Case("unknown command", "draw fox", "No such command 'draw'"),
    Case("IF without its sizes", "convert {folder}/if {folder}/out", "unet/config.json: block_out_channels is missing; download the file again", if_folder(**IF_KINDS)),
    Case("IF with an empty index", "info {folder}/if", "index.json: weight_map is missing; download the file again", if_folder(**IF_KINDS, **IF_SIZES)),
    Case("art without pictures", "evaluate {model} --suite art --data {folder} --out {folder}/out", "no pictures in train-64.parquet; make them again", no_art),
    Case("no text encoder to check with", "check-data {folder}/config.yaml text.encoder={folder}", "no tokenizer.json", good_settings),
    Case("info of nothing", "info {folder}/none", "none: no such model folder"),
    Case("info of damaged weights", "info {own}", "text_encoder/model.safetensors: damaged, or not safetensors", truncated("text_encoder/model.safetensors")),
]  # fmt: skip


@pytest.mark.parametrize("case", [*DRAWING, *TRAINING], ids=lambda case: case.name)
def test_a_wrong_call_says_so_in_one_line(
    case: Case,
    tiny: Path,
    t5: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    world = World(tmp_path, tiny, t5, monkeypatch)
    case.prepare(world)
    paths = {"model": tiny, "own": tmp_path / "model", "folder": tmp_path}
    capsys.readouterr()
    status = main(shlex.split(case.arguments.format(**paths)))
    stdout, stderr = capsys.readouterr()
    assert status == 2, stderr
    lines = stderr.splitlines()
    assert len(lines) == 1, stderr
    assert lines[0].startswith("cascade: error: ")
    assert case.message in lines[0]
    assert len(lines[0]) < 500
    assert stdout == ""
    left = [path for path in tmp_path.rglob("*") if path.name.startswith(".") or path.suffix == ".png"]
    assert not left
    assert not (tmp_path / "out").exists() or not any((tmp_path / "out").rglob("*.safetensors"))
    if case in DRAWING:
        assert not (tmp_path / "out").exists()


def test_an_existing_output_is_named_and_kept(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "manifest.jsonl").write_text("{}\n")
    assert main(["generate", "fox", "--model", str(tiny), "--out", str(tmp_path)]) == 2
    message = f"cascade: error: {tmp_path}: holds the pictures of an earlier run; name another folder, or --overwrite\n"
    assert capsys.readouterr().err == message
    assert [path.name for path in tmp_path.iterdir()] == ["manifest.jsonl"]


def test_two_mistakes_in_the_settings_are_two_lines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "c.yaml").write_text(json.dumps(micro_settings(tmp_path / "run") | {"sead": 1}))
    assert main(["train", str(tmp_path / "c.yaml"), "training.stepz=1"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    assert all(line.startswith("cascade: error: ") for line in lines)


def test_only_bad_lines_is_a_failure_that_leaves_nothing(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "p.jsonl").write_text("bad\n{}\n")
    call = ["generate", "--prompts", str(tmp_path / "p.jsonl"), "--model", str(tiny), "--out", str(tmp_path / "out")]
    assert main([*call, "--seed", "1"]) == 1
    stdout, stderr = capsys.readouterr()
    assert stdout == f"0 pictures in {tmp_path / 'out'}, 2 failed\n"
    assert [line.split(": ")[0] for line in stderr.splitlines()] == [f"{tmp_path / 'p.jsonl'}:{n}" for n in (1, 2)]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("source", ["runs/mine/base", "runs/mine"])
def test_what_looks_local_is_not_asked_of_the_hub(source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    monkeypatch.setattr("cascade.storage.index.download", None)
    with pytest.raises(CascadeError, match=f"^{source}: no stage here; give a folder"):
        find_stage(source)


def test_a_stage_that_the_hub_does_not_give_is_one_line_that_names_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def offline(repo: str, **_: bool) -> Path:
        raise CascadeError(f"{repo}: neither a folder nor a model on the hub: offline")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("cascade.storage.index.download", offline)
    with pytest.raises(CascadeError, match=r"^runs/nope/base: no stage here; .* \(runs/nope: neither .*offline\)$"):
        find_stage("runs/nope/base")
