"""The process that looks up a batch's text does not affect training."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

import pytest
import torch
from helpers_training import WordEncoder, micro_config

from cascade.config.training import TrainConfig
from cascade.data.loader import batches
from cascade.stage import build_stage
from cascade.text.cache import EmbeddingCache
from cascade.text.cached import CachedTextEncoder, fill
from cascade.training.state import load_newest
from cascade.training.trainer import Trainer


def captions_of(config: TrainConfig) -> list[str]:
    """Of the run's four steps."""
    with closing(batches(config.data.model_copy(update={"workers": 0}), config.stage, 0, batch_size=4)) as stream:
        return [caption for _ in range(4) for caption in next(stream).captions]


def trained(folder: Path, known: Sequence[str], workers: int) -> tuple[dict[str, torch.Tensor], int]:
    """The weights of a run whose cache knows these captions, and how often the encoder was asked."""
    config = micro_config(folder / "run", f"data.workers={workers}")
    encoder, cache = WordEncoder(), EmbeddingCache(folder / "cache", "words", WordEncoder.dim)
    fill(cache, WordEncoder(), known)
    run = Trainer(config, build_stage(config.stage), CachedTextEncoder(cache, lambda: encoder))
    assert run.run()
    return load_newest(folder / "run", config).network, encoder.calls


@pytest.mark.parametrize("workers", [0, 1])
def test_text_found_by_the_readers_trains_as_text_encoded_here(tmp_path: Path, workers: int) -> None:
    """A batch with one caption that is not in the cache is encoded here."""
    captions = captions_of(micro_config(tmp_path))
    found, calls = trained(tmp_path / "all", captions, workers)
    encoded, more_calls = trained(tmp_path / "none", [], workers)
    assert calls == 0
    assert more_calls == 4
    assert all(torch.equal(value, encoded[name]) for name, value in found.items())
