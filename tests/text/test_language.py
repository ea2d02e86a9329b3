"""The prompt language: what is written is what is read, and a mistake is shown at its place."""

from __future__ import annotations

import pytest

from cascade.text.language import DEEPEST, PromptSyntaxError, escaped, read_prompt


def only(prompt: str) -> str:
    (phase,) = read_prompt(prompt)
    (portion,) = phase.portions
    assert portion.weight == 1
    return portion.text


@pytest.mark.parametrize(
    ("prompt", "portions"),
    [
        ("a (red:1.3) fox", {"a red fox": 1.3, "a fox": -0.3}),
        ("a (red:0.5) fox", {"a red fox": 0.5, "a fox": 0.5}),
        ("a (red:0) fox", {"a fox": 1.0}),
        ("a (red) fox", {"a red fox": 1.1, "a fox": -0.1}),
        ("a ((red)) fox", {"a red fox": 1.21, "a fox": -0.21}),
        ("a [red] fox", {"a red fox": 0.909091, "a fox": 0.090909}),
        ("(a (red:2) fox:0.5)", {"a red fox": 0.5, "red": 0.5}),
        ("(big:1.5) (red:0.8) fox", {"big red fox": 1.3, "red fox": -0.5, "big fox": 0.2}),
        ("(at 10:30:1.2) z", {"at 10:30 z": 1.2, "z": -0.2}),
        ("a (red:1.5) fox:2 AND snow", {"a red fox": 3.0, "a fox": -1.0, "snow": 1.0}),
    ],
)
def test_a_weight_extrapolates_from_the_prompt_without_the_words(prompt: str, portions: dict[str, float]) -> None:
    (phase,) = read_prompt(prompt)
    assert {one.text: one.weight for one in phase.portions} == portions


@pytest.mark.parametrize("prompt", ["", "a fox", "at 10:30, red: blue", r"\(a\) \[b\] c\\d", "(red:1) fox"])
def test_a_prompt_without_weights_is_plain_text(prompt: str) -> None:
    assert only(prompt) == prompt.replace("(red:1)", "red").replace("\\\\", "\0").replace("\\", "").replace("\0", "\\")


@pytest.mark.parametrize("text", ["a (b) [c:d:0.5] \\ e:2", "((", "]", ":"])
def test_an_escaped_text_is_read_as_itself(text: str) -> None:
    assert only(escaped(text)) == text


def test_phases_begin_where_a_word_changes() -> None:
    phases = read_prompt("a [red:blue:0.4] fox[, snow:0.7]")
    found = [(phase.start, phase.portions[0].text) for phase in phases]
    assert found == [(0.0, "a red fox"), (0.4, "a blue fox"), (0.7, "a blue fox, snow")]


def test_parts_are_composed_with_their_weights() -> None:
    (phase,) = read_prompt("a fox:1.2 AND snow :-0.5 AND ANDROID")
    assert [(one.text, one.weight) for one in phase.portions] == [("a fox", 1.2), ("snow", -0.5), ("ANDROID", 1.0)]


@pytest.mark.parametrize(
    ("prompt", "place"),
    [("a (red fox", 2), ("a red) fox", 5), ("[a:b:c:1]", 0), ("(x:99)", 3), ("a:x AND b", 2), ("a (b AND c)", 2)],
)
def test_a_mistake_is_shown_with_a_caret_under_its_place(prompt: str, place: int) -> None:
    with pytest.raises(PromptSyntaxError) as caught:
        read_prompt(prompt)
    reason, shown, caret = str(caught.value).split("\n")
    assert shown == f"  {prompt}"
    assert caret.index("^") == 2 + place
    assert reason.startswith("prompt: ")


def test_the_caret_stays_under_its_place_in_a_long_prompt_with_strange_letters() -> None:
    with pytest.raises(PromptSyntaxError) as caught:
        read_prompt("x" * 300 + "\x1b)" + "y" * 300)
    _, shown, caret = str(caught.value).split("\n")
    assert len(shown) < 150
    assert shown[caret.index("^")] == ")"


def test_brackets_nested_without_end_are_refused() -> None:
    read_prompt("(" * DEEPEST + "x" + ")" * DEEPEST)
    with pytest.raises(PromptSyntaxError, match="inside each other"):
        read_prompt("(" * 10_000)
