"""Writes the tree of files into docs/architecture.md: each module with the first sentence of its docstring.

python scripts/write_tree.py
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

from cascade.files.atomic import write_text

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "architecture.md"
BEGIN, END = "<!-- tree: written by scripts/write_tree.py -->\n", "<!-- end of the tree -->\n"
FOLDERS = ("cascade", "scripts")


def sentence(path: Path) -> str:
    """The first sentence of a module's docstring, without its full stop."""
    text = " ".join((ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "").split())
    return text.partition(". ")[0].removesuffix(".")


def lines(folder: Path) -> Iterator[str]:
    """A nested list: the folder with its package's docstring, its modules, then its folders."""
    depth = "  " * (len(folder.relative_to(ROOT).parts) - 1)
    face = folder / "__init__.py"
    about = sentence(face) if face.exists() else ""
    yield f"{depth}- **{folder.name}/**" + (f" {about}" if about else "")
    for path in sorted(folder.glob("*.py")):
        if path != face:
            yield f"{depth}  - `{path.name}` {sentence(path)}"
    for inner in sorted(folder.iterdir()):
        if inner.is_dir() and any(inner.rglob("*.py")):
            yield from lines(inner)


def page() -> str:
    """docs/architecture.md with the current tree of files."""
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    _, _, after = rest.partition(END)
    tree = "\n".join(line for name in FOLDERS for line in lines(ROOT / name))
    return f"{before}{BEGIN}\n{tree}\n\n{END}{after}"


if __name__ == "__main__":
    write_text(PAGE, page())
