"""`~` is the home folder wherever a path is read, and never a folder of that name."""

from __future__ import annotations

import shutil
import typing
from pathlib import Path

import click
import pytest
from helpers_model import make_tiny_cascade
from helpers_training import micro_config
from PIL import Image
from pydantic import AfterValidator

from cascade import CascadePipeline, TextEncoder
from cascade.cli.program import main, program
from cascade.config.training import TrainConfig
from cascade.drawing.edit import read_picture
from cascade.errors import CascadeError
from cascade.files.paths import expanded
from cascade.prompts.reading import read_prompts
from cascade.settings import AtMost, Settings, to_yaml
from cascade.storage.index import find_stage
from cascade.storage.stage import load_stage
from cascade.storage.training import load_train_config


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_cascade(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home of the test's own; the folder at hand is another one, and nothing may be made in it."""
    (tmp_path / "here").mkdir()
    (tmp_path / "home").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "home"


def test_only_a_beginning_means_home(home: Path) -> None:
    assert [expanded(path) for path in ("~", "~/a", "./~", "a/~", "a~", "")] == [
        str(home), f"{home}/a", "./~", "a/~", "a~", "",
    ]  # fmt: skip
    assert expanded("~root").startswith("/")


@pytest.mark.usefixtures("home")
def test_the_home_of_nobody_is_told_unless_something_is_called_so() -> None:
    with pytest.raises(
        CascadeError,
        match=r"^~nobody-here/x: the home folder of ~nobody-here is not known; if that is its name, write \./~",
    ):
        expanded("~nobody-here/x")
    Path("~$lock.txt").touch()
    assert expanded("~$lock.txt") == "~$lock.txt"


def test_every_path_of_the_command_line_is_one() -> None:
    """Options and arguments by what they are called in the help; those that are no paths are named here."""
    plain = {"prompts", "assignments", "name", "license", "prompt", "negative_prompt", "device", "dtype", "adapter"}
    plain |= {"shard", "batch_size", "host", "allowed_host", "steps", "guidance", "sampler", "aug_level", "threshold"}
    plain |= {"strength", "extend", "guidance_rescale", "projection", "regions", "travel", "word", "matrix"}
    plain |= {"conditions", "guidance_of"}
    plain |= {"default_style", "keep"}
    for command in program.commands.values():
        for parameter in command.params:
            if parameter.type is click.STRING:
                assert parameter.name in plain, f"{command.name}: {parameter.name} has no type; is it a path?"
            assert not isinstance(parameter.type, click.Path), f"{command.name}: {parameter.name}"


def reads_path(item: object) -> bool:
    """Whether it checks a path; a bound of a number is a validator too."""
    return isinstance(item, AfterValidator) and not isinstance(item.func, AtMost)


def fields(kind: type[Settings]) -> list[tuple[str, bool]]:
    """Settings, and whether each is read as a path."""
    found = []
    for name, field in kind.model_fields.items():
        kinds = [field.annotation, *typing.get_args(field.annotation)]
        is_path = any(map(reads_path, field.metadata)) or any(
            reads_path(item) for inner in kinds for item in typing.get_args(inner)
        )
        if is_path or str in kinds:
            found.append((name, is_path))
        for inner in kinds:
            for part in (
                inner,
                *typing.get_args(inner),
                *(p for a in typing.get_args(inner) for p in typing.get_args(a)),
            ):
                if isinstance(part, type) and issubclass(part, Settings):
                    found += fields(part)
    return found


def test_every_setting_that_is_a_path_is_one() -> None:
    paths = {name for name, is_path in fields(TrainConfig) if is_path}
    assert paths == {"output", "encoder", "cache", "path", "files", "name", "decoded", "init_from", "teacher", "folder"}


def test_settings_of_a_run_mean_home_and_are_kept_as_what_they_mean(home: Path) -> None:
    config = micro_config(
        "~/run", "text.cache=~/c", "text.encoder=~/t5", "training.init_from=~/old", "data.decoded=~/d"
    )
    assert [config.output, config.text.cache, config.text.encoder, config.training.init_from, config.data.decoded] == [
        f"{home}/{name}" for name in ("run", "c", "t5", "old", "d")
    ]
    assert "~" not in to_yaml(config)


@pytest.mark.usefixtures("home")
def test_an_empty_path_is_told_and_is_not_the_folder_at_hand(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(CascadeError, match="output: is empty; name a file or folder"):
        micro_config("")
    assert main(["generate", "a fox", "--out", ""]) == 2
    assert "Invalid value for '--out': is empty; name a file or folder." in capsys.readouterr().err


def test_python_and_command_line_find_what_lies_at_home(home: Path, model: Path) -> None:
    shutil.copytree(model, home / "model")
    Image.new("RGB", (8, 8), "red").save(home / "red.png")
    (home / "p.txt").write_text("a fox")
    (home / "run.yaml").write_text(to_yaml(micro_config("~/run")))
    pipeline = CascadePipeline.from_pretrained("~/model", device="cpu")
    pipeline.save_pretrained("~/copy")
    TextEncoder.from_pretrained("~/model/text_encoder").save_pretrained("~/t5")
    assert load_stage("~/model/base").config == load_stage(find_stage("~/model/base")).config
    assert load_train_config("~/run.yaml").output == f"{home}/run"
    assert len(list(read_prompts("~/p.txt", 0))) == 1
    assert read_picture("~/red.png").shape == (1, 3, 8, 8)
    assert read_picture(Path("~/red.png")).shape == (1, 3, 8, 8)
    options = ["--model=~/model", "--device=cpu"]
    assert main(["generate", "--prompts=~/p.txt", "--out=~/drawn", "--until=8", *options]) == 0
    assert main(["upscale", "~/red.png", "--out=~/larger", "--to=16", *options]) == 0
    assert main(["info", "~/copy"]) == 0
    assert {path.name for path in home.iterdir()} >= {"copy", "t5", "drawn", "larger"}
    assert list(Path.cwd().iterdir()) == []
