"""Imports point one way, and heavy packages stay out until they are needed."""

from __future__ import annotations

import ast
import inspect
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import cascade

PACKAGE = Path(cascade.__file__).parent
HEAVY = {"transformers", "accelerate", "datasets"}

LAYERS = (
    "errors _version seeds system files settings pictures",
    "conditioning conditions config diffusion models text data stage",
    "resources drawing pipeline prompts training evaluation storage making",
    "batch integrations server cli __init__ __main__",
)
"""Tools, the method, systems made of it, programs. A part is a module of the package or one of its folders; it imports
parts of its own layer and of those before it, and no circle of parts is closed."""
LAYER = {part: number for number, parts in enumerate(LAYERS) for part in parts.split()}
# The late imports against the direction: CascadePipeline's from_pretrained, save_pretrained and push_to_hub.
EXCEPTED = {("pipeline", "storage")}


def modules() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def dotted(path: Path) -> str:
    parts = ("cascade", *path.relative_to(PACKAGE).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def part_of(path: Path) -> str:
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def imported_names(node: ast.AST) -> list[str]:
    match node:
        case ast.Import(names=names):
            return [name.name for name in names]
        case ast.ImportFrom(module=module, names=names, level=0):
            return [f"{module}.{name.name}" for name in names]
        case ast.ImportFrom():
            raise AssertionError("relative import; the package writes its imports in full")
    return []


def imported_parts(path: Path) -> set[str]:
    """The parts of the package that a file imports anywhere, in functions too."""
    names = [name for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) for name in imported_names(node)]
    return {name.split(".")[1] for name in names if name.startswith("cascade.")} - {part_of(path)}


def test_imports_point_down_and_close_no_circle() -> None:
    edges = {(part_of(path), other) for path in modules() for other in imported_parts(path)} - EXCEPTED
    unplaced = {part for edge in edges for part in edge} - LAYER.keys()
    assert not unplaced, "new: name them in a layer"
    assert not {(part, other) for part, other in edges if LAYER[part] < LAYER[other]}, "these point up"
    rest, placed = set(LAYER), set[str]()
    while ready := {part for part in rest if all(other in placed for one, other in edges if one == part)}:
        placed |= ready
        rest -= ready
    assert not rest, "a circle, and what stands on it"


READS_STEP_NUMBERS = "if_unet"  # DeepFloyd IF's network, which was trained on the numbers of one schedule's steps


def test_networks_know_no_schedules_and_samplers_no_text() -> None:
    for path in modules():
        source = path.read_text(encoding="utf-8")
        if part_of(path) == "models":
            assert ("diffusion" in imported_parts(path)) == (path.stem == READS_STEP_NUMBERS), path
        if part_of(path) == "diffusion":
            assert "import Conditioning" not in source, path


MATHEMATICS_MAY_USE = {"torch", *sys.stdlib_module_names}


def test_the_mathematics_imports_torch_alone() -> None:
    """Neither a formula nor a module of ours that it leans on needs anything else: no settings, text or files."""
    seen: set[str] = set()
    waiting = {dotted(path) for path in (PACKAGE / "diffusion").glob("*.py")}
    files = {dotted(path): path for path in modules()}
    while waiting:
        module = waiting.pop()
        seen.add(module)
        names = [name for node in ast.walk(ast.parse(files[module].read_text())) for name in imported_names(node)]
        outside = {name.partition(".")[0] for name in names} - {"cascade"}
        assert outside <= MATHEMATICS_MAY_USE, f"{module} imports {', '.join(sorted(outside - MATHEMATICS_MAY_USE))}"
        ours = {name if name in files else name.rpartition(".")[0] for name in names if name.startswith("cascade.")}
        waiting |= ours - seen
    assert {module for module in seen if not module.startswith("cascade.diffusion")} == {"cascade.system.transfer"}


IMPORT = re.compile(r"^ *(?:from (cascade[\w.]*) import (.+)|import (cascade[\w.]*).*)$", re.MULTILINE)


def test_the_documentation_imports_public_names_alone() -> None:
    root = PACKAGE.parent
    found = 0
    for page in (root / "README.md", *(root / "docs").glob("*.md")):
        for module, names, plain in IMPORT.findall(page.read_text(encoding="utf-8")):
            found += 1
            public = module == "cascade" and set(names.split(", ")) <= set(cascade.__all__)
            known = public or plain == "cascade" or module.startswith(("cascade.diffusion.", "cascade.integrations."))
            assert known, f"{page.name}: {module}{plain}"
    assert found >= 5


LOADED = """
import sys
import {module}
print(*sorted({{name.partition('.')[0] for name in sys.modules}} & {heavy}))
"""


def loaded_by(statement: str) -> set[str]:
    """The heavy packages that are loaded after importing `statement`, comma-separated modules, in a new process."""
    code = LOADED.format(module=statement, heavy=HEAVY)
    return set(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split())


def test_importing_cascade_loads_nothing_heavy() -> None:
    assert loaded_by("cascade") == set()


OTHER_SYSTEM = f"cascade.system.{'posix' if sys.platform == 'win32' else 'windows'}"
BRING_ACCELERATE = {f"cascade.training.{name}" for name in ("trainer", "accelerator", "actions")}


def test_importing_any_module_but_the_trainer_loads_nothing_heavy() -> None:
    names = [
        dotted(path) for path in modules() if dotted(path) not in {*BRING_ACCELERATE, "cascade.__main__", OTHER_SYSTEM}
    ]
    assert loaded_by(", ".join(names)) == set()


def test_the_trainer_brings_accelerate_only() -> None:
    """accelerate may load what it finds; that ours loads no transformers or datasets is in the imports themselves."""
    imported = {
        name.partition(".")[0]
        for file in ("trainer", "accelerator", "actions")
        for node in ast.parse((PACKAGE / "training" / f"{file}.py").read_text(encoding="utf-8")).body
        for name in imported_names(node)
    }
    assert imported & HEAVY == {"accelerate"}


@pytest.mark.parametrize(
    "arguments", [["--version"], ["--help"], ["generate", "--help"], ["train", "--help"], ["nothing"]]
)
def test_help_and_version_need_no_torch(arguments: list[str]) -> None:
    code = (
        "import sys\n"
        "from cascade.cli.program import main\n"
        f"main({arguments!r})\n"
        "print(*{'torch', 'numpy', 'PIL', 'transformers'} & sys.modules.keys(), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr.splitlines()[-1] == ""


def test_the_public_names_are_there_although_they_are_imported_late() -> None:
    code = (
        "import cascade; print(cascade.Stage.__module__, 'Stage' in dir(cascade)); from cascade import *; CascadeError"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "cascade.stage True\n"
    with pytest.raises(AttributeError, match="module 'cascade' has no attribute 'Sage'"):
        _ = cascade.Sage


@pytest.mark.parametrize("package", ["torch", "click"])
def test_ctrl_c_while_something_loads_is_one_line(package: str, tmp_path: Path) -> None:
    """`click` is asked for before there is a program that could be told to stop, `torch` within a command."""
    (tmp_path / f"{package}.py").write_text(
        "import os, signal, time\nos.kill(os.getpid(), signal.SIGINT)\ntime.sleep(9)\n"
    )
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{PACKAGE.parent}"}
    command = [sys.executable, "-m", "cascade", "info"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr.strip()) == (1, "", "cascade: stopped")


def test_importing_cascade_asks_no_network() -> None:
    """Any connection or look-up of a name would end the process."""
    code = (
        "import sys\n"
        "def refuse(event, _arguments):\n"
        "    if event in ('socket.connect', 'socket.getaddrinfo', 'socket.gethostbyname'): sys.exit(event)\n"
        "sys.addaudithook(refuse)\n"
        "import cascade, cascade.cli.program, cascade.storage.pipeline, cascade.storage.training\n"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False).returncode == 0


def test_the_public_names_are_complete_and_typed() -> None:
    """Every name that the package imports for its users is in `__all__`; their parameters and results have types."""
    tree = ast.parse((PACKAGE / "__init__.py").read_text(encoding="utf-8"))
    ours = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and "cascade" in str(node.module)]
    imported = {name.name for node in ours for name in node.names}
    assert set(cascade.__all__) == imported
    assert cascade.__all__ == sorted(cascade.__all__)
    for name in cascade.__all__:
        value = getattr(cascade, name)
        assert name == "__version__" or value.__doc__, name
        members = vars(value).items() if inspect.isclass(value) else [(name, value)]
        for member, plain in members:
            function = getattr(plain, "__func__", plain)  # of a class method
            ours = inspect.isfunction(function) and function.__module__.startswith("cascade")
            if ours and not member.startswith("_"):
                parameters = set(inspect.signature(function).parameters) - {"self", "cls"}
                assert parameters | {"return"} <= set(function.__annotations__), f"{name}.{member}"
