"""The card of a saved model: front matter that the hub reads, and a card of the user's own that stays."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from helpers_model import make_tiny_cascade, tiny_configs

from cascade import CascadePipeline
from cascade.storage.saving import MARK, Card, card_text


def front_matter(text: str) -> dict[str, object]:
    head, _, rest = text.removeprefix("---\n").partition("\n---\n")
    assert rest
    return yaml.safe_load(head)


@pytest.mark.parametrize(
    ("license", "expected"),
    [
        ("CC-BY-4.0", {"license": "cc-by-4.0"}),
        ('my own: "do as you like"', {"license": "other", "license_name": 'my own: "do as you like"'}),
    ],
)
def test_the_front_matter_is_yaml_with_the_licence_as_the_hub_has_it(license: str, expected: dict[str, str]) -> None:
    found = front_matter(card_text('a "name": of a model', license, tiny_configs(), Card(), sheet=False))
    assert {key: found[key] for key in expected} == expected
    assert found["model_name"] == 'a "name": of a model'
    assert found["pipeline_tag"] == "text-to-image"


def test_the_card_accepted_by_the_client_of_the_hub() -> None:
    from huggingface_hub import ModelCard

    card = ModelCard(card_text("tiny", "CC0-1.0", tiny_configs(), Card([("Data", "none")]), sheet=False))
    assert (card.data.license, card.data.library_name) == ("cc0-1.0", "cascade-diffusion")
    assert "## Data\n\nnone" in card.text


def test_a_saved_model_has_a_card_and_one_with_prompts_a_sheet_of_their_pictures(tmp_path: Path) -> None:
    folder = make_tiny_cascade(tmp_path / "model")
    assert MARK in (folder / "README.md").read_text()
    assert not (folder / "card").exists()
    pipeline = CascadePipeline.from_pretrained(folder)
    pipeline.save_pretrained(folder, card=Card(prompts=["a fox", "a red apple"]))
    assert (folder / "card" / "sheet.png").exists()
    text = (folder / "README.md").read_text()
    assert "card/sheet.png" in text
    assert "a fox; a red apple" in text
    pipeline.save_pretrained(folder)
    assert not (folder / "card").exists()


def test_a_card_written_by_hand_stays_when_the_model_is_saved_again(tmp_path: Path) -> None:
    folder = make_tiny_cascade(tmp_path / "model")
    (folder / "README.md").write_text("# My own words")
    CascadePipeline.from_pretrained(folder).save_pretrained(folder)
    assert (folder / "README.md").read_text() == "# My own words"
