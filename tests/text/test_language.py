"""The prompt language: what is written is what is read, and a mistake is shown at its place."""

from __future__ import annotations

import pytest
import torch
from helpers_text import make_tiny_t5

from cascade import CascadeError, TextEncoder
from cascade.text.language import DEEPEST, Emphasized, PromptSyntaxError, Text, escaped, read_prompt


def only(prompt: str) -> Text:
    ((phase,), *_) = (read_prompt(prompt),)
    (portion,) = phase.portions
    return portion.text


@pytest.mark.parametrize(
    ("prompt", "weights"),
    [
        ("(red:1.3) fox", {"red": 1.3, " fox": 1.0}),
        ("(red) fox", {"red": 1.1, " fox": 1.0}),
        ("((red)) fox", {"red": 1.21, " fox": 1.0}),
        ("(a (red:2) fox:0.5)", {"a ": 0.5, "red": 1.0, " fox": 0.5}),
        ("(at 10:30:1.2) z", {"at 10:30": 1.2, " z": 1.0}),
        ("[red] fox", {"red": round(1 / 1.1, 6), " fox": 1.0}),
    ],
)
def test_brackets_weigh_words(prompt: str, weights: dict[str, float]) -> None:
    text = only(prompt)
    assert isinstance(text, Emphasized)
    assert dict(text.pieces) == weights


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


@pytest.fixture(scope="module", params=[False, True])
def encoder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> TextEncoder:
    folder = make_tiny_t5(tmp_path_factory.mktemp("t5") / "t5", 32)
    return TextEncoder.from_pretrained(folder, max_length=24, padded=request.param)


def encoded(encoder: TextEncoder, *pieces: tuple[str, float]) -> torch.Tensor:
    return encoder.encode([Emphasized(pieces)]).tokens[0]


def test_a_weighted_text_lies_on_a_line_through_the_plain_one(encoder: TextEncoder) -> None:
    """Weight 1 gives the plain embedding, weight 0 the one without the words, others extrapolate linearly."""
    plain = encoder.encode(["a red fox"]).tokens[0]
    at = {weight: encoded(encoder, ("a ", 1.0), ("red", weight), (" fox", 1.0)) for weight in (0.0, 0.5, 1.0, 2.0)}
    torch.testing.assert_close(at[1.0], plain, rtol=0, atol=0)
    torch.testing.assert_close(at[0.5], (plain + at[0.0]) / 2)
    torch.testing.assert_close(at[2.0], 2 * plain - at[0.0])
    assert not torch.allclose(at[0.0], plain)


def test_plain_and_weighted_texts_keep_their_order(encoder: TextEncoder) -> None:
    weighted = Emphasized((("a ", 1.0), ("red", 1.5), (" fox", 1.0)))
    both = encoder.encode(["a red fox", weighted, "a red fox"]).tokens
    assert torch.equal(both[0], both[2])
    assert not torch.equal(both[0], both[1])


def test_a_weight_survives_the_cleaning_of_captions_or_says_that_it_cannot(encoder: TextEncoder) -> None:
    lower = TextEncoder(encoder._model, encoder._tokenizer, max_length=24, captions="lower")
    given = lower.encode([Emphasized((("A ", 1.0), ("RED", 1.5), (" Fox", 1.0)))]).tokens
    expected = lower.encode([Emphasized((("a ", 1.0), ("red", 1.5), (" fox", 1.0)))]).tokens
    assert torch.equal(given, expected)
    cleaned = TextEncoder(encoder._model, encoder._tokenizer, max_length=24, captions="deepfloyd")
    with pytest.raises(CascadeError, match="has a weight"):
        cleaned.encode([Emphasized((("a-b-c-", 1.0), ("d-e", 1.5)))])
