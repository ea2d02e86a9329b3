"""A tiny cascade, loaded once for a file of tests, and a server over an empty folder."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers_model import make_tiny_cascade
from helpers_server import Live, live

from cascade import CascadePipeline


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_cascade(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="session")
def pipeline(model: Path) -> CascadePipeline:
    return CascadePipeline.from_pretrained(model, device="cpu")


@pytest.fixture
def server(pipeline: CascadePipeline, tmp_path: Path) -> Iterator[Live]:
    with live(lambda: pipeline, tmp_path / "out") as running:
        yield running
