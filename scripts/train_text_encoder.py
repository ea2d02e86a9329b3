"""Train a small T5 encoder and its vocabulary on a file of captions, one caption a line.

    python scripts/train_text_encoder.py --captions captions.txt --out text_encoder --minutes 9

A SentencePiece unigram vocabulary with byte fallback is learned first, then a T5 v1.1 encoder with a
throw-away decoder by span corruption (Raffel et al. 2020, section 3.1.4). What is kept is the encoder, in
the folder format that `transformers.T5EncoderModel` and `AutoTokenizer` load, and `training.json`, which
says how it was made. `--steps` gives the same weights for the same seed on one machine and thread count;
`--minutes` lets the clock end the run, so its weights depend on the machine's speed.
"""

from __future__ import annotations

import hashlib
import io
import json
import random
import string
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from torch import Tensor

from cascade.data.scenes import describe, random_scene

PAD, EOS, UNK = 0, 1, 2
SENTINELS = 32
Pair = tuple[list[int], list[int]]  # what the encoder sees, what the decoder has to say


@dataclass(frozen=True)
class Sizes:
    """The encoder's shape in T5 v1.1's own terms, and the depth of the decoder that is thrown away."""

    vocab_size: int
    d_model: int
    d_kv: int
    num_heads: int
    d_ff: int
    num_layers: int
    num_decoder_layers: int


@dataclass(frozen=True)
class Recipe:
    """How long and how fast to train: whichever of `steps` and `minutes` is reached first ends the run."""

    steps: int | None
    minutes: float | None
    batch_size: int
    learning_rate: float
    warmup_steps: int
    corruption: float
    mean_span: int
    words_weight: float
    scenes: int
    seed: int

    def progress(self, step: int, started: float) -> float:
        """The share of the run that is over, 0 to 1 and beyond."""
        by_steps = step / self.steps if self.steps else 0.0
        by_clock = (time.monotonic() - started) / (60 * self.minutes) if self.minutes else 0.0
        return max(by_steps, by_clock)


# ---------------------------------------------------------------------------------------- vocabulary


def normalizer() -> Any:
    """NFKC, lower case, single spaces. The very object that goes into tokenizer.json also prepares the
    text SentencePiece learns from, so that training and use cannot disagree."""
    from tokenizers import Regex, normalizers

    return normalizers.Sequence(
        [
            normalizers.Nmt(),  # control characters away, exotic spaces to plain ones
            normalizers.NFKC(),
            normalizers.Lowercase(),
            normalizers.Replace(Regex(r"\s+"), " "),
            normalizers.Strip(),
        ]
    )


def learn_pieces(captions: Sequence[str], vocab_size: int) -> list[tuple[str, float]]:
    """SentencePiece's unigram pieces and their log probabilities, in the order of their ids."""
    import sentencepiece

    model = io.BytesIO()
    normalize = normalizer().normalize_str
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=(normalize(caption) for caption in captions),
        model_writer=model,
        model_type="unigram",
        vocab_size=vocab_size - SENTINELS,
        byte_fallback=True,
        normalization_rule_name="identity",
        required_chars=string.digits + string.ascii_lowercase + string.punctuation,
        pad_id=PAD,
        eos_id=EOS,
        unk_id=UNK,
        bos_id=-1,
        eos_piece="</s>",
        pad_piece="<pad>",
        unk_piece="<unk>",
        num_threads=1,
        minloglevel=1,
    )
    learned = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    pieces = []
    for i in range(learned.vocab_size()):
        # Bytes and control pieces have score 0, the best there is, and match text that happens to spell them:
        # "<0x41>" would become the letter A. This low, the required characters above always win.
        plain = not (learned.is_byte(i) or learned.is_control(i) or learned.is_unknown(i))
        pieces.append((learned.id_to_piece(i), learned.get_score(i) if plain else -1000.0))
    return pieces + [(f"<extra_id_{i}>", -1000.0) for i in range(SENTINELS)]


def build_tokenizer(captions: Sequence[str], vocab_size: int) -> Any:
    """A `PreTrainedTokenizerFast` that ends every text with </s> and has bytes for whatever it never saw.

    Not `T5Tokenizer`: transformers 5 rebuilds that one without byte fallback.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.Unigram(learn_pieces(captions, vocab_size), unk_id=UNK, byte_fallback=True))
    tokenizer.normalizer = normalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(), decoders.Fuse()])
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", EOS)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        additional_special_tokens=[f"<extra_id_{i}>" for i in range(SENTINELS)],
        model_max_length=512,
        split_special_tokens=True,  # a prompt that spells "</s>" means those four characters
    )


# ----------------------------------------------------------------------------------- span corruption


def partition(total: int, parts: int, rng: np.random.Generator) -> list[int]:
    """`parts` positive lengths that sum to `total`, every such split equally likely."""
    cuts = np.sort(rng.choice(total - 1, parts - 1, replace=False)) + 1
    return np.diff([0, *cuts.tolist(), total]).tolist()


def corrupt(ids: Sequence[int], rate: float, mean_span: int, first_sentinel: int, rng: np.random.Generator) -> Pair:
    """Replace spans by sentinels; the answer lists each sentinel with what it hides.

    ids: at least two tokens, without </s>. At least one span of the mean length is hidden, since 15 % of
    a short caption is hardly a word, and at least one token always stays.
    """
    hidden = min(max(mean_span, round(rate * len(ids))), len(ids) - 1)
    spans = max(1, min(round(hidden / mean_span), len(ids) - hidden, SENTINELS))
    hidden_lengths = partition(hidden, spans, rng)
    # One gap before each span and one after the last; only the outer two may be empty.
    gaps = np.array(partition(len(ids) - hidden + 2, spans + 1, rng))
    gaps[[0, -1]] -= 1
    source: list[int] = []
    answer: list[int] = []
    position = 0
    for i, (gap, length) in enumerate(zip(gaps[:-1].tolist(), hidden_lengths, strict=True)):
        start = position + gap
        source += [*ids[position:start], first_sentinel + i]
        position = start + length
        answer += [first_sentinel + i, *ids[start:position]]
    return [*source, *ids[position:], EOS], [*answer, EOS]


def collate(pairs: Sequence[Pair]) -> dict[str, torch.Tensor]:
    """Pad sources with <pad> and answers with -100, the label that the loss ignores."""
    width = max(len(source) for source, _ in pairs)
    answer_width = max(len(answer) for _, answer in pairs)
    ids = torch.tensor([source + [PAD] * (width - len(source)) for source, _ in pairs])
    labels = torch.tensor([answer + [-100] * (answer_width - len(answer)) for _, answer in pairs])
    return {"input_ids": ids, "attention_mask": (ids != PAD).long(), "labels": labels}


def batches(
    captions: Sequence[list[int]], recipe: Recipe, first_sentinel: int, rng: np.random.Generator
) -> Iterator[dict[str, torch.Tensor]]:
    """Endless batches of captions of like length, so that little is padding: shuffle, sort within pools of
    32 batches, corrupt anew in each epoch."""
    pool_size = 32 * recipe.batch_size
    while True:
        order = rng.permutation(len(captions))
        for pool in (order[i : i + pool_size] for i in range(0, len(order), pool_size)):
            by_length = sorted(pool.tolist(), key=lambda index: len(captions[index]))
            starts = rng.permutation(range(0, len(by_length), recipe.batch_size))
            for chosen in (by_length[start : start + recipe.batch_size] for start in starts.tolist()):
                yield collate(
                    [corrupt(captions[i], recipe.corruption, recipe.mean_span, first_sentinel, rng) for i in chosen]
                )


# ------------------------------------------------------------------------------------------ training


def build_model(sizes: Sizes) -> Any:
    """T5 v1.1: gated GELU, no biases, relative positions shared by all layers; no dropout."""
    from transformers import T5Config, T5ForConditionalGeneration

    model = T5ForConditionalGeneration(
        T5Config(
            **asdict(sizes),
            feed_forward_proj="gated-gelu",
            tie_word_embeddings=False,  # here: the decoder's output is not scaled
            dropout_rate=0.0,
            pad_token_id=PAD,
            eos_token_id=EOS,
            decoder_start_token_id=PAD,
        )
    )
    # transformers 5 ties the output layer to the embedding whatever the config says; T5 v1.1 has its own.
    # After 350 steps, one seed each, held-out loss was 1.31 with its own, 1.36 tied, and the effective rank
    # of 531 one-token captions 47 against 23 (of 192): words are easier to tell apart.
    model.lm_head = torch.nn.Linear(sizes.d_model, sizes.vocab_size, bias=False)
    torch.nn.init.normal_(model.lm_head.weight, std=sizes.d_model**-0.5)
    torch.nn.init.normal_(model.shared.weight, std=1.0)
    return model


@torch.no_grad()
def held_out_loss(model: Any, captions: Sequence[list[int]], recipe: Recipe, first_sentinel: int) -> float:
    """Mean loss per hidden token on captions never trained on, corrupted alike at every call."""
    rng = np.random.default_rng(0)
    total, tokens = 0.0, 0
    ordered = sorted(captions, key=len)
    for start in range(0, len(ordered), 256):
        batch = collate(
            [
                corrupt(ids, recipe.corruption, recipe.mean_span, first_sentinel, rng)
                for ids in ordered[start : start + 256]
            ]
        )
        count = int((batch["labels"] != -100).sum())
        total += float(model(**batch).loss) * count
        tokens += count
    return total / tokens


def bag_of_words(batch: dict[str, Tensor], vocab_size: int, first_sentinel: int) -> Tensor:
    """(B, vocab_size): for each caption, hidden tokens included, the share of each of its tokens."""
    tokens = torch.cat([batch["input_ids"], batch["labels"].clamp(min=0)], dim=1)
    bag = torch.zeros(len(tokens), vocab_size).scatter_add_(1, tokens, torch.ones(tokens.shape))
    bag[:, : UNK + 1] = 0
    bag[:, first_sentinel:] = 0
    return bag / bag.sum(1, keepdim=True).clamp(min=1)


def words_loss(states: Tensor, mask: Tensor, words: torch.nn.Linear, embedding: Tensor, bag: Tensor) -> Tensor:
    """Cross-entropy of the caption's words, all of them, read off the mean of the encoder's states.

    Span corruption alone lets the states collapse to what the decoder's grammar needs (the note in `build_model`);
    a network that draws needs to tell words apart. The words are scored against the encoder's own input embedding,
    held fixed here: an output layer of its own would have to learn each rare word from a few sightings.
    """
    normalized = torch.nn.functional.layer_norm(states.float(), states.shape[-1:])
    mean = (normalized * mask[:, :, None]).sum(1) / mask.sum(1, keepdim=True)
    return -(bag * torch.log_softmax(words(mean) @ embedding.detach().T, dim=1)).sum(1).mean()


def train(
    model: Any,
    training: Sequence[list[int]],
    held_out: Sequence[list[int]],
    recipe: Recipe,
    first_sentinel: int,
) -> dict[str, float]:
    """AdamW with linear warm-up and linear decay to zero. Returns what training.json says of the run."""
    rng = np.random.default_rng(recipe.seed)
    vocab_size = model.config.vocab_size
    words = torch.nn.Linear(model.config.d_model, model.config.d_model)
    parameters = [*model.parameters(), *words.parameters()]
    optimizer = torch.optim.AdamW(parameters, recipe.learning_rate, (0.9, 0.98), weight_decay=0.01)
    stream = batches(training, recipe, first_sentinel, rng)
    step, smoothed, started = 0, float("nan"), time.monotonic()
    while (progress := recipe.progress(step, started)) < 1:
        warmup = min(1.0, (step + 1) / recipe.warmup_steps)
        optimizer.param_groups[0]["lr"] = recipe.learning_rate * warmup * (1 - progress)
        with torch.autocast("cpu", torch.bfloat16):  # 0.26 instead of 0.41 s a step on one core
            batch = next(stream)
            output = model(**batch)
        bag = bag_of_words(batch, vocab_size, first_sentinel)
        states = output.encoder_last_hidden_state
        aside = words_loss(states, batch["attention_mask"], words, model.shared.weight, bag)
        loss = output.loss + recipe.words_weight * aside
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        smoothed = output.loss.item() if step == 0 else 0.98 * smoothed + 0.02 * output.loss.item()
        step += 1
        if step % 100 == 0:
            click.echo(f"step {step}  {progress:4.0%}  loss {smoothed:.3f}  words {aside.item():.3f}")
        if step % 1000 == 0:
            click.echo(f"step {step}  held-out loss {held_out_loss(model, held_out, recipe, first_sentinel):.3f}")
    seconds = time.monotonic() - started
    final = held_out_loss(model, held_out, recipe, first_sentinel)
    click.echo(f"step {step}  held-out loss {final:.3f}  {seconds:.0f} s")
    return {"steps_done": step, "seconds": seconds, "loss": smoothed, "held_out_loss": final}


# ------------------------------------------------------------------------------------------- the run


def read_captions(path: Path) -> list[str]:
    """The distinct, non-empty lines of a UTF-8 file, in the order of the file."""
    lines = (line.strip() for line in path.read_text(encoding="utf-8").splitlines())
    captions = list(dict.fromkeys(line for line in lines if line))
    if len(captions) < 2:
        raise click.ClickException(f"{path}: at least two captions are needed, found {len(captions)}")
    return captions


def scene_captions(count: int, seed: int) -> list[str]:
    """What drawn scenes are called: without them their words (crimson, hexagon) would be spelled letter by letter."""
    rng = random.Random(seed)
    return [describe(random_scene(rng), rng) for _ in range(count)]


def save(model: Any, tokenizer: Any, out: Path, report: dict[str, Any]) -> None:
    """The encoder alone, in bf16, beside its tokenizer and the record of the run."""
    from transformers import T5EncoderModel

    encoder = T5EncoderModel(model.config)
    encoder.load_state_dict({k: v for k, v in model.state_dict().items() if k in encoder.state_dict()}, strict=True)
    out.mkdir(parents=True, exist_ok=True)
    encoder.to(torch.bfloat16).save_pretrained(out)
    (out / "model.safetensors").chmod(0o644)  # safetensors writes what only its owner may read
    tokenizer.save_pretrained(out)
    # The name that every release of transformers reads; 5.x itself would write its new internal one.
    settings = json.loads((out / "tokenizer_config.json").read_text())
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    (out / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
    (out / "training.json").write_text(json.dumps(report, indent=2) + "\n")


@click.command(context_settings={"show_default": True})
@click.option("--captions", required=True, type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--out", required=True, type=click.Path(file_okay=False, path_type=Path), help="Folder to write.")
@click.option("--minutes", type=click.FloatRange(min=0, min_open=True), help="Stop by the clock.")
@click.option("--steps", type=click.IntRange(min=1), help="Stop after so many steps; repeatable to the bit.")
@click.option("--seed", default=0)
@click.option("--batch-size", default=128, help="Captions per step.")
@click.option("--learning-rate", default=2e-3, help="Peak, after warm-up.")
@click.option("--warmup-steps", default=100)
@click.option("--corruption", default=0.15, help="Share of the tokens that is hidden.")
@click.option("--mean-span", default=2, help="Mean tokens in a hidden span; T5's 3 is long for captions.")
@click.option("--words-weight", default=0.5, help="Weight of telling the caption's words from the mean state.")
@click.option("--scenes", default=20_000, help="Captions of drawn scenes that are added to the file's.")
@click.option("--vocab-size", default=4096, help="Pieces, bytes, control tokens and sentinels together.")
@click.option("--d-model", default=192)
@click.option("--d-kv", default=64)
@click.option("--num-heads", default=3)
@click.option("--d-ff", default=512)
@click.option("--num-layers", default=4)
@click.option("--num-decoder-layers", default=2, help="The decoder is thrown away after training.")
def main(captions: Path, out: Path, minutes: float | None, steps: int | None, **options: Any) -> None:
    """Train a small T5 encoder on a file of captions and save it for `TextEncoder.from_pretrained`."""
    if minutes is None and steps is None:
        raise click.UsageError("give --steps, --minutes or both: something has to end the run")
    sizes = Sizes(**{name: options.pop(name) for name in Sizes.__dataclass_fields__})
    recipe = Recipe(steps=steps, minutes=minutes, **options)
    torch.manual_seed(recipe.seed)
    lines = list(dict.fromkeys([*read_captions(captions), *scene_captions(recipe.scenes, recipe.seed)]))
    tokenizer = build_tokenizer(lines, sizes.vocab_size)
    encoded = tokenizer(lines, add_special_tokens=False)["input_ids"]
    usable = [encoded[i] for i in np.random.default_rng(recipe.seed).permutation(len(encoded))]
    usable = [ids for ids in usable if len(ids) > 1]  # a single token has no context to be guessed from
    kept_back = max(1, len(usable) // 20)
    model = build_model(sizes)
    click.echo(f"{len(usable)} captions, {np.mean([len(ids) for ids in usable]):.1f} tokens each")
    result = train(model, usable[kept_back:], usable[:kept_back], recipe, sizes.vocab_size - SENTINELS)
    corpus = hashlib.sha256(captions.read_bytes()).hexdigest()
    save(model, tokenizer, out, {**asdict(recipe), **asdict(sizes), **result, "corpus_sha256": corpus})


if __name__ == "__main__":
    main()
