"""What a wheel holds: weights, presets and types travel with the code."""

from __future__ import annotations

import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def test_every_package_is_listed():
    listed = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"])
    found = {".".join(path.parent.relative_to(ROOT).parts) for path in (ROOT / "cascade").rglob("__init__.py")}
    assert listed == found | {"cascade.presets"}


@pytest.mark.slow
def test_the_wheel_holds_weights_presets_and_types(tmp_path: Path):
    command = ["wheel", str(ROOT), "--no-deps", "--no-build-isolation", "--quiet", "--wheel-dir", str(tmp_path)]
    subprocess.run([sys.executable, "-m", "pip", *command], check=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    for path in [*(ROOT / "cascade").rglob("*"), *(ROOT / "configs").rglob("*.yaml")]:
        if path.is_file() and "__pycache__" not in path.parts:
            relative = path.relative_to(ROOT).as_posix()
            assert relative.replace("configs/", "cascade/presets/", 1) in names


def test_the_bundled_weights_keep_their_sizes():
    """Bytes: the text encoder and all stages, and the judge of the art suite."""
    folder = ROOT / "cascade" / "pretrained"
    stages = ("text_encoder", "base", "sr256", "sr1024", "upscale256")
    for parts, most in ((stages, 90e6), (("tower",), 8e6)):
        files = [path for part in parts for path in (folder / part).rglob("*") if path.is_file()]
        assert files
        assert sum(path.stat().st_size for path in files) <= most
