"""Writes docs/configuration.md from the types in cascade/config/, so that the reference stays current.

python scripts/write_config_reference.py [--check]
"""

from __future__ import annotations

import inspect
import json
import sys
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import click
from pydantic import AfterValidator
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from cascade.config.training import TrainConfig
from cascade.settings import AtMost, Settings

OUTPUT = Path(__file__).parent.parent / "docs" / "configuration.md"
HEAD = """# Configuration reference

<!-- written by scripts/write_config_reference.py; do not edit -->

A training run is one YAML file. Settings left out have the defaults below; unknown names are errors.
On the command line, `section.name=value` changes a setting: `cascade train base.yaml training.steps=100`.
"""


def reference() -> str:
    """The whole page."""
    first: dict[type[Settings], str] = {}
    for path, kind in sections(TrainConfig, ""):
        first.setdefault(kind, path)
    return HEAD + "".join(section(kind, path) for kind, path in first.items())


def sections(kind: type[Settings], path: str) -> Iterator[tuple[str, type[Settings]]]:
    """(dotted path, section) for the file and everything below it, in the order of the file."""
    yield path, kind
    for name, field in kind.model_fields.items():
        for below in settings_in(field.annotation):
            inner = f"{path}.{name}" if path else name
            yield from sections(below, inner)


def section(kind: type[Settings], path: str) -> str:
    """Heading, description and table of one section."""
    choice = kind.model_fields.get("kind")
    title = f"{path}: {{kind: {choice.default}}}" if choice and path else path or "The file"
    lines = [f"\n## {title}\n", inspect.cleandoc(kind.__doc__ or "")]  # from Python 3.13 on it already is
    rows = []
    for name, field in kind.model_fields.items():
        if name != "kind" or not path.count(".") or len(get_args(field.annotation)) > 1:
            rows.append(
                f"| `{name}` | {describe(field)} | {default(field)} | {' '.join((field.description or '').split())} |"
            )
    if rows:
        lines += ["", "| setting | type | default | meaning |", "| --- | --- | --- | --- |", *rows]
    return "\n".join(lines) + "\n"


def describe(field: FieldInfo) -> str:
    """A field's type in the terms of YAML, with its bounds."""
    bounds = [text for text in (bound(item) for item in field.metadata) if text]
    return " ".join([type_name(field.annotation), *bounds]).replace("|", "\\|")


def type_name(annotation: Any) -> str:
    """`number`, `list of integer`, a choice of words, ..."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        bounds = [text for text in (bound(item) for item in arguments[1:]) if text]
        return " ".join([type_name(arguments[0]), *bounds])
    if origin is Literal:
        return " | ".join(f"`{argument}`" for argument in arguments)
    if origin in (Union, types.UnionType):
        return " or ".join(dict.fromkeys(type_name(argument) for argument in arguments))
    if origin is tuple:
        return (
            f"list of {type_name(arguments[0])}"
            if arguments[-1] is ...
            else f"{len(arguments)} x {type_name(arguments[0])}"
        )
    if origin is dict:
        return f"mapping from {type_name(arguments[0])} to {type_name(arguments[1])}"
    if isinstance(annotation, type) and issubclass(annotation, Settings):
        kind = annotation.model_fields.get("kind")
        return f"`{{kind: {kind.default}}}`" if kind and len(get_args(kind.annotation)) == 1 else "section"
    names = {int: "integer", float: "number", str: "text", bool: "true or false", type(None): "null"}
    return names.get(annotation, str(annotation))


def bound(item: Any) -> str:
    """`> 0`, `<= 1`, or nothing."""
    if isinstance(item, AfterValidator):
        return f"<= {item.func.greatest:,}" if isinstance(item.func, AtMost) else ""
    if isinstance(item, FieldInfo):
        return ", ".join(text for text in (bound(inner) for inner in item.metadata) if text)
    for name, sign in (("gt", ">"), ("ge", ">="), ("lt", "<"), ("le", "<=")):
        if hasattr(item, name) and getattr(item, name) is not None:
            return f"{sign} {getattr(item, name):g}"
    return ""


def default(field: FieldInfo) -> str:
    """The default as YAML, `required`, or a hint that a section follows."""
    if field.default_factory is not None:
        return "`{}`"
    if field.default is PydanticUndefined:
        return "required"
    if isinstance(field.default, Settings):
        kind = getattr(field.default, "kind", None)
        return f"`{kind}`" if kind else "see below"
    plain = list(field.default) if isinstance(field.default, tuple) else field.default
    return f"`{json.dumps(plain, ensure_ascii=False)}`" if not isinstance(plain, str) else f"`{plain}`"


def settings_in(annotation: Any) -> list[type[Settings]]:
    """The sections in an annotation."""
    if isinstance(annotation, type) and issubclass(annotation, Settings):
        return [annotation]
    return [found for argument in typing.get_args(annotation) for found in settings_in(argument)]


@click.command()
@click.option("--check", is_flag=True, help="Only check whether the page is up to date.")
def main(check: bool) -> None:
    """Write the page, or check it."""
    if check:
        fresh = OUTPUT.read_text(encoding="utf-8") == reference()
        sys.exit(0 if fresh else f"{OUTPUT.name} is out of date; run scripts/write_config_reference.py")
    OUTPUT.write_text(reference(), encoding="utf-8")


if __name__ == "__main__":
    main()
