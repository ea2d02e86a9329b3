"""The short texts whose meanings the encoder learns from the teacher: captions, words, glosses, misspellings."""

from __future__ import annotations

import random
import re
import string
from collections import Counter
from collections.abc import Collection, Iterator, Sequence

from text_encoder.wordnet import WordNet

GLOSS_WORDS = 10
Text = tuple[str, str]  # the encoder's text, and the text with its meaning: the same, or the correct spelling


def words_in(text: str) -> list[str]:
    """The text's words in lower case, without punctuation."""
    return re.findall(r"[^\W_]+", text.lower())


def distillation_texts(
    captions: Sequence[str], caption_share: int, wordnet: WordNet | None, excluded: Collection[str], seed: int
) -> list[Text]:
    """Distinct texts without excluded words. caption_share: maximum number of captions."""
    rng = random.Random(seed)
    taken = rng.sample(list(captions), min(caption_share, len(captions)))
    taken += [caption for caption in captions if len(caption.split()) <= 2]  # names of things
    seen = sorted({word for caption in captions for word in words_in(caption)})
    texts: list[Text] = [(text, text) for text in [*taken, *seen]]
    common = [word for word in seen if len(word) > 4] * 4
    if wordnet:
        texts += [(text, text) for text in wordnet_texts(wordnet)]
        common += [
            lemma for lemma, count in wordnet.counts.items() if count >= 5 and lemma.isalpha() and len(lemma) > 4
        ]
    texts += [(misspell(word, rng), word) for word in common]
    spelled_right = {text for text, meaning in texts if text == meaning}
    banned = set(excluded)
    distinct = {text: meaning for text, meaning in reversed(texts) if text == meaning or text not in spelled_right}
    return [
        (text, meaning)
        for text, meaning in sorted(distinct.items())
        if banned.isdisjoint(words_in(text)) and banned.isdisjoint(words_in(meaning))
    ]


def wordnet_texts(wordnet: WordNet) -> Iterator[str]:
    """Lemmas that are common or can be drawn, the latter with gloss and hypernym; plurals."""
    for (lemma, part), sense in wordnet.senses.items():
        count = wordnet.counts[lemma]
        plain = lemma.isalpha()
        if not (count or (sense.drawable and plain)):
            continue
        yield lemma
        if count >= 2 and (sense.drawable or count >= 10):
            yield f"{lemma}, {' '.join(sense.gloss.split()[:GLOSS_WORDS])}"
        if count and sense.drawable:
            yield from (f"{lemma}, {parent}" for parent in sense.parents)
            if plain:
                yield plural(lemma)
        if count and part == "adj" and plain:
            yield f"a {lemma} thing"


def plural(noun: str) -> str:
    """The regular plural."""
    if re.search("(s|x|z|ch|sh)$", noun):
        return noun + "es"
    if re.search("[^aeiou]y$", noun):
        return noun[:-1] + "ies"
    return noun + "s"


def misspell(word: str, rng: random.Random) -> str:
    """One slip inside the word (at least four letters): two letters swapped, one dropped, doubled or wrong."""
    i = rng.randrange(1, len(word) - 2)
    slips = (
        word[:i] + word[i + 1] + word[i] + word[i + 2 :],
        word[:i] + word[i + 1 :],
        word[:i] + word[i] + word[i:],
        word[:i] + rng.choice(string.ascii_lowercase) + word[i + 1 :],
    )
    return rng.choice(slips)


def common_words(wordnet: WordNet, excluded: Collection[str]) -> list[str]:
    """WordNet's single words, the commonest first, by their number of tags and occurrences in glosses."""
    counts = wordnet.counts + Counter(word for sense in set(wordnet.senses.values()) for word in words_in(sense.gloss))
    words = {lemma for lemma, _ in wordnet.senses if lemma.isalpha() and len(lemma) > 2} - set(excluded)
    return sorted(words, key=lambda word: (-counts[word], word))
