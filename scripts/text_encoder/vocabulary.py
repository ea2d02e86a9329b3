"""The vocabulary: SentencePiece's unigram pieces with byte fallback, in a form that `AutoTokenizer` loads."""

from __future__ import annotations

import io
import itertools
import statistics
import string
from collections.abc import Iterable, Sequence
from typing import Any

import click

PAD, EOS, UNK = 0, 1, 2
SENTINELS = 32
UNLIKELY = -1000.0  # log probability of a piece that should never match ordinary text


def normalizer() -> Any:
    """NFKC, lower case, single spaces. The normalizer in tokenizer.json also prepares the text for SentencePiece, so
    that training and use agree."""
    from tokenizers import Regex, normalizers

    return normalizers.Sequence(
        [
            normalizers.Nmt(),  # removes control characters, replaces unusual spaces
            normalizers.NFKC(),
            normalizers.Lowercase(),
            normalizers.Replace(Regex(r"\s+"), " "),
            normalizers.Strip(),
        ]
    )


def learn_pieces(texts: Sequence[str], vocab_size: int) -> list[tuple[str, float]]:
    """SentencePiece's unigram pieces and their log probabilities, in the order of their ids."""
    import sentencepiece

    model = io.BytesIO()
    normalize = normalizer().normalize_str
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=(normalize(text) for text in texts),
            model_writer=model,
            model_type="unigram",
            vocab_size=vocab_size,
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
    except RuntimeError as error:  # its message names the largest size possible for these texts
        raise click.ClickException(f"--learned-pieces {vocab_size}: {error}") from None
    learned = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    pieces = []
    for i in range(learned.vocab_size()):
        # Bytes and control pieces have score 0, the best there is, and match text that happens to spell them:
        # "<0x41>" would become the letter A. This low, the required characters above always win.
        plain = not (learned.is_byte(i) or learned.is_control(i) or learned.is_unknown(i))
        pieces.append((learned.id_to_piece(i), learned.get_score(i) if plain else UNLIKELY))
    return pieces


def with_words(pieces: list[tuple[str, float]], words: Iterable[str], count: int) -> list[tuple[str, float]]:
    """The pieces, and the first `count` words that are not yet pieces.

    SentencePiece splits all but the most frequent words ("post", "er"), and the pieces do not have the word's meaning.
    An added word is as likely as a median piece, and so likelier than almost any two or more pieces.
    """
    known = {piece for piece, _ in pieces}
    middling = statistics.median(score for _, score in pieces if score > UNLIKELY)
    new = (f"▁{word}" for word in dict.fromkeys(words))
    return pieces + [
        (piece, middling) for piece in itertools.islice((each for each in new if each not in known), count)
    ]


def build_tokenizer(texts: Sequence[str], learned_pieces: int, words: Iterable[str] = (), whole_words: int = 0) -> Any:
    """A `PreTrainedTokenizerFast` that ends every text with </s> and uses bytes for unknown characters.

    learned_pieces: including bytes and control tokens. words: the commonest first; `whole_words` of them get a piece.

    Not `T5Tokenizer`, which transformers 5 rebuilds without byte fallback.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    pieces = with_words(learn_pieces(texts, learned_pieces), words, whole_words)
    pieces += [(f"<extra_id_{i}>", UNLIKELY) for i in range(SENTINELS)]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=UNK, byte_fallback=True))
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


def pieces_of_one_word(tokenizer: Any) -> dict[int, str]:
    """Token id -> word, for the pieces that spell a word of three letters or more from its beginning."""
    pieces = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    return {
        row: piece[1:]
        for row, piece in enumerate(pieces)
        if piece.startswith("▁") and len(piece) > 3 and piece[1:].isalpha()
    }
