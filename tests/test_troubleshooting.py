"""docs/troubleshooting.md and the errors of the package keep step: every module that raises one has a section."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

import cascade

PACKAGE = Path(cascade.__file__).parent
PAGE = PACKAGE.parent / "docs" / "troubleshooting.md"
ERRORS = {"CascadeError", "StorageError", "ShortageError", "DownloadError"}


def sections() -> dict[str, tuple[list[str], list[str]]]:
    """By heading: the modules of the section, and the messages that it explains."""
    found = {}
    for part in PAGE.read_text(encoding="utf-8").split("\n## ")[1:]:
        modules = re.search(r"<!-- modules: (.*) -->", part)
        assert modules, part.partition("\n")[0]
        found[part.partition("\n")[0]] = modules[1].split(), re.findall(r"^\| `([^`]+)` \|", part, re.MULTILINE)
    return found


def raises(path: Path) -> bool:
    """Whether a module raises an error of the package, or returns one to be raised."""
    calls = (node.func for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.Call))
    return any(isinstance(function, ast.Name) and function.id in ERRORS for function in calls)


def texts(module: str) -> str:
    """The texts in a module, each message in one piece with `…` for its values."""
    pieces = []
    for node in ast.walk(ast.parse((PACKAGE / f"{module}.py").read_text(encoding="utf-8"))):
        if isinstance(node, ast.JoinedStr):
            pieces.append("".join(str(part.value) if isinstance(part, ast.Constant) else "…" for part in node.values))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            pieces.append(node.value)
    return "\n".join(pieces)


def test_every_module_that_raises_is_in_a_section_and_no_other_is() -> None:
    listed = [module for modules, _ in sections().values() for module in modules]
    raising = {path.relative_to(PACKAGE).with_suffix("").as_posix() for path in PACKAGE.rglob("*.py") if raises(path)}
    assert set(listed) == raising


@pytest.mark.parametrize("heading", sections())
def test_every_explained_message_is_one_of_the_section_s_modules(heading: str) -> None:
    modules, messages = sections()[heading]
    said = "\n".join(map(texts, modules))
    assert messages
    assert [message for message in messages if message not in said] == []
