"""Prompts through all stages: the inputs that a picture depends on, and those that it does not."""

from __future__ import annotations

import json
import re
import weakref
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers_model import RESOLUTIONS, STAGES, make_tiny_cascade, tiny_configs, tiny_stage
from torch import Tensor

from cascade import CascadeError, CascadePipeline, Stage
from cascade.batch.metadata import model_identity
from cascade.drawing.slots import StageSlot
from cascade.evaluation.report import Request, draw, draw_stages
from cascade.storage.index import read_index
from cascade.storage.pipeline import assemble
from cascade.text.language import Styles

LONG = "a blue star and two green circles of the fox style"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_cascade(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def pipeline(model: Path) -> CascadePipeline:
    return CascadePipeline.from_pretrained(model, device="cpu")


def pixels(pipeline: CascadePipeline, *arguments: Any, **options: Any) -> dict[int, list[bytes]]:
    """The bytes of every picture, by resolution."""
    result = pipeline(*arguments, **{"seed": 1, **options})
    return {resolution: [image.tobytes() for image in images] for resolution, images in result.stages.items()}


def estimates(pipeline: CascadePipeline, prompts: str | Sequence[str], **options: Any) -> list[Tensor]:
    """Every x_hat on the way: float32, so that a difference in the last bit shows."""
    seen: list[Tensor] = []
    pipeline(prompts, seed=1, callback=lambda _stage, _step, _steps, x_hat: seen.append(x_hat.clone()), **options)
    return seen


# --- sameness ----------------------------------------------------------------------------------------------


def test_the_same_seed_gives_the_same_bytes_and_another_seed_others(pipeline: CascadePipeline) -> None:
    first, second, other = (pixels(pipeline, "a red apple", seed=seed) for seed in (1, 1, 2))
    assert first == second
    assert all(first[resolution] != other[resolution] for resolution in RESOLUTIONS)


def test_the_prompt_matters_in_every_stage(pipeline: CascadePipeline) -> None:
    apple, fox = (pixels(pipeline, prompt) for prompt in ("a red apple", "a fox"))
    assert all(apple[resolution] != fox[resolution] for resolution in RESOLUTIONS)


def test_other_prompts_in_the_call_change_no_bit_at_batch_size_1(pipeline: CascadePipeline) -> None:
    alone = estimates(pipeline, "a red apple")
    together = estimates(pipeline, ["a red apple", LONG])
    steps = len(alone) // len(STAGES)
    first = [together[2 * steps * stage + step] for stage in range(len(STAGES)) for step in range(steps)]
    assert all(torch.equal(one, other) for one, other in zip(alone, first, strict=True))


def test_a_short_last_batch_is_padded_so_that_place_and_company_do_not_matter(pipeline: CascadePipeline) -> None:
    three = pixels(pipeline, ["a fox", LONG, "a red apple"], batch_size=2)
    one = pixels(pipeline, "a red apple", batch_size=2)
    assert {resolution: images[2] for resolution, images in three.items()} == {
        resolution: images[0] for resolution, images in one.items()
    }


def test_pictures_of_one_prompt_differ_and_do_not_depend_on_how_many_there_are(pipeline: CascadePipeline) -> None:
    two, three = (pixels(pipeline, "a fox", num_images_per_prompt=count)[RESOLUTIONS[-1]] for count in (2, 3))
    assert two == three[:2]
    assert len(set(three)) == 3


def test_embeddings_in_place_of_a_prompt_give_the_same_bytes(pipeline: CascadePipeline) -> None:
    embeds = pipeline.text_encoder.encode(["a red apple"])
    assert pixels(pipeline, prompt_embeds=embeds) == pixels(pipeline, "a red apple")


def test_a_saved_and_loaded_cascade_gives_the_same_bytes(pipeline: CascadePipeline, tmp_path: Path) -> None:
    pipeline.save_pretrained(tmp_path / "again")
    again = CascadePipeline.from_pretrained(tmp_path / "again", device="cpu")
    assert (again.name, again.license) == ("tiny", "CC0-1.0")
    assert pixels(again, "a red apple") == pixels(pipeline, "a red apple")


def test_seeds_are_one_for_each_prompt_or_drawn_and_reported(pipeline: CascadePipeline) -> None:
    both = pixels(pipeline, ["a fox", "a fox"], seed=[1, 2], until=8)[8]
    assert both == [pixels(pipeline, "a fox", seed=seed, until=8)[8][0] for seed in (1, 2)]
    drawn = pipeline("a fox", until=8)
    assert pixels(pipeline, "a fox", seed=drawn.seeds[0], until=8)[8] == [drawn.images[0].tobytes()]


# --- low memory --------------------------------------------------------------------------------------------


def test_low_memory_gives_the_same_bytes_again_and_again(pipeline: CascadePipeline, model: Path) -> None:
    frugal = CascadePipeline.from_pretrained(model, device="cpu", low_memory=True)
    for prompt in ("a red apple", "a fox"):
        assert pixels(frugal, prompt) == pixels(pipeline, prompt)


def test_with_low_memory_no_two_stages_are_there_at_once_and_the_text_encoder_is_not(model: Path) -> None:
    frugal = CascadePipeline.from_pretrained(model, device="cpu", low_memory=True)
    alive: list[weakref.ref[Stage]] = []
    released = []

    def watched(slot: StageSlot) -> StageSlot:
        def load() -> Stage:
            assert not [reference for reference in alive if reference() is not None]
            released.append(frugal.text_encoder._model is None)
            stage = slot.load()
            alive.append(weakref.ref(stage))
            return stage

        return StageSlot(slot.config, load)

    frugal.slots = [watched(slot) for slot in frugal.slots]
    frugal("a fox", seed=1)
    assert len(alive) == len(STAGES)
    assert all(released)


# --- arguments ---------------------------------------------------------------------------------------------


def test_until_stops_after_the_stage_of_that_size(pipeline: CascadePipeline) -> None:
    result = pipeline("a fox", seed=1, until=16)
    assert list(result.stages) == [8, 16]
    assert result.images[0].size == (16, 16)
    assert result.images[0].tobytes() == pixels(pipeline, "a fox")[16][0]


def test_per_stage_settings_reach_the_stage_that_they_name(pipeline: CascadePipeline) -> None:
    seen: list[tuple[str, int, int]] = []

    def note(stage: str, step: int, steps: int, _x_hat: Tensor) -> None:
        seen.append((stage, step, steps))

    pipeline("a fox", seed=1, steps={"base": 3, "sr32": 1}, callback=note)
    assert seen == [*(("base", step, 3) for step in range(3)), ("sr16", 0, 2), ("sr16", 1, 2), ("sr32", 0, 1)]
    seen.clear()
    pipeline("a fox", seed=1, preset="fast", steps={"base": 2}, callback=note)
    assert [(stage, steps) for stage, _, steps in seen] == [("base", 2), ("base", 2), ("sr16", 1), ("sr32", 1)]


@pytest.mark.parametrize(
    ("changes", "first_changed"),
    [
        ({"guidance": {"sr16": 3.0}}, 16),
        ({"sampler": {"base": "ddpm"}}, 8),
        ({"aug_level": {"sr32": 0.5}}, 32),
        ({"aug_level": 0.5}, 16),
        ({"threshold": {"base": "none"}}, 8),
        ({"negative_prompt": "a blue square"}, 8),
    ],
)
def test_a_setting_changes_its_own_stage_and_what_follows(
    pipeline: CascadePipeline, changes: dict[str, Any], first_changed: int
) -> None:
    plain, changed = pixels(pipeline, "a fox"), pixels(pipeline, "a fox", **changes)
    assert [size for size in RESOLUTIONS if plain[size] != changed[size]] == [
        size for size in RESOLUTIONS if size >= first_changed
    ]


def test_a_negative_prompt_for_each_prompt_is_its_own(pipeline: CascadePipeline) -> None:
    both = pixels(pipeline, ["a fox", "a fox"], negative_prompt=["", "a star"], until=8)[8]
    assert both == [pixels(pipeline, "a fox", negative_prompt=text, until=8)[8][0] for text in (None, "a star")]


def test_height_and_width_are_those_of_the_last_stage(pipeline: CascadePipeline) -> None:
    result = pipeline("a fox", seed=1, height=40, width=24)
    assert {resolution: images[0].size for resolution, images in result.stages.items()} == {
        8: (6, 10),
        16: (12, 20),
        32: (24, 40),
    }


def test_output_types_hold_the_same_numbers(pipeline: CascadePipeline) -> None:
    pil, array, tensor = (pipeline("a fox", seed=1, output_type=kind).images for kind in ("pil", "np", "pt"))
    assert array.shape == (1, 32, 32, 3)
    assert pil[0].tobytes() == array[0].tobytes()
    assert torch.equal(tensor, torch.from_numpy(array).permute(0, 3, 1, 2).float() / 127.5 - 1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompt": []}, "list is empty"),
        ({"prompt": None}, "either prompt or prompt_embeds"),
        ({"prompt": "a", "seed": [1, 2]}, "2 seeds for 1 prompts"),
        ({"prompt": "a", "until": 12}, "no stage draws 12 px; choose one of 8, 16, 32"),
        ({"prompt": "a", "height": 30}, "height: 30 is not possible; expected a multiple of 8"),
        ({"prompt": "a", "height": 0}, "height: 0 is not possible"),
        ({"prompt": "a", "batch_size": 0}, "batch_size: 0; expected at least 1"),
        ({"prompt": "a", "num_images_per_prompt": 0}, "num_images_per_prompt: 0"),
        ({"prompt": "a", "negative_prompt": ["a", "b"]}, "2 for 1 prompts"),
        ({"prompt": "a", "steps": {"bse": 3}}, "no stage is called 'bse'.*did you mean base"),
        ({"prompt": "a", "preset": "slow"}, "expected one of fast, default, best"),
        ({"prompt": "a", "output_type": "tf"}, "expected \"pil\", \"np\" or \"pt\""),
    ],
)  # fmt: skip
def test_an_argument_that_does_not_fit_is_named(
    pipeline: CascadePipeline, arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(CascadeError, match=message):
        pipeline(**arguments)


# --- saving and assembling ---------------------------------------------------------------------------------


def test_saving_replaces_a_cascade_but_nothing_else(pipeline: CascadePipeline, tmp_path: Path) -> None:
    pipeline.save_pretrained(tmp_path / "cascade")
    pipeline.save_pretrained(tmp_path / "cascade")
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter1.txt").write_text("the only copy")
    with pytest.raises(CascadeError, match="holds other files"):
        pipeline.save_pretrained(tmp_path / "thesis")
    assert (tmp_path / "thesis" / "chapter1.txt").read_text() == "the only copy"


@pytest.fixture(scope="module")
def styled(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model, of two styles, one of them its default."""
    pipeline = CascadePipeline.from_pretrained(model, device="cpu")
    pipeline.styles = Styles(("fox style", "box style"), "fox style")
    pipeline.save_pretrained(folder := tmp_path_factory.mktemp("styled") / "model")
    return folder


def test_a_model_s_default_style_is_the_style_words_in_the_prompt(pipeline: CascadePipeline, styled: Path) -> None:
    own = CascadePipeline.from_pretrained(styled, device="cpu")
    drawn = own("a red apple", seed=1)
    assert drawn.prompts == ["a red apple, fox style"]
    assert pixels(own, "a red apple") == pixels(pipeline, "a red apple, fox style")
    for other in ({"default_style": "none"}, {"prompt_language": True}):
        assert pixels(own, "a red apple", **other) == pixels(pipeline, "a red apple")
    assert pixels(own, "a Box Style apple") == pixels(pipeline, "a Box Style apple")
    assert pixels(pipeline, "a red apple", default_style="box style") == pixels(pipeline, "a red apple, box style")
    assert pixels(own, ["", "a star"]) == pixels(pipeline, ["", "a star, fox style"])


def test_a_suite_draws_its_prompts_without_a_default_style(pipeline: CascadePipeline, styled: Path) -> None:
    own = CascadePipeline.from_pretrained(styled, device="cpu")
    for one in (own, pipeline):
        (picture,) = draw(one, ["a red apple"], Request(seed=0))
        (again,) = draw_stages(one, ["a red apple"], Request(seed=0), {8: 1})[8]
        assert picture.tobytes() == again.tobytes() == draw(pipeline, ["a red apple"], Request(seed=0))[0].tobytes()


def test_the_default_style_is_kept_by_saving_and_is_part_of_the_model_s_identity(model: Path, styled: Path) -> None:
    assert read_index(styled).styles == Styles(("fox style", "box style"), "fox style")
    assert "styles" not in json.loads((model / "cascade.json").read_text())
    before, named = model_identity(read_index(styled)), read_index(styled)
    assert model_identity(replace(named, styles=Styles(("box style",), "box style"))) != before
    words_alone = replace(read_index(model), styles=Styles(("box style",)))
    assert model_identity(words_alone) == model_identity(read_index(model)), "they change no picture"


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ([], r"styles: \[\]; expected a section with words and default"),
        ({"defaults": "a"}, "styles: .*defaults.*; expected a section with words and default"),
        ({"words": "a"}, "styles.words: 'a'; expected a list of style words"),
        ({"words": [""]}, "styles.words: .*; expected a list of style words"),
        ({"default": 3}, "styles.default: 3; expected style words, or leave it out"),
    ],
)
def test_wrong_style_words_of_a_folder_are_named(model: Path, tmp_path: Path, section: object, message: str) -> None:
    index = json.loads((model / "cascade.json").read_text())
    (tmp_path / "cascade.json").write_text(json.dumps({**index, "styles": section}))
    with pytest.raises(CascadeError, match=f"cascade.json: {message}"):
        read_index(tmp_path)


def test_super_resolution_stages_can_be_exchanged(pipeline: CascadePipeline, model: Path) -> None:
    mixed = CascadePipeline.from_pretrained(model, device="cpu", super_resolution=[f"{model}/sr16"])
    assert mixed.stage_names == ["base", "sr16"]
    assert pixels(mixed, "a fox")[16] == pixels(pipeline, "a fox")[16]


def test_assembled_stages_are_the_cascade_that_they_came_from(pipeline: CascadePipeline, model: Path) -> None:
    again = assemble(
        model / "text_encoder", [model / name for name in STAGES], name="again", license="CC0-1.0", max_length=48
    )
    assert pixels(again, "a fox") == pixels(pipeline, "a fox")


@pytest.mark.parametrize(
    ("order", "message"),
    [
        ((0, 2), "sr32 starts from 16 px, but stage base before it draws 8 px"),
        ((1, 2), "the first stage must be a base stage"),
        ((0, 1, 1), "every stage needs a different name"),
        ((), "at least one stage"),
    ],
)
def test_stages_that_do_not_chain_are_refused(pipeline: CascadePipeline, order: Sequence[int], message: str) -> None:
    configs = tiny_configs()
    with pytest.raises(CascadeError, match=message):
        CascadePipeline(pipeline.text_encoder, [tiny_stage(configs[index]) for index in order])


# --- the caller's own types ---------------------------------------------------------------------------------


def test_numpy_numbers_mean_what_plain_numbers_mean(pipeline: CascadePipeline) -> None:
    plain = pixels(pipeline, "a fox", seed=1, steps=1, guidance=2.0)
    for seed in (np.int64(1), [np.int64(1)], np.array([1]), True):
        assert pixels(pipeline, "a fox", seed=seed, steps=np.int64(1), guidance=np.float32(2)) == plain


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompt": 5}, "prompt: 5 is not text"),
        ({"prompt": ["a", None]}, "prompt: None is not text"),
        ({"negative_prompt": [None]}, "negative_prompt: None is not text"),
        ({"seed": 1.5}, "seed: 1.5; expected a whole number"),
        ({"seed": "1"}, "seed: '1'"),
        ({"seed": [None]}, "seed: None; expected a whole number"),
        ({"seed": -1}, "seed: -1; expected a whole number in 0.."),
        ({"seed": 2**63}, "expected a whole number in 0.."),
        ({"num_images_per_prompt": 2.0}, "num_images_per_prompt: 2.0; expected a whole number"),
        ({"batch_size": "2"}, "batch_size: '2'; expected a whole number"),
        ({"height": 32.0}, "height: 32.0; expected a whole number"),
        ({"steps": {1: 2}}, "no stage is called 1"),
        ({"prompt": None, "prompt_embeds": torch.zeros(1, 2, 32)}, "prompt_embeds: expected TextEmbeddings"),
    ],
    ids=str,
)
def test_an_argument_of_the_wrong_kind_is_named(
    pipeline: CascadePipeline, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(CascadeError, match=re.escape(message)):
        pipeline(**{"prompt": "a fox", **options})


def test_a_wrong_output_type_is_refused_before_anything_is_drawn(pipeline: CascadePipeline) -> None:
    with pytest.raises(CascadeError, match="output_type: 'jpeg'"):
        estimates(pipeline, "a fox", output_type="jpeg", steps={"base": -1})


def test_moving_a_cascade_also_moves_stages_that_are_loaded_later(model: Path) -> None:
    held, lazy = (CascadePipeline.from_pretrained(model, device="cpu", low_memory=low) for low in (False, True))
    expected = pixels(held.to(dtype=torch.bfloat16), "a fox")
    assert pixels(lazy.to(dtype=torch.bfloat16), "a fox") == expected
    assert lazy.slots[0].load().network.stem.weight.dtype == torch.bfloat16


def test_one_super_resolution_stage_needs_no_list(model: Path) -> None:
    for source in (model / "sr16", str(model / "sr16")):
        assert CascadePipeline.from_pretrained(model, super_resolution=source).stage_names == ["base", "sr16"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": torch.int8}, "dtype: 'int8'"),
        ({"dtype": torch.float16}, "needs a GPU"),
        ({"device": "meta"}, "device: meta"),
    ],
    ids=["int8", "float16", "meta"],
)
def test_formats_and_devices_that_cannot_draw_are_refused(model: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(CascadeError, match=message):
        CascadePipeline.from_pretrained(model, **({"device": "cpu"} | options))


@pytest.mark.parametrize("options", [{"height": 1 << 16, "width": 1 << 16}, {"batch_size": 10**7}], ids=str)
def test_what_cannot_fit_into_memory_is_refused_before_noise_is_drawn(
    pipeline: CascadePipeline, monkeypatch: pytest.MonkeyPatch, options: dict[str, int]
) -> None:
    monkeypatch.setattr("cascade.drawing.batches.noise_like", None)
    with pytest.raises(CascadeError, match=r"^out of memory in stage base: needs more than .* GB, .* GB are free; use"):
        pipeline("a fox", **options)


def test_a_cascade_made_by_hand_has_the_device_and_format_of_its_stages(pipeline: CascadePipeline) -> None:
    stages = [tiny_stage(config).to(dtype=torch.bfloat16) for config in tiny_configs()]
    by_hand = CascadePipeline(pipeline.text_encoder, stages)
    assert (by_hand.device, by_hand.dtype) == (torch.device("cpu"), torch.bfloat16)


def test_a_preset_that_no_stage_defines_is_refused_and_default_is_not(pipeline: CascadePipeline) -> None:
    with pytest.raises(CascadeError, match="no stage of this cascade defines 'best'"):
        pipeline("a fox", preset="best")
    assert pixels(pipeline, "a fox", preset="default", until=8) == pixels(pipeline, "a fox", until=8)
