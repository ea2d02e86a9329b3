"""Imports point one way, and heavy packages stay out until they are needed."""

from __future__ import annotations

import ast
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import cascade

PACKAGE = Path(cascade.__file__).parent
HEAVY = {"transformers", "accelerate", "datasets"}

LEAVES = {
    "tiles",
    "conditioning",
    "settings",
    "config",
    "images",
    "checkpoint",
    "errors",
    "seeds",
    "locks",
    "scratch",
    "machine",
    "streaming",
    "transfer",
    "_version",
}
CORE = LEAVES | {"models", "diffusion"}
STAGE = CORE | {"stage"}
DRAWING = {"arguments", "drawing", "output", "sampling", "save", "slots", "upscaling"}

# Which parts of the package each part may import. A part is a module of the package, or one of its folders.
MAY_IMPORT: dict[str, set[str]] = {
    **{leaf: set() for leaf in LEAVES},
    "conditioning": {"transfer"},
    "allocator": set(),  # for programs alone
    "settings": {"errors"},
    "config": {"errors", "settings"},
    "images": {"errors", "transfer"},
    "seeds": {"errors"},
    "scratch": {"errors"},
    "streaming": {"errors"},
    "checkpoint": {"errors", "settings", "config"},  # a stage folder holds the settings that made it
    "sampling": {"errors", "settings", "config"},
    "prompts": LEAVES | {"text", "sampling"},
    "models": LEAVES,
    "diffusion": LEAVES,
    "text": LEAVES,
    "data": LEAVES,
    "stage": CORE,
    "training": STAGE | {"text", "data", "drawing", "slots"},
    "arguments": LEAVES | {"text"},
    "output": LEAVES | {"drawing"},
    "slots": STAGE | {"text"},
    "drawing": STAGE | {"text", "slots", "upscaling"},
    "save": STAGE | {"text", "slots"},
    "upscaling": STAGE | {"arguments"},
    "evaluation": STAGE | DRAWING | {"text", "data", "sampling", "pipeline"},
    "pipeline": STAGE | DRAWING | {"text", "data", "sampling"},
    "build": STAGE | {"text", "data", "pipeline", "training", "evaluation"},
    "deepfloyd": STAGE | {"build"},
    "memory": STAGE | {"build", "training"},  # which weights learn
    "preflight": STAGE | {"build", "memory"},
    "hub": {"errors"},
    "load": STAGE
    | {
        "hub",
        "memory",
        "text",
        "data",
        "sampling",
        "pipeline",
        "training",
        "evaluation",
        "build",
        "deepfloyd",
        "preflight",
        "slots",
    },
    "batch": STAGE | DRAWING | {"text", "data", "sampling", "prompts", "pipeline", "evaluation", "build", "load"},
    "convert": STAGE | {"text", "pipeline", "build", "load", "deepfloyd", "hub"},
    "integrations": STAGE | DRAWING | {"prompts", "pipeline", "batch"},
    "server": STAGE | DRAWING | {"text", "prompts", "pipeline", "batch", "load"},
    "__init__": STAGE | {"text", "output", "pipeline", "load"},  # the public names
}
# What stands at the top may import everything.
TOP = {"cli", "__main__"}
# The one late import against the direction: CascadePipeline.from_pretrained.
EXCEPTED = {("pipeline", "load")}


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
    names = [name for node in ast.walk(ast.parse(path.read_text())) for name in imported_names(node)]
    return {name.split(".")[1] for name in names if name.startswith("cascade.")} - {part_of(path)}


@pytest.mark.parametrize("path", modules(), ids=dotted)
def test_imports_point_one_way(path: Path) -> None:
    part = part_of(path)
    if part in TOP:
        return
    assert part in MAY_IMPORT, f"{part} is new: say in this table what it may import"
    forbidden = {other for other in imported_parts(path) - MAY_IMPORT[part] if (part, other) not in EXCEPTED}
    assert not forbidden, f"{dotted(path)} must not import {', '.join(sorted(forbidden))}"


def test_the_table_itself_has_no_circle() -> None:
    """Parts that import none but parts already placed are placed, until all are."""
    placed: set[str] = set(LEAVES)
    rest = {part: others - {part} for part, others in MAY_IMPORT.items() if part not in LEAVES}
    while ready := {part for part, others in rest.items() if others <= placed}:
        placed |= ready
        rest = {part: others for part, others in rest.items() if part not in ready}
    assert not rest


def test_networks_know_no_schedules_and_samplers_no_text() -> None:
    for path in modules():
        source = path.read_text()
        if part_of(path) == "models":
            assert "schedule" not in "".join(imported_parts(path)), path
        if path.name in ("samplers.py", "noise.py", "loss.py", "schedules.py", "parameterization.py"):
            assert "import Conditioning" not in source, path


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


BRING_ACCELERATE = {f"cascade.training.{name}" for name in ("trainer", "accelerator", "guards")}


def test_importing_any_module_but_the_trainer_loads_nothing_heavy() -> None:
    names = [dotted(path) for path in modules() if dotted(path) not in BRING_ACCELERATE | {"cascade.__main__"}]
    assert loaded_by(", ".join(names)) == set()


def test_the_trainer_brings_accelerate_only() -> None:
    """accelerate may load what it finds; that ours loads no transformers or datasets is in the imports themselves."""
    imported = {
        name.partition(".")[0]
        for file in ("trainer", "accelerator", "guards")
        for node in ast.parse((PACKAGE / "training" / f"{file}.py").read_text()).body
        for name in imported_names(node)
    }
    assert imported & HEAVY == {"accelerate"}


def test_importing_cascade_asks_no_network() -> None:
    """Any connection or look-up of a name would end the process."""
    code = (
        "import sys\n"
        "def refuse(event, _arguments):\n"
        "    if event in ('socket.connect', 'socket.getaddrinfo', 'socket.gethostbyname'): sys.exit(event)\n"
        "sys.addaudithook(refuse)\n"
        "import cascade, cascade.cli, cascade.load\n"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False).returncode == 0


def test_the_public_names_are_complete_and_typed() -> None:
    """Every name that the package imports for its users is in `__all__`; their parameters and results have types."""
    tree = ast.parse((PACKAGE / "__init__.py").read_text())
    imported = {name.name for node in tree.body if isinstance(node, ast.ImportFrom) for name in node.names}
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
