"""docs/extending.md is correct: its sampler, added to a copy of the package as described, draws."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from helpers_model import make_tiny_cascade

import cascade

ROOT = Path(__file__).parents[1]
PACKAGE = Path(cascade.__file__).parent
LIST = "SAMPLERS: Mapping[str, Sampler] = {\n"


@pytest.fixture(scope="module")
def extended(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the package and the page's sampler in it; and a tiny model."""
    folder = tmp_path_factory.mktemp("extended")
    shutil.copytree(PACKAGE, folder / "cascade", ignore=shutil.ignore_patterns("pretrained", "__pycache__"))
    page = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
    section = page.partition("## A sampler\n")[2].partition("\n## ")[0]
    function, line = re.findall(r"^```python\n(.*?)^```", section, re.DOTALL | re.MULTILINE)
    path = folder / "cascade" / "diffusion" / "samplers.py"
    source = path.read_text(encoding="utf-8")
    assert source.count(LIST) == 1
    path.write_text(source.replace(LIST, f"{function}\n\n{LIST}{line}"), encoding="utf-8")
    make_tiny_cascade(folder / "tiny")
    return folder


def python(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the copy's interpreter line in its folder."""
    environment = os.environ | {"PYTHONPATH": str(folder), "HF_HUB_OFFLINE": "1"}
    return subprocess.run(
        [sys.executable, *arguments], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )


DRAW = """
import hashlib, json
from cascade import CascadePipeline
pipeline = CascadePipeline.from_pretrained("tiny", device="cpu")
def drawn(sampler):
    image = pipeline("a fox", seed=1, until=8, steps=4, sampler=sampler).images[0]
    return list(image.tobytes())
named, without, ddim = (drawn(s) for s in ("renoise", {"kind": "renoise", "share": 0.0}, "ddim"))
print(json.dumps([named, without, ddim]))
"""


def test_the_sampler_of_the_page_draws_and_without_new_noise_it_is_ddim(extended: Path) -> None:
    done = python(extended, "-c", DRAW)
    assert done.returncode == 0, done.stderr
    named, without, ddim = json.loads(done.stdout)
    assert max(abs(a - b) for a, b in zip(without, ddim, strict=True)) <= 1  # rounding to 8 bits
    assert max(abs(a - b) for a, b in zip(named, ddim, strict=True)) > 8


@pytest.mark.slow
def test_the_command_line_knows_it_and_refuses_wrong_values_of_its_settings_by_name(extended: Path) -> None:
    call = ("-m", "cascade", "generate", "a fox", "--model", "tiny", "--until", "8", "--sampler", "renoise")
    done = python(extended, *call, "--out", "out")
    assert done.returncode == 0, done.stderr
    assert list((extended / "out").glob("*.png"))
    path = extended / "tiny" / "base" / "stage.json"
    settings = json.loads(path.read_text())
    settings["sampling"]["sampler"] = {"kind": "renoise", "share": 2.0}
    shutil.copytree(extended / "tiny", extended / "wrong")
    (extended / "wrong" / "base" / "stage.json").write_text(json.dumps(settings))
    done = python(extended, "-m", "cascade", "info", "wrong")
    assert done.returncode == 2
    assert "sampling.sampler.share: should be less than or equal to 1, not 2.0" in done.stderr


def test_the_package_itself_has_no_such_sampler() -> None:
    """Else these tests would prove nothing."""
    assert "renoise" not in (PACKAGE / "diffusion" / "samplers.py").read_text(encoding="utf-8")
