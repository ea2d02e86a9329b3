"""The recipe of a picture is defined once: a new ingredient appears in every place."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from helpers_model import make_tiny_cascade

import cascade
from cascade import CascadeError
from cascade.config.sampling import SamplingConfig
from cascade.drawing.recipe import Recipe, Region

PACKAGE = Path(cascade.__file__).parent


def recipe(**changes: Any) -> Recipe:
    values = {"prompt": "a fox", "negative_prompt": "", "seed": 7, "number": 0, "height": 8, "width": 8}
    return Recipe(**{**values, "stages": {"base": SamplingConfig(steps=2)}, **changes})


def test_a_recipe_returns_from_its_json() -> None:
    given = recipe(prompt="ключ 🦊", source="ab")
    assert Recipe.from_json(json.loads(json.dumps(given.to_json())), "file") == given


def test_ingredients_at_their_default_are_not_written() -> None:
    assert "source" not in recipe().to_json()
    assert recipe(source="ab").to_json()["source"] == "ab"


CHANGES: list[dict[str, Any]] = [
    {"prompt": "a box"},
    {"negative_prompt": "red"},
    {"seed": 8},
    {"number": 1},
    {"height": 16},
    {"width": 16},
    {"source": "ab"},
    {"image": "ab"},
    {"mask": "ab"},
    {"strength": {"base": 0.5}},
    {"resampling": 2},
    {"variation": 0.5},
    {"variation_seed": 3},
    {"variation_noise": "all"},
    {"known": "clean"},
    {"long_prompts": "chunk"},
    {"language": True},
    {"regions": (Region(prompt="a box", box=(0.0, 0.0, 0.5, 1.0)),)},
    {"adapters": {"base": {"ab": 0.8}}},
    {"conditions": {"age": 41.0, "shape": "star", "layout": None}},
    {"stages": {"base": SamplingConfig(steps=3)}},
    {"stages": {"sr16": SamplingConfig(steps=2)}},
]


def test_every_ingredient_is_tried_below() -> None:
    assert {name for change in CHANGES for name in change} == set(Recipe.model_fields)


@pytest.mark.parametrize("change", CHANGES, ids=str)
def test_another_ingredient_is_another_digest(change: dict[str, Any]) -> None:
    other = recipe(**change)
    assert other.digest() != recipe().digest()
    line = {"index": 3, **other.to_json(), "settings": {**other.to_json()["settings"], "device": "cpu"}}
    assert Recipe.digest_of(line) == other.digest(), "what else a line says does not count"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"prompt": 3}, "out.png: prompt: should be a valid string, not 3"),
        ({"seed": "x"}, "out.png: seed: should be a valid integer"),
        ({"settings": {"height": 8, "width": 8, "stages": {"base": {"stps": 2}}}}, "did you mean stages.base.steps?"),
        ({"settings": None}, "out.png: height is missing"),
    ],
)
def test_a_recipe_that_is_none_is_refused_by_name(line: dict[str, Any], message: str) -> None:
    with pytest.raises(CascadeError, match=r"^out\.png") as caught:
        Recipe.from_json({**recipe().to_json(), **line}, "out.png")
    assert message in str(caught.value)


SPICED = """
import json, sys
from pathlib import Path
from PIL import Image
from cascade.batch.plan import Target
from cascade.cli.program import main
from cascade.drawing.task import Shelf

plain, spice = Target.recipe.func, "hot"
Target.recipe = property(lambda target: plain(target).model_copy(update={"spice": spice}))
kept = []
put = Shelf.put
Shelf.put = lambda shelf, key, pixels: (kept.append(key), put(shelf, key, pixels))
model, out = sys.argv[1:]
call = ["generate", "a fox", "--model", model, "--out", out, "--seed", "7", "--until", "16", "--device", "cpu"]
assert main(call) == 0
line = json.loads((Path(out) / "manifest.jsonl").read_text())
picture = str(Path(out) / line["file"])
assert main(["generate", "--from-image", picture, "--model", model, "--out", out + "/again"]) == 0
first = kept[0]
spice = "mild"
refused = main(call)
print(json.dumps({
    "manifest": line["spice"],
    "png": Image.open(picture).text["spice"],
    "same bytes": Path(picture).read_bytes() == (Path(out) / "again" / line["file"]).read_bytes(),
    "same shelf": first[:32] == kept[1][:32],
    "refused": refused,
}))
"""


def test_a_made_up_ingredient_is_added_in_one_place_and_seen_in_all(tmp_path: Path) -> None:
    shutil.copytree(PACKAGE, tmp_path / "cascade", ignore=shutil.ignore_patterns("pretrained", "__pycache__"))
    place = tmp_path / "cascade/drawing/recipe.py"
    source = place.read_text()
    place.write_text(source.replace('    source: str = ""\n', '    spice: str = "none"\n    source: str = ""\n', 1))
    assert place.read_text() != source
    (tmp_path / "spiced.py").write_text(SPICED)
    model = make_tiny_cascade(tmp_path / "tiny")
    done = subprocess.run(
        [sys.executable, "spiced.py", model, str(tmp_path / "out")],
        cwd=tmp_path, env={"PYTHONPATH": str(tmp_path), "PATH": ""}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == {
        "manifest": "hot", "png": "hot", "same bytes": True, "same shelf": True, "refused": 2,
    }  # fmt: skip
    assert "was drawn from another prompt, seed or settings" in done.stderr
