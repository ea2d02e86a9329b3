"""Pictures that follow several prompts: weights, phases, composed prompts and regions, from Python to a restart."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers_model import make_tiny_cascade
from PIL import Image

from cascade import CascadeError, CascadePipeline
from cascade.cli.program import main
from cascade.config.sampling import SamplingConfig
from cascade.drawing.edit import region_mask
from cascade.drawing.recipe import Recipe, Region
from cascade.drawing.texts import layered


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_cascade(tmp_path_factory.mktemp("m") / "tiny")


@pytest.fixture(scope="module")
def pipeline(model: Path) -> CascadePipeline:
    return CascadePipeline.from_pretrained(model, device="cpu")


def drawn(pipeline: CascadePipeline, prompt: Any = "a fox", **arguments: Any) -> np.ndarray[Any, Any]:
    return np.asarray(pipeline(prompt, seed=3, output_type="np", **arguments).images[0])


def in_language(pipeline: CascadePipeline, prompt: str, **arguments: Any) -> np.ndarray[Any, Any]:
    return drawn(pipeline, prompt, prompt_language=True, **arguments)


# --- the prompt language ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prompt", ["a fox", "(a fox:1)", "[a box:a fox:0]", "[a fox:a box:1]"])
def test_a_prompt_that_comes_to_a_plain_one_draws_the_same_bytes(pipeline: CascadePipeline, prompt: str) -> None:
    assert np.array_equal(in_language(pipeline, prompt), drawn(pipeline))


def test_without_the_language_brackets_are_letters(pipeline: CascadePipeline) -> None:
    plain = drawn(pipeline, "a (red:1.5) fox")
    assert np.array_equal(plain, in_language(pipeline, r"a \(red\:1.5\) fox"))
    assert not np.array_equal(plain, in_language(pipeline, "a (red:1.5) fox"))


def test_a_word_counts_from_its_share_of_the_steps_on(pipeline: CascadePipeline) -> None:
    """With 2 steps a share of 0.5 is the second: until there both prompts' x_hat agree."""
    seen: dict[str, list[torch.Tensor]] = {}
    for prompt in ("a fox", "[a fox:a red box:0.5]", "a red box"):
        seen[prompt] = []
        pipeline(
            prompt,
            seed=3,
            prompt_language=True,
            until=8,
            callback=lambda _s, _i, _n, x, p=prompt: seen[p].append(x.clone()),
        )
    first, mixed, last = seen.values()
    assert torch.allclose(first[0], mixed[0], atol=1e-5)
    assert not torch.allclose(first[1], mixed[1], atol=1e-3)
    assert not torch.allclose(last[0], mixed[0], atol=1e-3)


def test_a_prompt_composed_with_itself_is_itself_with_the_sum_of_the_weights(pipeline: CascadePipeline) -> None:
    arguments = {"until": 8, "guidance": 2.0}
    twice = in_language(pipeline, "a fox:0.7 AND a fox:0.3", **arguments)
    assert np.abs(twice.astype(int) - drawn(pipeline, **arguments)).max() <= 1  # the sum differs in its last bits
    strong = in_language(pipeline, "a fox:1.5 AND a fox:0.5", **arguments)
    assert np.abs(strong.astype(int) - drawn(pipeline, until=8, guidance=4.0)).max() <= 1


def test_the_negative_prompt_has_the_same_language(pipeline: CascadePipeline) -> None:
    plain = in_language(pipeline, "a fox", negative_prompt="red")
    assert np.array_equal(plain, in_language(pipeline, "a fox", negative_prompt="[blue:red:0]"))
    assert not np.array_equal(plain, in_language(pipeline, "a fox", negative_prompt="(red:1.5)"))


def test_pictures_with_different_scripts_do_not_change_each_other(pipeline: CascadePipeline) -> None:
    prompts = ["a fox", "a box:1.5 AND a fox:0.5", "[a:b:0.5] fox", "red:1.2 AND blue:0.8", "a (fox:1.3)"]
    together = pipeline(prompts, seed=3, output_type="np", prompt_language=True, batch_size=2).images
    for prompt, picture in zip(prompts, together, strict=True):
        alone = pipeline(prompt, seed=3, output_type="np", prompt_language=True, batch_size=2).images[0]
        assert np.array_equal(alone, picture), prompt


def test_embeddings_have_no_language(pipeline: CascadePipeline) -> None:
    embeds = pipeline.encode(["a fox"])
    with pytest.raises(CascadeError, match="prompt_embeds"):
        pipeline(prompt_embeds=embeds, prompt_language=True)


# --- regions ---------------------------------------------------------------------------------------------------------


def test_layers_add_up_to_one_and_the_later_lies_above() -> None:
    masks = [torch.rand(4, 5, generator=torch.Generator().manual_seed(seed)) for seed in range(3)]
    masks[2][0, 0] = 1
    weights = layered(masks)
    torch.testing.assert_close(sum(weights), torch.ones(4, 5))
    assert [float(weight[0, 0]) for weight in weights] == [0, 0, 0, 1]


@pytest.mark.parametrize("size", [(8, 8), (64, 32), (7, 9)])
def test_a_box_covers_its_share_of_the_picture_at_any_size(size: tuple[int, int]) -> None:
    region = Region(prompt="x", box=(0.13, 0.25, 0.61, 1.0))
    mask = region_mask(region, {}, size)
    assert tuple(mask.shape) == size
    assert float(mask.mean()) == pytest.approx(0.48 * 0.75, abs=1e-6)


def test_a_region_over_the_whole_picture_is_its_prompt(pipeline: CascadePipeline) -> None:
    whole = drawn(pipeline, "a box", regions=[((0, 0, 1, 1), "a fox")], until=8)
    assert np.abs(whole.astype(int) - drawn(pipeline, until=8)).max() <= 1  # the sum differs in its last bits


def test_a_box_and_its_mask_draw_the_same_picture(pipeline: CascadePipeline) -> None:
    mask = np.zeros((8, 8), dtype=np.uint8)
    mask[:, :4] = 255
    box = drawn(pipeline, regions=["0,0,0.5,1: a red box"], until=8)
    assert np.array_equal(box, drawn(pipeline, regions=[(mask, "a red box")], until=8))
    assert not np.array_equal(box, drawn(pipeline, until=8))


@pytest.mark.parametrize(
    "given", ["0,0,0.5: a", "0,0,2,1: a", "0.5,0,0.2,1: a", "a red ring", "0,0,1,1:", "none.png: a"]
)
def test_a_wrong_region_is_one_line(pipeline: CascadePipeline, given: str) -> None:
    with pytest.raises(CascadeError) as caught:
        drawn(pipeline, regions=[given])
    assert "\n" not in str(caught.value)


# --- commands, files and restarts ----------------------------------------------------------------------------------


def run(model: Path, out: Path, *arguments: str) -> int:
    return main(["generate", "--model", str(model), "--out", str(out), "--device", "cpu", "--seed", "5", *arguments])


def test_a_picture_with_a_script_is_drawn_again_from_its_metadata(model: Path, tmp_path: Path) -> None:
    Image.new("L", (16, 16), 255).crop((0, 0, 16, 16)).save(tmp_path / "m.png")
    regions = ["--region", "0,0,0.5,1: a (red:1.2) box", "--region", f"{tmp_path / 'm.png'}: snow"]
    assert run(model, tmp_path / "a", "a fox AND a box:0.5", "--prompt-language", *regions) == 0
    (picture,) = (tmp_path / "a").glob("*.png")
    again = [
        "generate",
        "--model",
        str(model),
        "--out",
        str(tmp_path / "b"),
        "--device",
        "cpu",
        "--from-image",
        str(picture),
    ]
    assert main([*again, *regions]) == 0
    assert (tmp_path / "b" / picture.name).read_bytes() == picture.read_bytes()
    assert main(again) == 2  # the mask is missing


def test_a_prompt_file_has_a_column_of_regions_and_a_wrong_prompt_fails_alone(model: Path, tmp_path: Path) -> None:
    lines = [
        {"prompt": "a fox", "regions": ["0,0,0.5,1: a box"]},
        {"prompt": "a (fox"},
        {"prompt": "a (fox)"},
    ]
    (tmp_path / "p.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    (tmp_path / "p.csv").write_text('prompt,regions\na fox,"0,0,0.5,1: a box"\n')
    assert run(model, tmp_path / "a", "--prompts", str(tmp_path / "p.jsonl"), "--prompt-language") == 1
    said = [json.loads(line) for line in (tmp_path / "a" / "manifest.jsonl").read_text().splitlines()]
    assert {line["prompt"] for line in said} == {"a fox", "a (fox)"}
    assert "^" in (tmp_path / "a" / "failures.jsonl").read_text()
    recipe = Recipe.from_json(said[0], "manifest")
    assert recipe.regions == (Region(prompt="a box", box=(0.0, 0.0, 0.5, 1.0)),)
    assert run(model, tmp_path / "b", "--prompts", str(tmp_path / "p.csv"), "--prompt-language") == 0
    (one,), (other, *_) = (sorted((tmp_path / name).glob("*.png")) for name in "ba")
    assert one.read_bytes() == other.read_bytes()


def test_a_run_with_another_region_is_another_run(model: Path, tmp_path: Path) -> None:
    assert run(model, tmp_path / "a", "a fox", "--region", "0,0,0.5,1: a box") == 0
    before = [path.read_bytes() for path in (tmp_path / "a").glob("*.png")]
    assert run(model, tmp_path / "a", "a fox", "--region", "0,0,0.5,1: a box") == 0
    assert [path.read_bytes() for path in (tmp_path / "a").glob("*.png")] == before
    assert run(model, tmp_path / "a", "a fox", "--region", "0,0,0.6,1: a box") == 2  # refused: another picture
    assert [path.read_bytes() for path in (tmp_path / "a").glob("*.png")] == before


# --- settings of guidance --------------------------------------------------------------------------------------------


def test_settings_of_guidance_that_are_off_are_not_written() -> None:
    """So that recipes of pictures from before them stay the same."""
    assert (
        not {"guidance_rescale", "guidance_schedule", "projection", "autoguidance"}
        & SamplingConfig().model_dump().keys()
    )
    changed = SamplingConfig.model_validate_json(
        '{"guidance_schedule": [[-5, 0.5], [2, 1]], "guidance_rescale": 0.7, "autoguidance": 2}'
    )
    assert SamplingConfig.model_validate_json(changed.model_dump_json()) == changed
    assert changed.guidance_schedule == ((-5, 0.5), (2, 1))


@pytest.mark.parametrize(
    "wrong", [{"guidance_schedule": ()}, {"guidance_schedule": ((1.0, 1.0), (0.0, 1.0))}, {"guidance_rescale": 1.5}]
)
def test_wrong_settings_of_guidance_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="guidance"):
        SamplingConfig(**wrong)


def test_rules_of_guidance_are_settings_of_a_call_and_of_a_command(
    model: Path, pipeline: CascadePipeline, tmp_path: Path
) -> None:
    plain = drawn(pipeline, until=8, guidance=4.0)
    projected = drawn(pipeline, until=8, guidance=4.0, projection={"parallel": 0.0})
    assert not np.array_equal(projected, plain)
    assert np.array_equal(drawn(pipeline, until=8, guidance=4.0, projection={"base": {"parallel": 0.0}}), projected)
    assert np.abs(drawn(pipeline, until=8, guidance=4.0, projection={"parallel": 1.0}).astype(int) - plain).max() <= 1
    rescaled = drawn(pipeline, until=8, guidance=4.0, guidance_rescale=1.0)
    assert not np.array_equal(rescaled, plain)
    command = ["--until", "8", "--guidance", "4", "--projection", "0", "--seed", "3"]
    assert run(model, tmp_path / "a", "a fox", *command) == 0
    (picture,) = (tmp_path / "a").glob("*.png")
    assert np.array_equal(np.asarray(Image.open(picture)), projected)
    redraw = ["generate", "--model", str(model), "--out", str(tmp_path / "b"), "--device", "cpu"]
    assert main([*redraw, "--from-image", str(picture)]) == 0


def test_a_run_shows_a_mistake_in_a_prompt_with_a_caret_under_its_place(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = make_tiny_cascade(tmp_path / "model")
    words = ["--model", str(folder), "--prompt-language", "--seed", "1", "--out", str(tmp_path / "out")]
    assert main(["generate", "a (red fox", *words]) == 1
    shown = capsys.readouterr().err.splitlines()
    place = shown.index("  a (red fox")
    assert shown[place + 1].index("^") == shown[place].index("(")
