"""The documents are current: the reference follows the types, every command runs, every file is in the tree."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from PIL import Image

ROOT = Path(__file__).parent.parent


def commands(page: str, language: str = "sh") -> list[str]:
    """The lines of all code blocks of a language."""
    text = (ROOT / page).read_text(encoding="utf-8")
    blocks = re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    return [line for block in blocks for line in block.splitlines() if line.strip()]


def run(command: str, folder: Path) -> None:
    """Run a shell command with this interpreter's `python` and `cascade`."""
    environment = f'export PATH="{Path(sys.executable).parent}:$PATH" HF_HUB_OFFLINE=1; '
    done = subprocess.run(
        ["bash", "-c", environment + command], cwd=folder, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"{command}\n{done.stderr[-2000:]}"


def size(path: Path) -> tuple[int, int]:
    """Width and height of a picture."""
    with Image.open(path) as image:
        return image.size


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A folder that looks like the checkout to a reader of the documents."""
    for name in ("configs", "scripts"):
        shutil.copytree(ROOT / name, tmp_path / name)
    return tmp_path


def script(name: str) -> ModuleType:
    """A script as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # where dataclasses look for their annotations
    spec.loader.exec_module(module)
    return module


def test_the_configuration_reference_follows_the_types():
    reference = script("write_config_reference").reference()
    assert (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8") == reference


def test_the_tree_of_the_architecture_is_that_of_the_files():
    """`python scripts/write_tree.py` writes it again."""
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    assert page == script("write_tree").page()
    assert "`engine.py` The engine: tasks in, pictures out" in page


def test_the_evening_of_the_readme_is_nine_files():
    """That they are there, `test_links_between_documents_lead_somewhere` sees."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    evening = readme.partition("## Read the code in an evening")[2].partition("\n## ")[0]
    files = [ROOT / target for target in re.findall(r"\]\((cascade/[^)]+\.py)\)", evening)]
    assert len(files) == 9
    assert sum(len(file.read_text(encoding="utf-8").splitlines()) for file in files) < 2500


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 110


def test_links_between_documents_lead_somewhere():
    pages = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), ROOT / "cascade" / "pretrained" / "README.md"]
    for page in pages:
        for target in re.findall(r"\]\(([^)#]+)", page.read_text(encoding="utf-8")):
            if "://" not in target:
                assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_every_picture_of_the_documentation_says_how_it_is_drawn():
    """`python scripts/draw_docs.py` lists them."""
    drawings = script("draw_docs").DRAWINGS
    pictures = [picture for drawing in drawings.values() for picture in drawing.pictures]
    assert sorted(pictures) == sorted(path.name for path in (ROOT / "docs").glob("*.png"))
    for drawing in drawings.values():
        assert bool(drawing.draw) != bool(drawing.how)
        page = (ROOT / "docs" / drawing.page).read_text(encoding="utf-8")
        assert all(picture in page for picture in drawing.pictures), drawing.page


@pytest.mark.slow
def test_the_lecture_runs_as_it_stands_and_draws_its_pictures(tmp_path: Path):
    run(f"{sys.executable} {ROOT / 'scripts' / 'draw_docs.py'} lecture --out {tmp_path}", tmp_path)
    drawn = sorted(path.name for path in tmp_path.glob("lecture-*.png"))
    assert len(drawn) == 6
    assert all(size(tmp_path / name)[0] > 400 for name in drawn)


@pytest.mark.slow
def test_the_tutorial_goes_from_pictures_to_a_drawn_picture(checkout: Path):
    for command in commands("docs/tutorial.md"):
        run(command, checkout)
    drawn = sorted((checkout / "drawn").glob("0*.png"))
    assert len(drawn) == 8
    assert {size(path) for path in drawn} == {(64, 64)}


@pytest.mark.slow
def test_the_fine_tuning_tutorial_runs(checkout: Path):
    """With few steps: every command works, the adapter changes what is drawn, and so does the Python."""
    brief = " training.steps=3 'training.optimizer={warmup_steps: 0}' training.batch_size=2"
    for command in commands("docs/fine-tune.md"):
        fewer = brief + " training.prior.count=4" * ("preserved" in command)
        run(command + fewer if command.startswith("cascade train") else command, checkout)
    for name in ("before", "after"):
        assert len(list((checkout / name).glob("0*.png"))) == 2
    before, after = (sorted((checkout / name).glob("0*.png"))[0].read_bytes() for name in ("before", "after"))
    assert before != after
    (checkout / "fine_tune.py").write_text("\n".join(commands("docs/fine-tune.md", "python")), encoding="utf-8")
    run("python fine_tune.py", checkout)
    run("python scripts/draw_fine_tune.py --until 64 --out sheet.png", checkout)
    assert size(checkout / "sheet.png")[0] > 8 * 128


@pytest.mark.slow
def test_the_commands_on_changing_pictures_run(checkout: Path):
    Image.new("RGB", (256, 256), "yellow").save(checkout / "taxi.png")
    Image.linear_gradient("L").point(lambda value: 255 * (value > 200)).save(checkout / "mask.png")
    for command in commands("docs/editing.md"):
        run(command, checkout)
    (checkout / "edit.py").write_text("\n".join(commands("docs/editing.md", "python")), encoding="utf-8")
    run("python edit.py", checkout)
    assert size(checkout / "windows.png") == (256, 256)
    assert size(checkout / "wide.png")[0] > 256


@pytest.mark.slow
def test_the_python_of_the_page_on_batches_runs(checkout: Path):
    (checkout / "batch.py").write_text("\n".join(commands("docs/batch.md", "python")[:7]), encoding="utf-8")
    run("python batch.py", checkout)
    assert len(list((checkout / "more").glob("0*.png"))) == 4


@pytest.mark.slow
def test_the_python_of_the_readme_runs(checkout: Path):
    (checkout / "readme.py").write_text("\n".join(commands("README.md", "python")), encoding="utf-8")
    run("python readme.py", checkout)
    assert (checkout / "my-cascade" / "cascade.json").exists()


@pytest.mark.slow
def test_the_first_command_of_the_readme_draws_1024_pixels(tmp_path: Path):
    (command,) = [line for line in commands("README.md") if line.startswith('cascade generate "a red apple"')]
    run(command, tmp_path)
    assert size(tmp_path / "out" / "000000-a-red-apple-fluent-3d-style.png") == (1024, 1024)
