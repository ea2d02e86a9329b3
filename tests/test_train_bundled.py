"""scripts/train_bundled.py: parts in the order of their dependencies, each started once and resumed."""

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from click.testing import CliRunner

from cascade.storage.training import load_train_config

SCRIPT = Path(__file__).parents[1] / "scripts" / "train_bundled.py"


@pytest.fixture
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("train_bundled", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


class Recorder:
    """In place of subprocess: makes what a part would make, and fails where it is told to."""

    def __init__(self, script: ModuleType, data: Path, out: Path) -> None:
        self.results = {tuple(part.command()): part for part in script.parts(data, out, list(script.TEXT_OPTIONS))}
        self.done: list[str] = []
        self.commands: list[list[str]] = []
        self.failing = ""

    def __call__(self, command: list[str], cwd: Path, check: bool) -> subprocess.CompletedProcess[bytes]:
        assert not check
        assert cwd.name == "out"
        part = self.results[tuple(argument for argument in command if argument != "--resume")]
        self.commands.append(command)
        if part.name == self.failing:
            # As a run that is stopped leaves it: a stage folder is there with the first checkpoint.
            run = cwd / "runs/bundled" / part.name
            for file in (run / "checkpoints/step-00000500/state.json", run / "stage/stage.json"):
                file.parent.mkdir(parents=True)
                file.touch()
            return subprocess.CompletedProcess(command, 1)
        self.done.append(part.name)
        part.result.parent.mkdir(parents=True, exist_ok=True)
        part.result.touch()
        return subprocess.CompletedProcess(command, 0)


def test_an_interrupted_run_goes_on_where_it_stopped(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, out = tmp_path / "data", tmp_path / "out"
    data.mkdir()
    recorder = Recorder(script, data, out)
    monkeypatch.setattr(script.subprocess, "run", recorder)
    arguments = ["--data", str(data), "--out", str(out)]
    recorder.failing = "sr256"
    stopped = CliRunner().invoke(script.main, arguments)
    assert stopped.exit_code == 1
    assert "sr256 ended with exit status 1" in stopped.output
    assert recorder.done == ["data", "text", "cache", "base", "drawn256"]
    recorder.failing = ""
    assert CliRunner().invoke(script.main, arguments).exit_code == 0
    assert tuple(recorder.done) == script.PARTS
    resumed = [command for command in recorder.commands if "--resume" in command]
    assert [Path(command[4]).stem for command in resumed] == ["sr256"]


def test_until_stops_after_a_part(script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = Recorder(script, tmp_path, tmp_path / "out")
    monkeypatch.setattr(script.subprocess, "run", recorder)
    arguments = ["--data", str(tmp_path), "--out", str(tmp_path / "out"), "--until", "base"]
    assert CliRunner().invoke(script.main, arguments).exit_code == 0
    assert recorder.done == ["data", "text", "cache", "base"]


def test_each_run_writes_and_reads_where_the_parts_say(script: ModuleType, tmp_path: Path) -> None:
    results = {part.name: part.result for part in script.parts(tmp_path / "data", tmp_path, [])}
    for name in script.STAGES:
        config = load_train_config(script.CONFIGS / f"{name}.yaml")
        assert results[name].parents[2] == tmp_path / config.output
        assert results[name].parent.name == f"step-{config.training.steps:08d}"
        assert results["text"].parent == tmp_path / config.text.encoder
        assert config.text.cache is not None
        assert results["cache"].parent == tmp_path / config.text.cache
        starts_from = config.training.init_from
        if starts_from is not None:
            assert results[Path(starts_from).name].parents[2] == tmp_path / starts_from
        lows = [file for source in config.data.sources if getattr(source, "low_column", None) for file in source.files]
        assert [tmp_path / file for file in lows] == [results[f"drawn{config.stage.resolution}"] for _ in lows]


@pytest.mark.parametrize(
    ("folders", "last"),
    [(["emoji"], "validation-256.parquet"), (["emoji", "photos"], "photos-validation-64.parquet")],
)
def test_the_copies_count_as_made_when_the_last_file_is_there(
    script: ModuleType, tmp_path: Path, folders: list[str], last: str
) -> None:
    for folder in folders:
        (tmp_path / folder).mkdir()
    assert script.parts(tmp_path, tmp_path / "out", [])[0].result.name == last
