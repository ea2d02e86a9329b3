"""Settings of samplers: sections made from their functions, names as shorthand, and files of earlier versions."""

from __future__ import annotations

import ast
import pickle
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import pytest
import torch
from torch import Tensor

import cascade
from cascade.batch.manifest import made_by
from cascade.config.sampling import SECTIONS, PresetConfig, SamplingConfig, section, with_sampler_section
from cascade.config.stage import StageConfig
from cascade.diffusion.noise import Denoiser
from cascade.diffusion.samplers import SAMPLERS, Generators, OnStep, Option
from cascade.drawing.arguments import resolve_sampling
from cascade.errors import CascadeError
from cascade.models.unet import UNetConfig
from cascade.settings import parse
from cascade.stage import build_stage

PACKAGE = Path(cascade.__file__).parent
STOCHASTIC = {"kind": "ddim", "eta": 0.5}


def sampling(**values: Any) -> SamplingConfig:
    return parse(SamplingConfig, values, "here")


def stage(**values: Any) -> StageConfig:
    network = UNetConfig(channels=(8,), blocks=(1,), strides=(1,), attention=(False,), norm="pixel", text="none")
    return StageConfig(name="base", resolution=8, model=network, **values)


def chosen(config: StageConfig, sampler: Any, preset: str | None = None) -> Any:
    """The sampler that a call draws with, as plain data."""
    settings = resolve_sampling([config], preset, {"sampler": sampler})["base"]
    return settings.model_dump(mode="json")["sampler"]


# --- sections ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", SAMPLERS)
def test_a_name_is_the_section_with_its_defaults_and_how_that_is_written(kind: str) -> None:
    assert sampling(sampler=kind) == sampling(sampler={"kind": kind})
    assert sampling(sampler={"kind": kind}).model_dump(mode="json")["sampler"] == kind


def test_a_section_with_other_settings_is_written_whole_and_read_back() -> None:
    written = sampling(sampler=STOCHASTIC).model_dump(mode="json")
    assert written["sampler"] == STOCHASTIC
    assert sampling(**written).sampler.own == {"eta": 0.5}


@pytest.mark.parametrize("kind", SAMPLERS)
def test_a_section_survives_the_way_into_another_process(kind: str) -> None:
    config = SamplingConfig(sampler=SECTIONS[kind](kind=kind))
    assert pickle.loads(pickle.dumps(config)) == config


def sample_toy(
    denoise: Denoiser,
    z: Tensor,
    log_snrs: Tensor,
    rng: Generators,
    on_step: OnStep,
    *,
    strength: Annotated[float, Option("How much.", 0, 2)] = 1.0,
) -> Tensor:
    """Nothing at all.

    Nor anything more.
    """
    return strength * denoise(z, log_snrs[:1]) + len(rng) + bool(on_step)


def test_keyword_only_parameters_of_a_new_sampler_become_its_section() -> None:
    toy = section("toy", sample_toy)
    assert toy(kind="toy").own == {"strength": 1.0}
    assert toy.__doc__ == "Nothing at all."
    assert toy.model_fields["strength"].description == "How much."
    with pytest.raises(CascadeError, match="here: strength: should be less than or equal to 2, not 3"):
        parse(toy, {"strength": 3}, "here")


def test_every_setting_of_a_sampler_has_a_description() -> None:
    for kind, sampler in SAMPLERS.items():
        for name in SECTIONS[kind](kind=kind).own:
            assert isinstance(get_type_hints(sampler, include_extras=True)[name].__metadata__[0], Option), (kind, name)


MAY_NAME_SAMPLERS = {
    "diffusion/samplers.py",  # where they are
    "config/sampling.py",  # the default, and the settings of earlier versions
    "storage/diffusers.py",  # what DeepFloyd IF's own settings say
    "config/training.py",  # the sampler for which a distilled stage is trained
    "making/plan.py",  # the settings of its stages, as in configs/
    "server/a1111.py",  # what another program's clients call ours
}


def test_nothing_else_in_the_package_knows_a_sampler_by_name() -> None:
    for path in PACKAGE.rglob("*.py"):
        if str(path.relative_to(PACKAGE)) not in MAY_NAME_SAMPLERS:
            words = {node.value for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Constant)}
            assert not words & SAMPLERS.keys(), path


# --- what earlier versions wrote -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("earlier", "sampler"),
    [
        ({"sampler": "dpm++", "eta": 0.0, "variance": "posterior"}, "dpm++"),
        ({"sampler": "ddim", "eta": 0.5, "variance": "posterior"}, STOCHASTIC),
        ({"eta": 0.5}, STOCHASTIC),
        ({"sampler": "ddpm", "eta": 0.5, "variance": "beta"}, {"kind": "ddpm", "variance": "beta"}),
        ({"sampler": "heun", "eta": 0.5}, "heun"),
    ],
    ids=str,
)
def test_settings_next_to_the_sampler_are_read_into_its_section(earlier: dict[str, Any], sampler: Any) -> None:
    read = sampling(**earlier, timesteps=[3, 1], guidance_interval=[-1, 1])
    assert read == sampling(sampler=sampler, timesteps=[3, 1], guidance_interval=[-1, 1])
    assert with_sampler_section(earlier) == {"sampler": sampler}
    assert SamplingConfig(**earlier).sampler == read.sampler


def test_a_section_and_a_setting_next_to_it_are_refused() -> None:
    with pytest.raises(CascadeError, match="here: eta is not a setting"):
        sampling(sampler=STOCHASTIC, eta=0.2)


def test_a_picture_of_an_earlier_version_counts_as_finished() -> None:
    """The comparison at a restart: its line has every setting beside the sampler."""
    now = SamplingConfig(eta=0.5, steps=7).model_dump(mode="json")
    earlier = now | {"sampler": "ddim", "eta": 0.5, "variance": "posterior"}
    lines = [
        {"prompt": "a", "negative_prompt": "", "seed": 1, "number": 0, "num_images": 1}
        | {"settings": {"height": 8, "width": 8, "stages": {"base": stages}}}
        for stages in (now, earlier, earlier | {"eta": 0.25})
    ]
    assert made_by(lines[0]) == made_by(lines[1]) != made_by(lines[2])


# --- a call's own sampler ------------------------------------------------------------------------------------------


def test_a_call_gives_a_name_a_section_or_either_for_each_stage() -> None:
    config = stage()
    assert chosen(config, None) == "ddim"
    assert chosen(config, "heun") == "heun"
    assert chosen(config, STOCHASTIC) == STOCHASTIC
    assert chosen(config, SECTIONS["ddim"](**STOCHASTIC)) == STOCHASTIC
    assert chosen(config, {"base": STOCHASTIC}) == STOCHASTIC
    with pytest.raises(CascadeError, match="sampler: no stage is called 'bse'"):
        chosen(config, {"bse": "heun"})


def test_a_name_alone_means_the_sampler_as_the_stage_has_set_it() -> None:
    config = stage(sampling=sampling(sampler=STOCHASTIC), presets={"best": PresetConfig(sampler="heun")})  # type: ignore[arg-type]
    assert chosen(config, "ddim") == STOCHASTIC
    assert chosen(config, None, "best") == "heun"
    assert chosen(config, "ddim", "best") == STOCHASTIC
    assert chosen(config, {"kind": "ddim"}) == "ddim"
    assert chosen(config, "ddpm") == "ddpm"


def test_a_variance_that_the_network_does_not_predict_is_refused_in_files_and_calls() -> None:
    learned = {"kind": "ddpm", "variance": "learned"}
    message = "sampler.variance: learned needs a network that predicts it, which model.kind: unet does not"
    with pytest.raises(ValueError, match=message):
        stage(sampling=sampling(sampler=learned))
    with pytest.raises(CascadeError, match=f"stage base: {message}"):
        chosen(stage(), learned)


# --- evaluations ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampler", [*SAMPLERS, {"kind": "ddpm", "variance": "learned"}], ids=str)
def test_evaluations_are_those_that_a_denoiser_sees(sampler: Any) -> None:
    settings = sampling(sampler=sampler, steps=5)
    drawn_by = build_stage(stage())
    levels = drawn_by.noise_levels(settings)
    seen: list[float] = []

    def denoise(z: Tensor, log_snr: Tensor) -> tuple[Tensor, Tensor]:
        seen.append(log_snr[0].item())
        return z, torch.zeros_like(z)

    z, rng = torch.ones(2, 3, 4, 4), [torch.Generator(), torch.Generator()]
    SAMPLERS[settings.sampler.kind](denoise, z, levels, rng, **settings.sampler.own)
    assert drawn_by.evaluations(settings) == seen
    assert len(seen) == (9 if sampler == "heun" else 5)
