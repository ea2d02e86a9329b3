"""The content of a wheel: it includes weights, presets and types."""

from __future__ import annotations

import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parent.parent


def test_every_package_is_listed():
    listed = set(tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]["packages"])
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


@pytest.mark.slow
def test_the_source_distribution_is_the_checkout_and_both_fit_on_pypi(tmp_path: Path):
    """Every file that git knows is in it, so that its tests can be run; PyPI takes files of 100 MB."""
    checkout = tmp_path / "checkout"
    subprocess.run(["git", "clone", "--quiet", "--depth", "1", ROOT.as_uri(), str(checkout)], check=True)
    code = "import sys; from setuptools.build_meta import *; out = sys.argv[1]; build_sdist(out); build_wheel(out)"
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=checkout, check=True, capture_output=True)
    (sdist,), (wheel,) = tmp_path.glob("*.tar.gz"), tmp_path.glob("*.whl")
    assert max(sdist.stat().st_size, wheel.stat().st_size) < 100e6
    with tarfile.open(sdist) as file:
        inside = {name.partition("/")[2] for name in file.getnames()}
    listed = subprocess.run(["git", "ls-files"], cwd=checkout, check=True, capture_output=True, text=True).stdout
    assert {name for name in listed.splitlines() if not name.startswith((".ci/", ".gitignore"))} <= inside


def test_pythons_that_are_named_are_those_that_are_tested():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    named = [line.rpartition(" ")[2] for line in project["classifiers"] if re.search(r"Python :: 3\.\d+$", line)]
    jobs = yaml.safe_load((ROOT / ".github" / "workflows" / "tests.yml").read_text(encoding="utf-8"))["jobs"]
    assert named == jobs["fast"]["strategy"]["matrix"]["python"]
    assert project["requires-python"] == f">={named[0]}"


def test_every_extra_that_the_code_asks_for_is_one():
    """A missing package ends in a line with the extra that brings it."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    text = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "cascade").rglob("*.py"))
    asked = re.findall(r"pip install ('?)cascade-diffusion\[(\w+)\]('?)", text)
    assert all(quote == other == "'" for quote, _, other in asked)  # some shells read the brackets as a pattern
    assert {extra for _, extra, _ in asked} == {
        *("dicom", "metrics", "optimizers", "peft", "plot", "quantized", "ray", "studio", "tensorboard", "tiff")
    }
    assert {extra for _, extra, _ in asked} <= extras.keys()


def test_the_bundled_weights_keep_their_sizes():
    """Bytes: the text encoder and all stages, and the judge of the art suite."""
    folder = ROOT / "cascade" / "pretrained"
    stages = ("text_encoder", "base", "sr256", "sr1024", "upscale256")
    for parts, most in ((stages, 90e6), (("tower",), 8e6)):
        files = [path for part in parts for path in (folder / part).rglob("*") if path.is_file()]
        assert files
        assert sum(path.stat().st_size for path in files) <= most
