"""Preparation of captions: a default style for prompts without style words, and cleaning before the text encoder.

DeepFloyd IF was trained on cleaned captions only. The rules remove what IF's cleaning removes: markup, addresses,
article numbers, file names, Chinese, Japanese and Korean letters, and all but one kind of dash and of quote. IF's own
code also repairs broken Unicode with ftfy and parses markup with beautifulsoup4; here an embedding does not depend on
the installed packages.
"""

from __future__ import annotations

import html
import re
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING
from urllib.parse import unquote_plus

from cascade.errors import CascadeError
from cascade.quoting import quoted

if TYPE_CHECKING:
    from cascade.config.data import Captions

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
