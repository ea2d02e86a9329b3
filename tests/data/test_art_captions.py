"""Captions of an emoji: natural words in the templates of the data set."""

import random
from typing import Any

import pytest
from art.captions import STYLES, caption_of, captions_of, noun_phrase


@pytest.mark.parametrize(
    ("name", "subgroup", "phrase"),
    [
        ("red apple", "food-fruit", "a red apple"),
        ("owl", "animal-bird", "an owl"),
        ("unicorn", "animal-mammal", "a unicorn"),
        ("one o'clock", "time", "a one o'clock"),
        ("hourglass done", "time", "an hourglass done"),
        ("grapes", "food-fruit", "grapes"),
        ("bus", "transport-ground", "a bus"),
        ("compass", "place-map", "a compass"),
        ("glasses", "clothing", "glasses"),
        ("soap", "household", "soap"),
        ("Leo", "zodiac", "Leo"),
        ("no entry", "warning", "no entry"),
        ("smiling face with sunglasses", "face-glasses", "a smiling face with sunglasses"),
        ("keycap: 5", "keycap", "keycap 5"),
        ("flag: Japan", "country-flag", "the flag of Japan"),
        ("Statue of Liberty", "place-building", "the Statue of Liberty"),
        ("woman: beard", "person", "a woman with a beard"),
        ("person: blond hair", "person", "a person with blond hair"),
        ("family: man, woman, boy", "family", "a family of a man, a woman and a boy"),
        ("kiss: woman, man", "family", "a kiss between a woman and a man"),
        ("couple with heart: man, man", "family", "a couple with a heart, a man and a man"),
        ("woman walking: facing right", "person-activity", "a woman walking, facing right"),
    ],
)
def test_a_name_becomes_the_words_that_people_would_say(name: str, subgroup: str, phrase: str) -> None:
    assert noun_phrase(caption_of(name), subgroup) == phrase


def test_captions_follow_the_templates() -> None:
    def first(values: Any) -> Any:
        return values[0]

    rng = random.Random(0)
    rng.choice = first  # type: ignore[method-assign]
    rng.sample = lambda words, count: words[:count]  # type: ignore[method-assign]
    assert captions_of("owl", "animal-bird", ["bird", "wise", "night", "hoot", "eye"], STYLES["twemoji"], rng) == [
        "owl",
        "owl, twemoji style",
        "owl, simple flat sticker",
        "a twemoji of an owl",
        "a simple flat sticker of an owl",
        "a twemoji of an owl on a white background",
        "an owl in twemoji style",
        "owl, bird, wise, twemoji style",
        "bird, wise, night, hoot",
        "bird, wise, night, twemoji style",
    ]
    assert len(captions_of("owl", "animal-bird", ["bird"], STYLES["twemoji"], rng)) == 7
