"""Strict settings: YAML in, YAML out, one readable line for each mistake; and the upper bounds of numbers."""

from __future__ import annotations

import copy
import difflib
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Annotated, Any, TypeVar

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from cascade.errors import CascadeError, named, quoted
from cascade.files.text import NotTextError, read_text


class Settings(BaseModel):
    """Base class of all sections: unknown names are errors, values are immutable, docstrings become the reference."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


class Noted(Settings):
    """Base of what is read of a file that cascade wrote and anybody may have changed; it may hold more."""

    model_config = ConfigDict(extra="allow")


class _Loader(yaml.SafeLoader):
    """YAML 1.1 as PyYAML reads it, except that `1e-4` is a number and `2024-01-01` is text, as everybody expects."""

    _depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        """The next node. Raises RecursionError at once for brackets nested too deep: each token costs their depth."""
        if self._depth > _DEEPEST:
            raise RecursionError
        self._depth += 1
        node: yaml.Node | None = super().compose_node(parent, index)
        self._depth -= 1
        return node


_Loader.yaml_implicit_resolvers = {
    first: [resolver for resolver in resolvers if resolver[0] != "tag:yaml.org,2002:timestamp"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$"), list("-+0123456789.")
)


class _RepeatedKeyError(yaml.YAMLError):
    """A key that occurs twice in one mapping; YAML would silently drop the first."""


def _mapping(loader: _Loader, node: yaml.MappingNode) -> Iterator[dict[Any, Any]]:
    """A mapping as PyYAML constructs it, unless a key is repeated; keys merged in by `<<` may be."""
    seen: set[str] = set()
    for key, _ in node.value:
        if isinstance(key, yaml.ScalarNode):
            if key.value in seen:
                raise _RepeatedKeyError(f"line {key.start_mark.line + 1}: {key.value} is set a second time; keep one")
            seen.add(key.value)
    yield from loader.construct_yaml_map(node)


_Loader.add_constructor("tag:yaml.org,2002:map", _mapping)

ConfigT = TypeVar("ConfigT", bound=Settings)
_LARGEST_YAML = 1 << 20
"""Letters; the longest settings have some ten thousand."""
_MOST_VALUES = 100_000
"""Values of a file, what stands at an alias counted each time: a hundred letters of aliases can stand for billions."""
_DEEPEST = 100
_MOST_MISTAKES = 20
"""Lines of an error; a list of a thousand wrong values would scroll its beginning away."""
_NOT_YAML = (yaml.YAMLError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError)
"""What PyYAML raises for tags on values that are none of theirs: `!!bool maybe`, `!!timestamp never`."""


def parse_yaml(text: str) -> Any:
    """The value of a YAML text. Raises ValueError with the reason, also for what would take all memory."""
    if len(text) > _LARGEST_YAML:
        raise ValueError(f"has more than {_LARGEST_YAML >> 20} MB")
    try:
        loader = _Loader(text)
    except yaml.YAMLError as error:  # a control character
        raise ValueError(" ".join(str(error).split())) from None
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        _count_values(node, 0, {})
        return loader.construct_document(node)
    except RecursionError:
        raise ValueError("brackets are nested too deep") from None
    except _NOT_YAML as error:
        raise ValueError(" ".join(str(error).split()) or type(error).__name__) from None
    finally:
        loader.dispose()


def _count_values(node: yaml.Node, depth: int, counted: dict[yaml.Node, int]) -> int:
    """How many values a node stands for, itself among them. Raises ValueError for too many, too deep, or a circle."""
    if isinstance(node, yaml.ScalarNode):
        if "\0" in node.value:
            raise ValueError(f"line {node.start_mark.line + 1}: holds a zero byte")
        return 1
    if node in counted and not counted[node]:
        raise ValueError(f"line {node.start_mark.line + 1}: holds itself")
    if depth > _DEEPEST:
        raise ValueError("brackets are nested too deep")
    if node not in counted:
        counted[node] = 0  # under way
        inner = chain.from_iterable(node.value) if isinstance(node, yaml.MappingNode) else node.value
        counted[node] = 1 + sum(_count_values(part, depth + 1, counted) for part in inner)
    if counted[node] > _MOST_VALUES:
        raise ValueError(f"has more than {_MOST_VALUES:,} values")
    return counted[node]


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The mapping in a YAML file. Raises CascadeError for a missing file, invalid YAML, or anything but a mapping."""
    path = Path(path)
    try:
        data = parse_yaml(read_text(path))
    except FileNotFoundError:
        raise CascadeError(f"{path}: no such file") from None
    except OSError as error:
        raise CascadeError(f"{path}: cannot be read: {error.strerror or error}; give a YAML file") from None
    except NotTextError as error:
        raise CascadeError(f"{path}: {error}") from None
    except ValueError as error:
        raise CascadeError(f"{path}: not valid YAML: {error}") from None
    if not isinstance(data, dict):
        found = "nothing" if data is None else type(data).__name__
        raise CascadeError(f"{path}: expected settings as `name: value`, found {found}")
    return data


def override(data: dict[str, Any], assignments: Sequence[str]) -> dict[str, Any]:
    """Apply `section.name=value` assignments, the value read as YAML, to a copy of `data`."""
    data = copy.deepcopy(data)
    for assignment in assignments:
        name, separator, text = assignment.partition("=")
        if not separator or not name:
            raise CascadeError(f"{quoted(assignment)}: expected key=value, such as training.steps=100")
        try:
            value = parse_yaml(text)
        except ValueError:
            raise CascadeError(f"{quoted(assignment)}: {quoted(text)} is not a YAML value") from None
        _assign(data, name.split("."), value, assignment)
    return data


def _assign(data: Any, keys: list[str], value: Any, assignment: str) -> None:
    for depth, key in enumerate(keys):
        position: Any = key
        if isinstance(data, list):
            if not key.isdecimal() or int(key) >= len(data):
                raise CascadeError(
                    f"{quoted(assignment)}: {named(keys[:depth])} is a list of {len(data)};"
                    f" {quoted(key)} is not a position in it"
                )
            position = int(key)
        elif not isinstance(data, dict):
            raise CascadeError(f"{quoted(assignment)}: {named(keys[:depth])} is a value, not a section")
        if depth == len(keys) - 1:
            data[position] = value
        else:
            data = data[position] if isinstance(data, list) else data.setdefault(key, {})


def parse(kind: type[ConfigT], data: Any, origin: str) -> ConfigT:
    """Settings of `kind` from plain data. Raises CascadeError with one line per mistake, named by `origin`."""
    if not isinstance(data, dict):
        raise CascadeError(f"{origin}: expected settings as `name: value`, found {type(data).__name__}")
    try:
        # Strict JSON rules: lists become tuples, but "3" is not a number and 1 is not a boolean.
        return kind.model_validate_json(json.dumps(data), strict=True)
    except ValidationError as error:
        mistakes: dict[str, list[Any]] = {}
        for mistake in error.errors():
            if mistake["type"] != "too_short" or not mistake["input"]:  # pydantic ignores items that have a mistake
                mistakes.setdefault(".".join(_walk(kind, mistake["loc"])[1]), []).append(mistake)
        lines = [f"{origin}: {_explain(kind, same_setting)}" for same_setting in mistakes.values()]
        more = [f"{origin}: and {len(lines) - _MOST_MISTAKES} more mistakes"] if len(lines) > _MOST_MISTAKES else []
        raise CascadeError("\n".join((*lines[:_MOST_MISTAKES], *more))) from None
    except (TypeError, ValueError, RecursionError) as error:  # valid YAML that JSON cannot hold: a set, bytes, a cycle
        reason = "a number has thousands of digits" if "integer string conversion" in str(error) else error
        raise CascadeError(f"{origin}: {reason}") from None


def to_yaml(settings: Settings) -> str:
    """All settings, defaults included, as YAML that `parse` reads back to an equal object."""
    return yaml.safe_dump(settings.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=110)


_PLAIN_WORDS = {"an object": "a section", "a valid array": "a list", "String should match": "text of the"}


def _explain(kind: type[Settings], mistakes: Sequence[Any]) -> str:
    """One line for pydantic's errors about one setting: several if its value may be of several types."""
    first = mistakes[0]
    section, path = _walk(kind, first["loc"])
    dotted = named(path)
    match first["type"]:
        case "extra_forbidden":
            return _unknown(section, path)
        case "missing":
            return f"{dotted} is missing"
        case "too_short":
            return f"{dotted} is empty; give at least one"
        case "value_error":
            message = first["msg"].removeprefix("Value error, ")
            return f"{dotted}: {message}" if dotted else message
        case "union_tag_not_found":
            return f"{dotted}.kind is missing"
        case "union_tag_invalid":
            name = f"{dotted}.kind" if isinstance(first["input"], dict) else dotted  # or the section's name alone
            return _not_one_of(name, first["ctx"]["tag"], first["ctx"]["expected_tags"])
        case "literal_error" if len(mistakes) == 1 and isinstance(first["input"], str):
            return _not_one_of(dotted, first["input"], first["ctx"]["expected"])
    wanted = " or ".join(mistake["msg"].removeprefix("Input should be ") for mistake in mistakes)
    for theirs, ours in _PLAIN_WORDS.items():
        wanted = wanted.replace(theirs, ours)
    return f"{dotted}: should be {wanted}, not {json.dumps(first['input'], default=str)[:80]}"


def _unknown(section: type[Settings] | None, path: Sequence[str]) -> str:
    parent = named(path[:-1])
    known = list(section.model_fields) if section else []
    close = difflib.get_close_matches(path[-1], known, n=1)
    if close:
        return f"{named(path)} is not a setting; did you mean {named([*path[:-1], close[0]])}?"
    return f"{named(path)} is not a setting; {parent or 'the file'} has {', '.join(known)}"


def _not_one_of(setting: str, value: str, expected: str) -> str:
    names = re.findall(r"'(.+?)'", expected)
    close = difflib.get_close_matches(value, names, n=1)
    guess = f"; did you mean {close[0]}?" if close else ""
    return f"{setting}: {quoted(value)} is not one of {', '.join(names)}{guess}"


def _walk(kind: type[Settings], location: Sequence[str | int]) -> tuple[type[Settings] | None, list[str]]:
    """The section that contains the end of pydantic's `location`, and the path without pydantic's own additions."""
    sections: list[type[Settings]] = [kind]
    path: list[str] = []
    for name in location:
        tagged = [section for section in sections if len(sections) > 1 and section.model_fields["kind"].default == name]
        if tagged:  # the tag of a union
            sections = tagged
        elif len(sections) == 1 and name in sections[0].model_fields:
            path.append(str(name))
            sections = list(_settings_in(sections[0].model_fields[str(name)].annotation))
        elif isinstance(name, int) or (sections and not name.startswith("[")):  # else a type's name, or `[key]`
            path.append(str(name))
    return (sections[0] if sections else None), path


def _settings_in(annotation: Any) -> list[type[Settings]]:
    if isinstance(annotation, type) and issubclass(annotation, Settings):
        return [annotation]
    found: list[type[Settings]] = []
    for argument in getattr(annotation, "__args__", ()):
        found += _settings_in(argument)
    return found


# --- upper bounds ----------------------------------------------------------------------------------------------------
# Upper bounds of settings. Beyond them a run would hang or take all memory, so a larger number is a typing error.
#
# Every bound is far above any number in use; the error message gives its reason.


@dataclass(frozen=True)
class AtMost:
    """A check that a number is at most `greatest`. reason: a clause for the message, which follows a comma."""

    greatest: int
    reason: str

    def __call__(self, value: int) -> int:
        """`value`. Raises ValueError if it is larger than `greatest`."""
        if value > self.greatest:
            raise ValueError(f"{_plain(value)} is more than {self.greatest:,}, {self.reason}")
        return value

    @property
    def validator(self) -> AfterValidator:
        """The check as an annotation of a pydantic field."""
        return AfterValidator(self)


def _plain(value: int) -> str:
    """The number for a message; one of more than 30 digits is not printed."""
    return f"{value:,}" if value < 10**30 else "a number of many digits"


COUNT = AtMost(2**53, "above which floating-point numbers are not exact")
WIDTH = AtMost(65_536, "several times the widest layer of any published network")
LAYERS = AtMost(1_000, "several times the deepest published network")
SIDE = AtMost(65_536, "the side of a picture that takes 13 GB by itself")
NOISE_STEPS = AtMost(100_000, "and a schedule stores numbers for each of its steps; 1,000 are usual")
SAMPLING_STEPS = AtMost(100_000, "each of which calls the network; up to 1,000 are usual")
TOKENS = AtMost(32_768, "and the memory of attention grows with its square")
PICTURES = AtMost(10_000_000, "which no memory holds at once")
PROCESSES = AtMost(1_024, "more than any machine has processors for")
ROUNDS = AtMost(1_000, "long after the picture stops changing")

BATCHES = AtMost(1_000_000, "and a validation on so many never ends")
_MOST_WEIGHTS = 10**12

PositiveInt = Annotated[int, Field(gt=0), COUNT.validator]
"""A number of steps, or of pictures processed one after another."""
Width = Annotated[int, Field(gt=0), WIDTH.validator]
"""The width of a layer or an embedding, or a number of heads or groups."""
Layers = Annotated[int, Field(gt=0), LAYERS.validator]
Side = Annotated[int, Field(gt=0), SIDE.validator]
"""Height or width, in pixels."""
NoiseSteps = Annotated[int, Field(gt=0), NOISE_STEPS.validator]
Tokens = Annotated[int, Field(gt=0), TOKENS.validator]
Pictures = Annotated[int, Field(gt=0), PICTURES.validator]
"""A number of pictures in memory together."""
Batches = Annotated[int, Field(gt=0), BATCHES.validator]


def check_network(widths: Sequence[int], layers: Sequence[int]) -> None:
    """Raises ValueError for a network that would take minutes just to allocate, or that fits no machine.

    widths, layers: one per level. A layer counts as one square matrix, a lower bound for every real layer.
    """
    LAYERS(sum(layers))
    weights = sum(width**2 * count for width, count in zip(widths, layers, strict=True))
    if weights > _MOST_WEIGHTS:
        raise ValueError(
            f"{sum(layers):,} layers of up to {max(widths):,} channels have more than {weights:,} weights, 4 bytes"
            " each; make it narrower, or give it fewer layers"
        )
