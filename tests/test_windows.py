"""The commands on an emulated Windows: see emulated_windows/sitecustomize.py.

On Windows itself the same commands run unchanged.
"""

from __future__ import annotations

import ast
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from helpers_model import make_tiny_cascade
from helpers_training import micro_settings, write_pictures
from PIL import Image

import cascade
from cascade import system
from cascade.cli.model import _adapters
from cascade.files.paths import alike, expanded
from cascade.settings import override
from cascade.storage.index import may_be_on_hub

TESTS = Path(__file__).parent
STOP = signal.SIGINT if sys.platform != "win32" else signal.CTRL_BREAK_EVENT
PROMPTS = ("a red circle", "ein grüner Würfel", "два синих круга", "赤い丸", "a 😀")
DRIVER = """
import json, sys
from cascade.__main__ import run
for command in json.loads(sys.argv[1]):
    sys.argv[1:] = command
    status = run()
    if status:
        sys.exit(f"{command}: {status}")
"""

pytestmark = pytest.mark.skipif(sys.platform == "darwin", reason="the emulation looks into /proc")


@dataclass(frozen=True)
class Desk:
    """A folder on a disk of Windows, with a model and a file of prompts in it."""

    folder: Path

    @property
    def environment(self) -> dict[str, str]:
        emulation = [] if sys.platform == "win32" else [str(TESTS / "emulated_windows")]
        return os.environ | {
            "PYTHONPATH": os.pathsep.join([*emulation, str(TESTS.parent), os.environ.get("PYTHONPATH", "")]),
            "EMULATED_DISK": str(self.folder),
            "PYTHONIOENCODING": "cp1252",
            "PYTHONWARNDEFAULTENCODING": "1",
            "OMP_NUM_THREADS": "1",
        }

    def start(self, *arguments: object) -> subprocess.Popen[bytes]:
        """One command, in a process of its own."""
        command = [sys.executable, "-m", "cascade", *map(str, arguments)]
        return subprocess.Popen(
            command, env=self.environment, cwd=self.folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            creationflags=getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0),  # Ctrl-Break reaches a group
        )  # fmt: skip

    def run(self, *commands: Sequence[object]) -> str:
        """Commands one after the other in one process; what they print. All must succeed."""
        texts = json.dumps([[str(argument) for argument in command] for command in commands])
        done = subprocess.run(
            [sys.executable, "-c", DRIVER, texts],
            env=self.environment, cwd=self.folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False,
        )  # fmt: skip
        said = done.stdout.decode("cp1252")
        assert done.returncode == 0, said
        return said

    def python(self, code: str) -> str:
        """What a program prints that uses our package."""
        done = subprocess.run(
            [sys.executable, "-c", code], env=self.environment, cwd=self.folder, capture_output=True, check=False
        )
        assert done.returncode == 0, done.stderr.decode("cp1252")
        return done.stdout.decode("cp1252")

    def manifest(self, out: str) -> list[dict[str, Any]]:
        text = (self.folder / out / "manifest.jsonl").read_text(encoding="utf-8")
        return [json.loads(line) for line in text.splitlines()]


def picture(shade: int) -> Image.Image:
    return Image.new("RGB", (12, 10), (shade, 40, 200))


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Desk:
    folder = tmp_path_factory.mktemp("disk") / "My Pictures"
    folder.mkdir()
    make_tiny_cascade(folder / "tiny model")
    (folder / "prompts.txt").write_text("\n".join(PROMPTS) + "\n", encoding="utf-8")
    return Desk(folder)


GENERATE = ("generate", "--model", "tiny model", "--prompts", "prompts.txt", "--seed", 5, "-n", 3, "--out")


def ended_after(desk: Desk, pictures: int, end: Callable[[subprocess.Popen[bytes]], None], *command: object) -> int:
    """The exit status of a run that is stopped or killed as soon as it has written some pictures."""
    process = desk.start(*command)
    manifest = desk.folder / str(command[-1]) / "manifest.jsonl"
    while process.poll() is None and not (manifest.exists() and len(manifest.read_bytes().splitlines()) >= pictures):
        time.sleep(0.02)
    end(process)
    process.communicate()
    return process.returncode


def test_a_killed_and_a_stopped_run_leave_no_lock_and_are_continued(desk: Desk) -> None:
    """Prompts of five scripts, printed where there is only one."""
    assert ended_after(desk, 1, lambda process: process.kill(), *GENERATE, "out") != 0
    assert ended_after(desk, 4, lambda process: process.send_signal(STOP), *GENERATE, "out") == 1
    said = desk.run([*GENERATE, "out", "--html", "--manifest", "parquet"], [*GENERATE, "whole"])
    assert "15 pictures in out" in said
    assert [line["sha256"] for line in desk.manifest("out")] == [line["sha256"] for line in desk.manifest("whole")]
    assert {line["prompt"] for line in desk.manifest("out")} == set(PROMPTS)


@pytest.mark.slow
def test_tars_upscaling_reports_and_info(desk: Desk) -> None:
    said = desk.run(
        [*GENERATE, "tars", "--format", "webdataset", "--tar-size", 2],
        [*GENERATE, "tars", "--format", "webdataset", "--tar-size", 2],
        ["generate", "--model", "tiny model", "--out", "a 😀", "--log-json", "a 😀, ‘quoted’"],
        ["upscale", "a 😀/000000-a-quoted.png", "--model", "tiny model", "--out", "два"],
        ["evaluate", "tiny model", "--suite", "scenes", "--limit", 2, "--steps", 1, "--out", "report"],
        ["info", "tiny model"],
    )
    assert "15 pictures in tars, 15 of them from an earlier run" in said
    events = [json.loads(line) for line in said.splitlines() if line.startswith("{")]
    assert events[-1]["out"] == "a 😀"
    assert (desk.folder / "два" / "000000-a-quoted.png").exists()
    assert (desk.folder / "report" / "report.md").exists()


@pytest.mark.slow
def test_a_run_of_training_reads_in_other_processes_and_is_resumed(desk: Desk) -> None:
    folder = write_pictures(desk.folder / "photos", {"ein Würfel": picture(0), "два круга": picture(90)})
    settings = micro_settings(Path("runs/one")) | {
        "data": {"workers": 2, "sources": [{"kind": "folder", "path": folder.name}]}
    }
    settings["stage"]["model"]["text_dim"] = 32
    settings["text"] = {"encoder": "tiny model/text_encoder"}
    (desk.folder / "run.yaml").write_text(json.dumps(settings, ensure_ascii=False), encoding="utf-8")
    changes = (
        "training.save_every=1",
        "training.keep_checkpoints=1",
        "training.sample_every=1",
        "training.sample_prompts=[два круга]",
    )
    desk.run(
        ["encode", "run.yaml", "text.cache=captions"],
        ["train", "run.yaml", "text.cache=captions", *changes, "training.steps=2"],
        ["train", "run.yaml", "text.cache=captions", *changes, "training.steps=3", "--resume"],
    )
    lines = (desk.folder / "runs" / "one" / "log.jsonl").read_bytes().splitlines(keepends=True)
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3]
    assert not any(line.endswith(b"\r\n") for line in lines)
    assert (desk.folder / "runs" / "one" / "stage" / "model.safetensors").exists()


LAUNCHES = """
from pathlib import Path
from cascade.batch.team import RunLock
from cascade.errors import CascadeError

def begun(launch):
    lock = RunLock(Path("lock"), launch)
    try:
        lock.acquire()
    except CascadeError as error:
        lock.close()
        return str(error).partition("(")[2].partition(")")[0]
    lock.share()
    locks.append(lock)
    return lock.first

locks = []
print(begun("one"), begun("one"), begun("two"), begun(None), sep=", ")
locks.pop(0).close()
print(begun("two"))
locks.pop(0).close()
print(begun("two"), begun("one"), sep=", ")
"""


@pytest.mark.slow
def test_processes_of_one_launch_share_a_folder_and_another_launch_waits_for_the_last_of_them(desk: Desk) -> None:
    said = desk.python(LAUNCHES).splitlines()
    assert said == ["True, False, one, one", "one", "True, two"]


FILES_IN_USE = """
from pathlib import Path
from cascade.batch.manifest import Manifest
from cascade.batch.output import Output
from cascade.training.state import only_writer

def line(index):
    return {"index": index, "number": 0, "id": "a", "prompt": "", "negative_prompt": "", "seed": 0, "num_images": 1,
            "file": "a.png", "sha256": "", "settings": {"height": 8, "width": 8, "stages": {}}}

manifest = Manifest(Path("unsorted.jsonl"))
for index in (2, 0, 1):
    manifest.append(line(index))
manifest.refresh()
manifest.tidy(Path("sorted"))
manifest.append(line(3))
manifest.refresh()
print(*[entry["index"] for entry in manifest.entries()], manifest.find(1, 0)["index"])
with Output("nothing") as output:
    output.begin({"seed": 1})
with only_writer(Path("no run")):
    pass
print(Path("nothing").exists(), Path("no run").exists())
"""


def test_files_are_closed_before_they_are_replaced_or_removed(desk: Desk) -> None:
    assert desk.python(FILES_IN_USE).splitlines() == ["0 1 2 3 1", "False False"]


def used_names(path: Path) -> Iterator[str]:
    """What a module imports, and attributes of modules: `fcntl`, `os.fork`."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        match node:
            case ast.Import(names=names):
                yield from (name.name for name in names)
            case ast.ImportFrom(module=str(module), names=names):
                yield from (module, *(f"{module}.{name.name}" for name in names))
            case ast.Attribute(value=ast.Name(id=module), attr=name):
                yield f"{module}.{name}"


def test_one_folder_alone_knows_which_system_it_is_on() -> None:
    """What only Unix has, and questions which system this is, are in cascade/system, each half without the other's."""
    text = (TESTS / "emulated_windows" / "unix_only.txt").read_text(encoding="utf-8")
    unix = {kind: names.split() for kind, names in re.findall(r"^(\w+): ((?:.|\n  )*)", text, re.MULTILINE)}
    unix_only = {*unix["modules"], *(f"{kind}.{name}" for kind in ("os", "signal") for name in unix[kind])}
    unix_only |= {"signal.SIGCHLD", "signal.SIGKILL", "signal.SIGHUP", "signal.SIGUSR1", "signal.SIGALRM"}
    windows_only = {"msvcrt", "winreg", "os.O_BINARY", "os.startfile", "signal.SIGBREAK"}
    asking = {"sys.platform", "os.name", "platform.system", "ctypes.CDLL"}
    for path in Path(cascade.__file__).parent.rglob("*.py"):
        used, place = set(used_names(path)), path.parent.name
        assert place == "system" or not used & (unix_only | windows_only | asking), path
        assert place != "system" or path.stem == "posix" or not used & unix_only, path
        assert place != "system" or path.stem == "windows" or not used & windows_only, path


def test_both_halves_offer_the_same() -> None:
    halves = [Path(system.__file__).with_name(f"{half}.py") for half in ("posix", "windows")]
    offered = [
        {
            name: ast.unparse(node.args)
            for node in tree.body
            if isinstance(node, ast.FunctionDef)
            for name in [node.name]
        }
        for tree in (ast.parse(half.read_text(encoding="utf-8")) for half in halves)
    ]
    public = [{name: of for name, of in half.items() if not name.startswith("_")} for half in offered]
    assert public[0] == public[1]
    assert public[0].keys() <= set(system.__all__)


@pytest.mark.parametrize("path", ["C:\\runs\\my base", "C:/runs/base", "\\\\server\\share\\base", "D:base"])
def test_paths_of_windows_are_read_as_paths(path: str) -> None:
    assert override({}, [f"output={path}"]) == {"output": path}
    assert _adapters(f"base={path}") == {"base": path}
    assert not may_be_on_hub(path)
    assert expanded(path) == path


def test_no_two_names_that_were_written_are_one_on_another_system(desk: Desk) -> None:
    """Each of them was also checked as it was written, for what Windows takes."""
    names = [path.relative_to(desk.folder).as_posix() for path in desk.folder.rglob("*")]
    assert len(names) > 50
    assert len({alike(name) for name in names}) == len(names)
