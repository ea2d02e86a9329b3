"""Shared fixtures of the data tests."""

import pytest
from tiny_data import SIZE

from cascade.config.stage import StageConfig
from cascade.models.unet import UNetConfig


@pytest.fixture(autouse=True)
def private_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """The Arrow copies of `datasets` go to a folder of the test's own."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))


@pytest.fixture
def stage() -> StageConfig:
    model = UNetConfig(channels=(32,), blocks=(1,), strides=(1,), attention=(False,))
    return StageConfig(name="base", resolution=SIZE, model=model)
