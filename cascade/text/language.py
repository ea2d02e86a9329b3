r"""Texts before the encoder: the prompt language (weights, composed and scheduled prompts), and cleaning of captions.

    (word)  (word:1.3)  [word]        more weight, 1.3 times the weight, less weight (1.1 times, or divided by it)
    [from:to:0.4]  [to:0.4]           `from` (or nothing) until 40 % of the steps, then `to`
    a fox:1.2 AND snow:0.8            two prompts, composed with these weights
    \( \) \[ \] \: \\ \AND           the letter, or the word, itself

A prompt is read like this only where the caller says so.
"""

from __future__ import annotations

import html
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING
from urllib.parse import unquote_plus

from cascade.errors import CascadeError, quoted, shown

if TYPE_CHECKING:
    from cascade.config.data import Captions


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


# --- captions --------------------------------------------------------------------------------------------------------
# Preparation of captions: a default style for prompts without style words, and cleaning before the text encoder.
#
# DeepFloyd IF was trained on cleaned captions only. The rules remove what IF's cleaning removes: markup, addresses,
# article numbers, file names, Chinese, Japanese and Korean letters, and all but one kind of dash and of quote. IF's
# own code also repairs broken Unicode with ftfy and parses markup with beautifulsoup4; here an embedding does not
# depend on the installed packages.

_ENDINGS = "com|co|ru|net|org|edu|gov|it"
_SUFFIXES = "jpe?g|png|bmp|webp|eps|pdf|apk|mp4"
_CJK = "\u2e80-\u2fff\u3000-\u30ff\u3100-\u31ef\u31f0-\u31ff\u3200-\u4dbf\u4e00-\u9fff\uac00-\ud7af\uf900-\ufaff"
_DASHES = "\u002d\u058a\u05be\u1400\u1806\u2010-\u2015\u2e17\u2e1a\u2e3a\u2e3b\u2e40\u301c\u3030\u30a0\ufe31\ufe32"

_RULES: tuple[tuple[re.Pattern[str], str], ...] = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (rf"\b(?:https?:(?:/{{1,3}}|[a-z0-9%])|www\.)\S*|\b[a-z0-9.-]+\.(?:{_ENDINGS})\b(?:/\S*)?(?!@)", ""),
        (r"@[\w-]+\b", ""),  # @mentions
        (rf"[{_CJK}]+", ""),
        (rf"[{_DASHES}\ufe58\ufe63\uff0d]", "-"),
        (r"[`´«»“”¨„]", '"'),
        (r"[‘’]", "'"),
        (r"&(?:quot|amp);?", ""),
        (r"\d{1,3}(?:\.\d{1,3}){3}", " "),  # IP addresses
        (r"\d:\d\d\s+$", ""),  # times of day at the end
        (r"\\n", " "),
        (r"#\d{1,3}\b|#\d{5,}\b|\b\d{6,}\b", ""),  # article numbers
        (rf"\S+\.(?:{_SUFFIXES})\b", ""),
        (r"[\"']{2,}", '"'),
        (r"\.{2,}", " "),
        (r"[#®•©™&@·º½¾¿¡§~)(\]\[}{|\\/*]+", " "),
        (r"\s+\.\s+", " "),
    )
)
_MANY_JOINED = re.compile(r"[-_]")
_LAST_RULES: tuple[tuple[re.Pattern[str], str], ...] = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"\b[a-z]{1,3}\d{3,15}\b|\b[a-z]+\d+[a-z]+\b|\b\d+[a-z]+\d+\b|\b\d*(?:[a-z]+\d+){2}[a-z\d]*\b", ""),  # codes
        (r"(?:worldwide\s+)?(?:free\s+)?shipping|(?:free\s)?download(?:\sfree)?|\bclick\b\s(?:for|on)\s\w+", ""),
        (rf"\b(?:{_SUFFIXES})(?:\simages?)?\b|\bpage\s+\d+\b", ""),
        (r"\b\d+\s*[xх×]\s*\d+\b", ""),  # sizes
        (r"\b\s+:\s+", ": "),
        (r"(\D[,./])\b", r"\1 "),
        (r"\s+", " "),
    )
)
_ENDS: tuple[tuple[re.Pattern[str], str], ...] = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"^[\"'](.+)[\"']$", r"\1"),
        (r"^['_,\-:;]|['_,\-:+]$", ""),
        (r"^\.\S+$", ""),
    )
)


@dataclass(frozen=True)
class Styles:
    """Style words of a model, such as "noto style".

    default: added to prompts that contain none of them; None: prompts stay as they are. A model of many styles draws
    such prompts in a random mixture.
    """

    words: tuple[str, ...] = ()
    default: str | None = None

    def choose(self, default: str | None) -> Styles:
        """The same with the default style of a call: None keeps the model's, "none" adds nothing.

        Raises CascadeError for anything but a text with words.
        """
        if default is None:
            return self
        if not isinstance(default, str) or not default.strip():
            raise CascadeError(f"default_style: {quoted(default)}; expected style words such as noto style, or none")
        return replace(self, default=None if default == "none" else default.strip())

    def added(self, prompt: str) -> str:
        """The prompt with the default style after a comma; unchanged if it is empty or contains style words."""
        if self.default is None or not prompt.strip() or self._named_in(prompt):
            return prompt
        return f"{prompt.rstrip().rstrip(',')}, {self.default}"

    def _named_in(self, prompt: str) -> bool:
        words = "|".join(map(re.escape, (*self.words, self.default or "")))
        return re.search(rf"(?<!\w)(?:{words})(?!\w)", prompt, re.IGNORECASE) is not None


def prepare_caption(text: str, how: Captions) -> str:
    """The text for the encoder. `deepfloyd` cleans twice, as IF's training did."""
    match how:
        case "as_is":
            return text
        case "lower":
            return text.lower().strip()
        case "deepfloyd":
            return clean_caption(clean_caption(text))


def clean_caption(text: str) -> str:
    """One pass of DeepFloyd IF's cleaning: lower case, no markup, addresses, codes, or file names."""
    text = unquote_plus(text).strip().lower().replace("<person>", "person")
    text = _apply(_RULES[:1], text)  # addresses first: removing markup would break their slashes
    text = _apply(_RULES[1:], _without_markup(text))
    if len(_MANY_JOINED.findall(text)) > 3:
        text = _MANY_JOINED.sub(" ", text)
    text = html.unescape(html.unescape(text)).strip()
    text = _apply(_LAST_RULES, text).strip()
    return _apply(_ENDS, text).strip()


def well_formed(text: str) -> str:
    """`text` as valid Unicode: surrogate pairs are joined, a lone surrogate becomes U+FFFD."""
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def _apply(rules: tuple[tuple[re.Pattern[str], str], ...], text: str) -> str:
    for pattern, replacement in rules:
        text = pattern.sub(replacement, text)
    return text


def _without_markup(text: str) -> str:
    return html.unescape(re.sub(r"<!--.*?-->|<[a-z/!][^>]*>", "", text, flags=re.DOTALL))
