"""A tiny T5 in transformers' folder layout, with random weights and a tokenizer for any text."""

from __future__ import annotations

import string
from pathlib import Path

WORDS = ["red", "blue", "green", "apple", "star", "fox", "circle", "square", "a", "the", "of", "two", "style"]


def make_tiny_t5(folder: str | Path, dim: int = 32, seed: int = 0) -> Path:
    """Write config.json, model.safetensors and the tokenizer's files into `folder`, and return it."""
    import torch
    from transformers import T5Config, T5EncoderModel
    from transformers.utils import logging

    logging.disable_progress_bar()
    tokenizer = _tokenizer()
    config = T5Config(
        vocab_size=len(tokenizer),
        d_model=dim,
        d_kv=8,
        num_heads=2,
        d_ff=2 * dim,
        num_layers=2,
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
        pad_token_id=0,
        eos_token_id=1,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        T5EncoderModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return Path(folder)


def _tokenizer():
    """A unigram tokenizer with byte fallback, as built by scripts/train_text_encoder.py, for a few words."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    rare = [(piece, -1000.0) for piece in ["<pad>", "</s>", "<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]]
    letters = [(letter, -8.0) for letter in ["▁", *string.ascii_lowercase, *string.digits, *string.punctuation]]
    words = [(f"▁{word}", -3.0) for word in WORDS]
    tokenizer = Tokenizer(models.Unigram([*rare, *letters, *words], unk_id=2, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase(), normalizers.Strip()])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(), decoders.Fuse()])
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        split_special_tokens=True,
    )
