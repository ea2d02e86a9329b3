"""The code stays readable: no import cycles, few long functions, few files in a guided step."""

from __future__ import annotations

import ast
import inspect
import sys
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

import pytest
import torch
from helpers_model import make_tiny_cascade

import cascade
from cascade import CascadePipeline

PACKAGE = Path(cascade.__file__).parent
MODULES = sorted(PACKAGE.rglob("*.py"))
MOST_PARAMETERS, MANY_PARAMETERS = 6, 5
LONGEST_FUNCTION = 55
LONGEST_MODULE, MOST_MODULES = 450, 160
TINY, MOST_TINY = 80, 8
Function = ast.FunctionDef | ast.AsyncFunctionDef


def functions() -> Iterator[tuple[str, Function]]:
    """(place, definition) of every function of the package."""
    for path in MODULES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, Function):
                yield f"{path.relative_to(PACKAGE)}:{node.lineno} {node.name}", node


def parameters(function: Function) -> int:
    """Without self and cls; `*args` and `**kwargs` count one each."""
    named = [*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs]
    more = [one for one in (function.args.vararg, function.args.kwarg) if one is not None]
    return len([one for one in named if one.arg not in ("self", "cls")]) + len(more)


def is_command(function: Function) -> bool:
    """A click command, whose parameters are the options that a person sees."""
    return any("click" in ast.unparse(decorator) for decorator in function.decorator_list)


def test_few_functions_have_more_than_six_parameters() -> None:
    many = [place for place, node in functions() if parameters(node) > MOST_PARAMETERS and not is_command(node)]
    assert len(many) <= MANY_PARAMETERS, many


def test_no_function_is_longer_than_a_screen() -> None:
    def lines(node: Function) -> int:
        body = node.body[1:] if ast.get_docstring(node) else node.body
        return (node.end_lineno or 0) - body[0].lineno + 1 if body else 0

    long = {place: lines(node) for place, node in functions() if lines(node) > LONGEST_FUNCTION}
    assert not long


def test_modules_are_neither_many_nor_tiny_nor_long() -> None:
    """Packages, which hold a docstring or the public names, are not counted."""
    lines = {
        path.relative_to(PACKAGE): len(path.read_text(encoding="utf-8").splitlines())
        for path in MODULES
        if path.name != "__init__.py"
    }
    assert len(lines) <= MOST_MODULES
    assert {path: count for path, count in lines.items() if count > LONGEST_MODULE} == {}
    tiny = [path for path, count in lines.items() if count < TINY]
    assert len(tiny) <= MOST_TINY, tiny


def public(tree: ast.Module) -> Iterator[Function | ast.ClassDef]:
    """The functions and classes of a module, and the methods of these, that do not begin with an underscore."""
    for node in tree.body:
        if isinstance(node, Function | ast.ClassDef) and not node.name.startswith("_"):
            yield node
            inner = node.body if isinstance(node, ast.ClassDef) else []
            yield from (one for one in inner if isinstance(one, Function) and not one.name.startswith("_"))


def test_every_public_function_and_class_is_documented() -> None:
    """A method of a protocol or base class is documented there, in the same folder, and not in each that has it."""
    bare, said = [], set[tuple[Path, str]]()
    for path in MODULES:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        assert ast.get_docstring(tree) or not tree.body, path
        for node in public(tree):
            if ast.get_docstring(node):
                said.add((path.parent, node.name))
            else:
                bare.append((path.parent, node.name))
    foreign = {"convert", "connection_made", "connection_lost", "on_response_complete", "startup", "handle_exit"}
    assert [
        f"{folder.name} {name}" for folder, name in bare if (folder, name) not in said and name not in foreign
    ] == []


# --- circles ---------------------------------------------------------------------------------------------------------


def imports_of(path: Path) -> set[str]:
    """The modules that loading a file loads, packages around them included; not what functions import later."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    pending, found = list(tree.body), set[str]()
    while pending:
        node = pending.pop()
        if isinstance(node, Function) or (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)):
            continue
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{name.name}" for name in node.names)}
        pending += ast.iter_child_nodes(node)
    return found


def graph() -> dict[str, set[str]]:
    """Which module loads which; a module loads the packages around what it names, but not those around itself."""
    names = {dotted(path): path for path in MODULES}
    edges = {}
    for name, path in names.items():
        wanted = {
            ".".join(one.split(".")[: depth + 1]) for one in imports_of(path) for depth in range(one.count(".") + 1)
        }
        around = {".".join(name.split(".")[: depth + 1]) for depth in range(name.count("."))}
        edges[name] = {one for one in wanted if one in names} - {name} - around - {"cascade"}
    return edges


def dotted(path: Path) -> str:
    parts = ("cascade", *path.relative_to(PACKAGE).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def test_no_module_is_in_a_circle_of_imports_packages_counted() -> None:
    edges = graph()
    placed: set[str] = set()
    while ready := {name for name, others in edges.items() if name not in placed and others <= placed}:
        placed |= ready
    assert not sorted(set(edges) - placed)


# --- one step --------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(sys.gettrace() is not None, reason="a debugger or coverage sees the same calls")
def test_a_guided_step_of_a_base_stage_enters_few_files_and_functions(tmp_path: Path) -> None:
    """Between two reports of the sampler. For comparison: edm2 3 and 14, flux 4 and 15, diffusers' IF 12 and 37."""
    pipeline = CascadePipeline.from_pretrained(make_tiny_cascade(tmp_path / "tiny"), device="cpu")
    entered: set[tuple[str, str]] = set()

    def watch(frame: FrameType, event: str, _argument: object) -> None:
        file = Path(frame.f_code.co_filename)
        if event == "call" and PACKAGE in file.parents:
            entered.add((file.name, frame.f_code.co_qualname))

    def report(_stage: str, step: int, _steps: int, _x_hat: torch.Tensor) -> None:
        sys.setprofile(watch if step == 0 else None)

    pipeline("a fox", seed=0, until=8, guidance=2.0, steps=2, callback=report)
    mine = {one for one in entered if not one[1].startswith(("Watcher", "Engine"))}
    assert len({file for file, _ in mine}) <= 8, sorted(mine)
    assert len(mine) <= 25, sorted(mine)


def test_every_name_that_a_person_uses_is_documented() -> None:
    for name in cascade.__all__:
        assert name == "__version__" or inspect.getdoc(getattr(cascade, name)), name
