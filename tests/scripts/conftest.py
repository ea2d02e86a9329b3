"""Packed pictures, and a folder of tiny stages."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from helpers_art import BASE, LARGE


@pytest.fixture(scope="session")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Records and options -> the file that pack_pictures.py makes of them."""
    from pack_pictures import main

    def pack(records: list[dict[str, Any]], *options: str) -> Path:
        folder = tmp_path_factory.mktemp("pack")
        pq.write_table(pa.Table.from_pylist(records), folder / "art.parquet")
        done = CliRunner().invoke(main, [str(folder / "art.parquet"), "--out", str(folder / "art.npz"), *options])
        assert done.exit_code == 0, done.output
        return folder / "art.npz"

    return pack


@pytest.fixture
def configs(tmp_path: Path) -> Path:
    """A folder of tiny stages."""
    folder = tmp_path / "configs"
    folder.mkdir()
    (folder / "base.yaml").write_text(BASE)
    (folder / "sr256.yaml").write_text(LARGE)
    return folder
