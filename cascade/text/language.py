"""The prompt language: weights, composed prompts and scheduled words, in the syntax that the field shares.

    (word)  (word:1.3)  [word]        more weight, 1.3 times the weight, less weight (1.1 times, or divided by it)
    [from:to:0.4]  [to:0.4]           `from` (or nothing) until 40 % of the steps, then `to`
    a fox:1.2 AND snow:0.8            two prompts, composed with these weights
    \\( \\) \\[ \\] \\: \\\\ \\AND           the letter, or the word, itself

A prompt is read like this only where the caller says so.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from cascade.errors import CascadeError
from cascade.quoting import shown

STRONGER = 1.1
"""Factor of a pair of round brackets; a pair of square ones divides by it."""
HEAVIEST = 10.0
"""Upper bound of weights."""
_AND = re.compile(r"(?<!\\)\bAND\b")
_SPECIAL = "()[]:\\A"
DEEPEST = 30
"""Upper bound of brackets inside brackets."""
_SHOWN = 60  # letters of a long prompt around the place of a mistake


class PromptSyntaxError(CascadeError):
    """A mistake in a prompt: one line about it, the prompt, and a caret under the place."""

    def __init__(self, reason: str, text: str, place: int) -> None:
        start = max(0, place - _SHOWN)
        before, after = shown(text[start:place]), shown(text[place : place + _SHOWN])
        super().__init__(f"prompt: {reason}\n  {before}{after}\n  {' ' * len(before)}^")


@dataclass(frozen=True)
class Portion:
    """One of the prompts that are composed, and its weight; see `cascade.diffusion.guidance.compose`."""

    text: str
    weight: float = 1.0


@dataclass(frozen=True)
class Phase:
    """What is read from a share of the steps, in [0, 1), until the next phase."""

    start: float
    portions: tuple[Portion, ...]


@dataclass(frozen=True)
class _Weighted:
    nodes: tuple[_Node, ...]
    weight: float


@dataclass(frozen=True)
class _Switched:
    before: tuple[_Node, ...]
    after: tuple[_Node, ...]
    share: float


_Node = str | _Weighted | _Switched


def read_prompt(text: str) -> tuple[Phase, ...]:
    """The phases of a prompt in the prompt language, at least one, the first from 0. Raises PromptSyntaxError."""
    parts = [(_Reader(text, start, end).nodes(), weight) for start, end, weight in _composed(text)]
    if not any(weight > 0 for _, weight in parts):
        raise PromptSyntaxError("expected at least one part with a weight above 0", text, 0)
    shares = sorted({0.0, *(share for nodes, _ in parts for share in _shares(nodes) if share < 1)})
    return tuple(
        Phase(share, tuple(one for nodes, weight in parts for one in _portions(nodes, share, weight)))
        for share in shares
    )


def escaped(text: str) -> str:
    """A plain text as a prompt in the prompt language."""
    text = re.sub(r"([()\[\]:\\])", r"\\\1", text)
    return _AND.sub(r"\\AND", text)


def _composed(text: str) -> Iterator[tuple[int, int, float]]:
    """(start, end, weight) of each part between ANDs; a number after a colon is a weight only where there is an AND."""
    ends = [match.span() for match in _AND.finditer(text)]
    start = 0
    for end, following in [*ends, (len(text), len(text))]:
        found = re.search(r"(?<!\\):\s*([^:()\[\]\s]*)\s*$", text[start:end]) if ends else None
        if found is None:
            yield start, end, 1.0
        else:
            place = start + found.start()
            yield start, place, _number(found[1], text, place + 1, -HEAVIEST)
        start = following


def _number(value: str, text: str, place: int, least: float, most: float = HEAVIEST) -> float:
    try:
        number = float(value)
    except ValueError:
        number = math.nan
    if not least <= number <= most:
        raise PromptSyntaxError(f"expected a number from {least:g} to {most:g}; write \\: for a colon", text, place)
    return number


class _Reader:
    """Reads text[start:end], by recursive descent."""

    def __init__(self, text: str, start: int, end: int) -> None:
        self._text, self._place, self._end = text, start, end
        self._depth = 0

    def nodes(self) -> tuple[_Node, ...]:
        """All nodes of the part."""
        lists = self._until("", colons=False)
        return _trimmed(lists[0])

    def _until(self, closing: str, colons: bool) -> list[list[_Node]]:
        """Nodes up to a closing bracket (or the end), split at colons if these mean something here."""
        lists: list[list[_Node]] = [[]]
        opened = self._place - 1
        self._depth += 1
        if self._depth > DEEPEST + 1:
            raise PromptSyntaxError(f"more than {DEEPEST} brackets inside each other", self._text, opened)
        while self._place < self._end:
            letter, place = self._text[self._place], self._place
            self._place += 1
            if letter == "\\" and self._place < self._end and self._text[self._place] in _SPECIAL:
                lists[-1].append(self._text[self._place])
                self._place += 1
            elif letter == closing:
                self._depth -= 1
                return lists
            elif letter in ")]":
                raise PromptSyntaxError(f"{letter} closes nothing; write \\{letter} for the letter", self._text, place)
            elif letter == "(":
                lists[-1].append(self._round(place))
            elif letter == "[":
                lists[-1].append(self._square(place))
            elif letter == ":" and colons:
                lists.append([])
            else:
                lists[-1].append(letter)
        if closing:
            letter = self._text[opened]
            raise PromptSyntaxError(f"{letter} is not closed; write \\{letter} for the letter", self._text, opened)
        return lists

    def _round(self, opened: int) -> _Node:
        """`(words)`, or `(words:weight)`; the last colon counts."""
        *before, last = self._until(")", colons=True)
        if not before:
            return _Weighted(tuple(last), STRONGER)
        weight = _number(_plain(last), self._text, self._text.rindex(":", opened, self._place) + 1, 0.0)
        nodes = [node for place, part in enumerate(before) for node in ([":"] if place else []) + part]
        return _Weighted(tuple(nodes), weight)

    def _square(self, opened: int) -> _Node:
        """`[words]`, `[to:share]` or `[from:to:share]`."""
        lists = self._until("]", colons=True)
        if len(lists) == 1:
            return _Weighted(tuple(lists[0]), 1 / STRONGER)
        if len(lists) > 3:
            raise PromptSyntaxError("expected [from:to:0.4]; write \\: for a colon", self._text, opened)
        share = _number(_plain(lists[-1]), self._text, self._text.rindex(":", opened, self._place) + 1, 0.0, 1.0)
        before = lists[0] if len(lists) == 3 else []
        return _Switched(tuple(before), tuple(lists[-2]), share)


def _plain(nodes: Sequence[_Node]) -> str:
    return "".join(node if isinstance(node, str) else "(" for node in nodes).strip()


def _trimmed(nodes: Sequence[_Node]) -> tuple[_Node, ...]:
    """Without white space at both ends."""
    first, last = 0, len(nodes)
    while first < last and isinstance(each := nodes[first], str) and each.isspace():
        first += 1
    while first < last and isinstance(each := nodes[last - 1], str) and each.isspace():
        last -= 1
    return tuple(nodes[first:last])


def _shares(nodes: Sequence[_Node]) -> Iterator[float]:
    for node in nodes:
        if isinstance(node, _Switched):
            yield node.share
            yield from _shares([*node.before, *node.after])
        elif isinstance(node, _Weighted):
            yield from _shares(node.nodes)


def _portions(nodes: Sequence[_Node], share: float, weight: float) -> Iterator[Portion]:
    """What is read from a share of the steps: the text, and for each weight in it the text without those words.

    Words of weight w move the estimate x of the whole text to x + (w - 1) (x - x without them), as composed prompts.
    """
    pieces = list(_pieces(nodes, share, 1.0))
    weights = [own for own in dict.fromkeys(own for text, own in pieces if text.strip()) if own != 1]
    portions = [(_joined(pieces), weight * (1 + sum(own - 1 for own in weights)))]
    portions += [(_joined((text, own) for text, own in pieces if own != left), weight * (1 - left)) for left in weights]
    return (Portion(text, round(own, 6)) for text, own in portions if round(own, 6) != 0)


def _joined(pieces: Iterable[tuple[str, float]]) -> str:
    """A text without the white space that words left out leave behind."""
    return re.sub(r" {2,}", " ", "".join(text for text, _ in pieces)).strip()


def _pieces(nodes: Sequence[_Node], share: float, weight: float) -> Iterator[tuple[str, float]]:
    for node in nodes:
        if isinstance(node, str):
            yield node, weight
        elif isinstance(node, _Weighted):
            yield from _pieces(node.nodes, share, round(weight * node.weight, 6))
        else:
            yield from _pieces(node.after if share >= node.share else node.before, share, weight)
