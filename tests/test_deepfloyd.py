"""DeepFloyd IF's networks and pipelines: the same results as diffusers, from folders written by diffusers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers_if import TEXT_DIM, make_if, make_unet, own_picture, peer_picture
from torch import Tensor

from cascade import CascadePipeline
from cascade.batch.metadata import model_identity
from cascade.batch.plan import DrawOptions, plan
from cascade.cli.program import main
from cascade.conditioning import Conditioning
from cascade.config.sampling import SamplingConfig
from cascade.config.stage import SquaredCosineSchedule, StageConfig, save_stage
from cascade.diffusion.editing import Known
from cascade.diffusion.schedules import SECTIONS, named_steps, spaced_steps
from cascade.errors import CascadeError
from cascade.models.convolution import Convolution
from cascade.models.if_unet import IF_NOISE, IFUNetConfig
from cascade.models.unet import UNetConfig
from cascade.prompts.reading import given_prompts
from cascade.resources.memory import count_parameters, stage_memory
from cascade.stage import Stage, build_stage
from cascade.storage.convert import convert
from cascade.storage.diffusers import read_stage, read_weights
from cascade.storage.index import read_index
from cascade.storage.stage import load_stage

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # diffusers' own


@pytest.fixture(scope="module")
def peers(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, tuple[Path, Any]]:
    """{super_resolution: (folder, diffusers' pipeline)}."""
    root = tmp_path_factory.mktemp("if")
    return {
        enlarges: (root / f"if-{enlarges}", make_if(root / f"if-{enlarges}", enlarges)) for enlarges in (False, True)
    }


def level_of(step: int, batch: int = 2) -> Tensor:
    return IF_NOISE.log_snr(torch.tensor([(step + 1) / 1000] * batch, dtype=torch.float64))[:, None, None, None]


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# --- the network ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("enlarges", [False, True])
@pytest.mark.parametrize("step", [0, 1, 250, 500, 990, 999])
@torch.inference_mode()
def test_the_network_equals_diffusers(peers: dict[bool, tuple[Path, Any]], enlarges: bool, step: int) -> None:
    folder, peer = peers[enlarges]
    network, size = load_stage(folder).network, 32 if enlarges else 8
    z, low, text = noise(2, 3, size, size), noise(2, 3, size, size, seed=1), noise(2, 77, TEXT_DIM, seed=2)
    cond = Conditioning(text, torch.ones(2, 77, dtype=torch.bool))
    seen, labels = z, None
    if enlarges:
        cond = Conditioning(cond.text, cond.text_mask, low, level_of(250))
        seen, labels = torch.cat([z, low], dim=1), torch.tensor([250, 250])
    theirs = peer.unet(seen, step, encoder_hidden_states=text, class_labels=labels).sample
    torch.testing.assert_close(network(z, level_of(step), cond), theirs, rtol=0, atol=1e-5)


@torch.inference_mode()
def test_a_wide_network_whose_convolutions_are_transformed_equals_diffusers_as_well(tmp_path: Path) -> None:
    """In float32 to its rounding; in bfloat16 it is not much further from float32 than diffusers is."""
    make_if(tmp_path / "if")
    wide = {"block_out_channels": [256, 256], "layers_per_block": [1, 1], "attention_head_dim": 64}
    peer = make_unet(False, **wide)
    for parameter in peer.parameters():
        parameter.copy_(parameter.bfloat16())  # so that its weights are the same in both formats
    peer.save_pretrained(tmp_path / "if" / "unet")
    z, text, mask = noise(2, 3, 16, 16), noise(2, 77, TEXT_DIM, seed=2), torch.ones(2, 77, dtype=torch.bool)
    stage = load_stage(tmp_path / "if")
    exact = peer(z, 500, encoder_hidden_states=text).sample
    prepared = stage.network.prepare(Conditioning(text, mask))
    torch.testing.assert_close(stage.network(z, level_of(500), prepared), exact, rtol=0, atol=1e-5)
    assert any(isinstance(part, Convolution) and part._kernel for part in stage.network.modules())

    def error(output: Tensor) -> float:
        return (output.float() - exact).square().mean().sqrt().item()

    stage.to(dtype=torch.bfloat16)
    low = stage.network(z, level_of(500), stage.network.prepare(Conditioning(text.bfloat16(), mask)))
    theirs = peer.to(torch.bfloat16)(z.bfloat16(), 500, encoder_hidden_states=text.bfloat16()).sample
    assert error(low) < 1.5 * error(theirs)


@torch.inference_mode()
def test_a_wide_network_draws_with_its_own_weights_after_each_change_of_them() -> None:
    """As after merging an adapter: written through `.data`, which leaves no trace."""
    wide = IFUNetConfig(channels=(256, 256), blocks=(1, 1), attention=(False, True), text_dim=64)
    config = StageConfig(name="base", resolution=16, schedule=SquaredCosineSchedule(), model=wide)
    network = build_stage(config, seed=0).network.eval().requires_grad_(False)
    z, cond = noise(2, 3, 16, 16), Conditioning(noise(2, 77, 64), torch.ones(2, 77, dtype=torch.bool))
    convolutions = [part for part in network.modules() if isinstance(part, Convolution)]
    for _ in range(2):
        quick = network(z, level_of(500), network.prepare(cond))
        assert all(part._kernel for part in convolutions)
        exact = network(z, level_of(500), cond)  # a single call, which transforms nothing
        torch.testing.assert_close(quick, exact, rtol=0, atol=1e-4)
        for part in convolutions:
            part.weight.data *= 1.5


@pytest.mark.parametrize("only_text", [False, True])
@torch.inference_mode()
def test_the_keys_decide_whether_attention_sees_the_picture(tmp_path: Path, only_text: bool) -> None:
    make_if(tmp_path / "if")
    peer = make_unet(False, only_cross_attention=only_text)
    peer.save_pretrained(tmp_path / "if" / "unet")
    edit(tmp_path / "if" / "unet" / "config.json", only_cross_attention=not only_text)  # it lies
    network = load_stage(tmp_path / "if").network
    z, text = noise(1, 3, 8, 8), noise(1, 77, TEXT_DIM, seed=2)
    theirs = peer(z, 500, encoder_hidden_states=text).sample
    ours = network(z, level_of(500, 1), Conditioning(text, torch.ones(1, 77, dtype=torch.bool)))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


def test_the_nearest_step_of_a_log_snr_is_that_step_and_between_two_the_closer() -> None:
    steps = torch.arange(1000)
    levels = IF_NOISE.log_snr((steps + 1).double() / 1000)
    assert torch.equal(IF_NOISE.nearest_step(levels), steps)
    below, above = levels[500], levels[501]
    assert IF_NOISE.nearest_step(torch.stack([0.6 * below + 0.4 * above, torch.tensor(-30.0)])).tolist() == [500, 999]


COMMON = {
    "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
    "out_channels": 6,
    "attention_head_dim": 64,
    "norm_num_groups": 32,
    "act_fn": "gelu",
    "resnet_time_scale_shift": "scale_shift",
    "cross_attention_norm": "group_norm",
    "encoder_hid_dim": 4096,
    "addition_embed_type": "text",
    "addition_embed_type_num_heads": 64,
}
SECOND = {
    "class_embed_type": "timestep",
    "time_embedding_act_fn": "gelu",
    "resnet_skip_time_act": True,
    "resnet_out_scale_factor": 1.41423,
    "mid_block_scale_factor": 1.41423,
    "sample_size": 256,
}
PUBLISHED: dict[str, tuple[list[int], Any, int, int]] = {
    "IF-I-M": ([192, 384, 576, 768], 3, 768, 371_605_830),
    "IF-I-L": ([320, 640, 960, 1280], 3, 1280, 935_365_830),
    "IF-I-XL": ([704, 1408, 2112, 2816], 3, 2816, 4_304_695_110),
    "IF-II-M": ([128, 256, 512, 768, 768], [2, 2, 3, 4, 4], 768, 535_441_926),
    "IF-II-L": ([160, 320, 640, 960, 1280], [2, 2, 3, 5, 5], 1280, 1_243_277_190),
}
"""Widths, blocks, width of the projected text, and parameters."""


def published_unet(name: str) -> dict[str, Any]:
    """The unet/config.json of a published model."""
    channels, blocks, width, _ = PUBLISHED[name]
    plain = 3 if "II" in name else 1
    types = ["ResnetDownsampleBlock2D"] * plain + ["SimpleCrossAttnDownBlock2D"] * (len(channels) - plain)
    values = {"block_out_channels": channels, "layers_per_block": blocks, "cross_attention_dim": width}
    second = {**SECOND, "time_embedding_dim": channels[-1]} if "II" in name else {"sample_size": 64}
    return {**COMMON, **values, "down_block_types": types, **second}


def published_stage(folder: Path, peers: dict[bool, tuple[Path, Any]], name: str) -> Stage:
    """Its network on the meta device, from a folder with the settings of `name` and the keys of a small one."""
    shutil.copytree(peers["II" in name][0], folder)
    (folder / "unet" / "config.json").write_text(json.dumps(published_unet(name)))
    return build_stage(read_stage(folder), device="meta")


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_published_networks_have_their_published_sizes(
    peers: dict[bool, tuple[Path, Any]], tmp_path: Path, name: str
) -> None:
    stage = published_stage(tmp_path / name, peers, name)
    assert count_parameters(stage.network) == PUBLISHED[name][3]
    assert stage.config.resolution == (256 if "II" in name else 64)
    assert stage.config.low_resolution == (64 if "II" in name else None)
    with torch.device("meta"):
        unet = published_unet(name)
        ups = {"ResnetDownsampleBlock2D": "ResnetUpsampleBlock2D"}
        types = [ups.get(kind, "SimpleCrossAttnUpBlock2D") for kind in reversed(unet["down_block_types"])]
        peer = make_unet(False, **unet, up_block_types=types, in_channels=6 if "II" in name else 3)
    shapes = {key: tensor.shape for key, tensor in stage.network.state_dict().items()}
    assert shapes == {key: tensor.shape for key, tensor in peer.state_dict().items()}


# --- sampling -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("timesteps", [None, "smart27"])
@torch.inference_mode()
def test_a_guided_picture_of_the_first_stage_equals_diffusers(
    peers: dict[bool, tuple[Path, Any]], timesteps: str | None
) -> None:
    folder, peer = peers[False]
    how = {"timesteps": list(named_steps(timesteps))} if timesteps else {}
    ours = own_picture(load_stage(folder), folder / "text_encoder", timesteps=timesteps)
    torch.testing.assert_close(ours, peer_picture(peer, **how), rtol=0, atol=1e-4)


@torch.inference_mode()
def test_a_guided_picture_of_the_second_stage_equals_diffusers(peers: dict[bool, tuple[Path, Any]]) -> None:
    folder, peer = peers[True]
    low = noise(1, 3, 8, 8).clamp(-1, 1)
    ours = own_picture(load_stage(folder), folder / "text_encoder", low)
    torch.testing.assert_close(ours, peer_picture(peer, low), rtol=0, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("enlarges", [False, True], ids=["base", "super-resolution"])
@pytest.mark.parametrize("masked", [False, True], ids=["image to image", "inpainting"])
@torch.inference_mode()
def test_a_changed_picture_equals_that_of_diffusers_pipelines_for_changing_pictures(
    peers: dict[bool, tuple[Path, Any]], enlarges: bool, masked: bool
) -> None:
    """From the same noise: the second stage draws that of its start before that of the smaller picture."""
    from diffusers.pipelines import deepfloyd_if

    folder, peer = peers[enlarges]
    kind = f"IF{'Inpainting' if masked else 'Img2Img'}{'SuperResolution' if enlarges else ''}Pipeline"
    changing = getattr(deepfloyd_if, kind)(**peer.components, requires_safety_checker=False)
    changing.set_progress_bar_config(disable=True)
    size = 32 if enlarges else 8
    x, low = noise(1, 3, size, size, seed=3).clamp(-1, 1), noise(1, 3, 8, 8).clamp(-1, 1) if enlarges else None
    mask = torch.zeros(1, 1, size, size)
    mask[..., size // 4 : size * 3 // 4, size // 2 :] = 1
    given: dict[str, Any] = {"original_image" if enlarges else "image": x, "strength": 0.7}
    theirs = peer_picture(changing, low, **given, **({"mask_image": mask.clone()} if masked else {}))
    known = Known(x, mask if masked else None, strength=0.7, clean=True)
    ours = own_picture(load_stage(folder), folder / "text_encoder", low, known)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)
    redrawn = (mask if masked else torch.ones_like(mask)).expand_as(x) > 0
    assert torch.equal(ours[~redrawn], x[~redrawn])
    assert (ours - x)[redrawn].abs().mean() > 0.1


@pytest.mark.parametrize("name", SECTIONS)
def test_the_named_step_lists_are_those_of_diffusers(name: str) -> None:
    from diffusers.pipelines.deepfloyd_if import timesteps

    assert list(named_steps(name)) == getattr(timesteps, f"{name}_timesteps")


@pytest.mark.parametrize("spacing", ["leading", "trailing"])
@pytest.mark.parametrize("steps", [1, 10, 27, 100, 1000])
def test_even_spacing_is_that_of_diffusers(spacing: Any, steps: int) -> None:
    from diffusers import DDPMScheduler

    scheduler = DDPMScheduler(timestep_spacing=spacing)
    scheduler.set_timesteps(steps)
    assert list(spaced_steps(steps, spacing)) == scheduler.timesteps.tolist()


@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "heun", "dpm++"])
def test_every_sampler_draws_with_a_network_that_predicts_its_variance(
    peers: dict[bool, tuple[Path, Any]], sampler: str
) -> None:
    pipeline = CascadePipeline.from_pretrained(peers[False][0], super_resolution=[peers[True][0]])
    drawn = pipeline("a red apple", seed=1, steps=3, sampler=sampler, negative_prompt="blue", output_type="pt")
    assert drawn.images.shape == (1, 3, 32, 32)
    assert list(drawn.stages) == [8, 32]


def test_a_cascade_that_reads_its_text_otherwise_is_not_converted(
    peers: dict[bool, tuple[Path, Any]], tmp_path: Path
) -> None:
    """diffusers' pipelines would draw other pictures with the same weights."""
    convert(peers[False][0], tmp_path / "ours")
    edit(tmp_path / "ours" / "cascade.json", max_text_length=64)
    with pytest.raises(CascadeError, match="reads 64 tokens with padding; IF's pipelines in diffusers read 77"):
        convert(tmp_path / "ours", tmp_path / "theirs")
    edit(tmp_path / "ours" / "base" / "stage.json", text={"max_length": 77, "padded": False, "captions": "lower"})
    with pytest.raises(CascadeError, match="reads 77 tokens without padding"):
        convert(tmp_path / "ours" / "base", tmp_path / "theirs")
    zeros = {"max_length": 77, "padded": True, "captions": "deepfloyd", "null_text": "zeros"}
    edit(tmp_path / "ours" / "base" / "stage.json", text=zeros)
    with pytest.raises(CascadeError, match="null text is zeros; IF's pipelines in diffusers encode the empty prompt"):
        convert(tmp_path / "ours" / "base", tmp_path / "theirs")


def test_a_variance_unknown_to_diffusers_is_not_converted(peers: dict[bool, tuple[Path, Any]], tmp_path: Path) -> None:
    convert(peers[False][0], tmp_path / "ours")
    path = tmp_path / "ours" / "base" / "stage.json"
    sampling = json.loads(path.read_text())["sampling"]
    edit(path, sampling=sampling | {"sampler": {"kind": "ddpm", "variance": "between"}})
    with pytest.raises(CascadeError, match="diffusers has no between; choose learned, posterior"):
        convert(tmp_path / "ours", tmp_path / "theirs")


def test_a_stage_of_ours_follows_theirs(peers: dict[bool, tuple[Path, Any]], tmp_path: Path) -> None:
    model = UNetConfig(
        channels=(8, 16),
        blocks=(1, 1),
        strides=(1, 2),
        attention=(False, False),
        groups=4,
        embedding_dim=16,
        text="none",
    )
    own = StageConfig(
        name="sr128",
        resolution=128,
        low_resolution=32,
        parameterization="x",
        model=model,
        sampling=SamplingConfig(steps=2, guidance=1.0, aug_level=0.1),
    )
    save_stage(tmp_path / "own", own, build_stage(own).network.state_dict())
    stages = [peers[True][0], tmp_path / "own"]
    pipeline = CascadePipeline.from_pretrained(peers[False][0], super_resolution=stages)
    drawn = pipeline("a red apple", negative_prompt="blue", seed=1, steps=2, output_type="pt")
    assert drawn.images.shape == (1, 3, 128, 128)
    assert list(drawn.stages) == [8, 32, 128]
    theirs = CascadePipeline.from_pretrained(peers[False][0], super_resolution=stages[:1])
    same = theirs("a red apple", negative_prompt="blue", seed=1, steps=2, output_type="pt")
    assert torch.equal(same.images, drawn.stages[32])


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_weights_that_do_not_fit_are_named(peers: dict[bool, tuple[Path, Any]], tmp_path: Path) -> None:
    from safetensors.torch import save_file

    weights = read_weights(peers[False][0])
    key = "mid_block.attentions.0.to_k.weight"
    broken = {
        f"{key} is missing": {name: tensor for name, tensor in weights.items() if name != key},
        "extra.weight is not in this network": weights | {"extra.weight": torch.zeros(1)},
        rf"{key} has shape \[3, 64\], this network has \[64, 64\]": weights | {key: torch.zeros(3, 64)},
    }
    for number, (message, tensors) in enumerate(broken.items()):
        folder = tmp_path / str(number)
        shutil.copytree(peers[False][0], folder)
        save_file(tensors, folder / "unet" / "diffusion_pytorch_model.safetensors")
        with pytest.raises(CascadeError, match=message):
            load_stage(folder)


# --- folders --------------------------------------------------------------------------------------------------------


def stored(folder: Path) -> dict[str, bytes]:
    """Weights as bytes, by file and name."""
    return {
        name: tensor.contiguous().view(torch.uint8).numpy().tobytes() for name, tensor in read_weights(folder).items()
    }


@torch.inference_mode()
def test_converted_there_and_back_the_weights_are_the_same_bits_and_diffusers_draws_the_same(
    peers: dict[bool, tuple[Path, Any]], tmp_path: Path
) -> None:
    from diffusers import DiffusionPipeline

    folders = [peers[enlarges][0] for enlarges in (False, True)]
    assert main(["convert", str(folders[0]), str(tmp_path / "ours"), "--super-resolution", str(folders[1])]) == 0
    assert main(["convert", str(tmp_path / "ours"), str(tmp_path / "back")]) == 0
    assert stored(tmp_path / "back" / "base") == stored(folders[0])
    assert stored(tmp_path / "back" / "sr32") == stored(folders[1])
    call = {"prompt": "a red apple", "num_inference_steps": 2, "output_type": "pt", "clean_caption": False}
    back = DiffusionPipeline.from_pretrained(tmp_path / "back" / "base", safety_checker=None, watermarker=None)
    images = [
        pipeline(**call, generator=torch.Generator().manual_seed(1)).images for pipeline in (back, peers[False][1])
    ]
    assert torch.equal(*images)
    back = DiffusionPipeline.from_pretrained(tmp_path / "back" / "sr32", safety_checker=None, watermarker=None)
    images = [
        pipeline(**call, image=noise(1, 3, 8, 8), generator=torch.Generator().manual_seed(1)).images
        for pipeline in (back, peers[True][1])
    ]
    assert torch.equal(*images)


def test_a_converted_cascade_draws_what_the_folders_of_diffusers_draw(
    peers: dict[bool, tuple[Path, Any]], tmp_path: Path
) -> None:
    convert(peers[False][0], tmp_path / "ours", [peers[True][0]])
    ours = CascadePipeline.from_pretrained(tmp_path / "ours")
    theirs = CascadePipeline.from_pretrained(peers[False][0], super_resolution=[peers[True][0]])
    pictures = [pipeline("a Red apple", seed=3, steps=2, output_type="pt").images for pipeline in (ours, theirs)]
    assert torch.equal(*pictures)
    ours.save_pretrained(tmp_path / "saved")
    again = CascadePipeline.from_pretrained(tmp_path / "saved", low_memory=True)
    assert torch.equal(again("a Red apple", seed=3, steps=2, output_type="pt").images, pictures[0])


@pytest.mark.parametrize("how", [{"max_shard_size": "100KB"}, {"variant": "fp16"}], ids=["sharded", "fp16"])
def test_shards_and_the_fp16_variant_load(peers: dict[bool, tuple[Path, Any]], tmp_path: Path, how: Any) -> None:
    make_if(tmp_path / "if", **how)
    files = [file.name for file in (tmp_path / "if" / "unet").glob("*.safetensors")]
    assert len(files) > 1 or ".fp16" in files[0]
    assert stored(tmp_path / "if") == stored(peers[False][0])
    CascadePipeline.from_pretrained(tmp_path / "if")("a red apple", steps=1)


def test_prompts_are_padded_to_77_tokens_and_all_of_them_are_read(peers: dict[bool, tuple[Path, Any]]) -> None:
    folder, peer = peers[False]
    ours = CascadePipeline.from_pretrained(folder, captions="lower").text_encoder.encode(["A red apple", ""])
    prompt, null = peer.encode_prompt("A red apple")
    torch.testing.assert_close(ours.tokens, torch.cat([prompt, null]), rtol=0, atol=1e-5)
    assert ours.mask.all()
    assert ours.tokens.shape == (2, 77, TEXT_DIM)


def test_the_licence_of_the_weights_is_named_when_they_load(
    peers: dict[bool, tuple[Path, Any]], caplog: pytest.LogCaptureFixture
) -> None:
    assert CascadePipeline.from_pretrained(peers[False][0]).license.startswith("DeepFloyd IF License")
    assert "DeepFloyd IF License" in caplog.text


def test_a_card_in_latin_1_and_a_scheduler_without_its_optional_settings_are_read(
    peers: dict[bool, tuple[Path, Any]], tmp_path: Path
) -> None:
    """diffusers takes its own defaults for what a file does not say."""
    folder = shutil.copytree(peers[False][0], tmp_path / "if")
    (folder / "README.md").write_bytes("license: mit\nécrit à Paris\n".encode("latin-1"))
    said = json.loads((folder / "scheduler" / "scheduler_config.json").read_text())
    edit(folder / "scheduler" / "scheduler_config.json", thresholding=True)
    whole = load_stage(folder).config.sampling
    for name in (
        "dynamic_thresholding_ratio",
        "sample_max_value",
        "prediction_type",
        "timestep_spacing",
        "clip_sample",
    ):
        said.pop(name)
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps({**said, "thresholding": True}))
    assert read_index(folder).license == "mit"
    sparse = load_stage(folder).config.sampling
    assert (sparse.threshold, sparse.threshold_maximum) == (0.995, 1.0)
    assert sparse == whole.model_copy(update={"threshold": 0.995, "threshold_maximum": 1.0})


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("unet/config.json", {"act_fn": "silu"}, "act_fn: 'silu'; a network of DeepFloyd IF has 'gelu'"),
        ("unet/config.json", {"resnet_skip_time_act": True}, "the embedding passes no GELU, or two"),
        ("scheduler/scheduler_config.json", {"beta_schedule": "linear"}, "beta_schedule: 'linear'"),
        ("model_index.json", {"_class_name": "StableDiffusionPipeline"}, "expected IFPipeline or"),
    ],
)
def test_what_is_not_deepfloyd_if_is_refused_by_name(
    peers: dict[bool, tuple[Path, Any]], tmp_path: Path, file: str, change: dict[str, Any], message: str
) -> None:
    shutil.copytree(peers[False][0], tmp_path / "if")
    edit(tmp_path / "if" / file, **change)
    with pytest.raises(CascadeError, match=message):
        load_stage(tmp_path / "if")


# --- batch runs -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("low_memory", [False, True])
def test_a_batch_run_draws_what_a_call_draws(peers: dict[bool, tuple[Path, Any]], low_memory: bool) -> None:
    prompts = ["a red apple", "two stars"]
    pipeline = CascadePipeline.from_pretrained(
        peers[False][0], super_resolution=[peers[True][0]], device="cpu", low_memory=low_memory
    )
    steps: list[tuple[str, int, int]] = []
    options = DrawOptions(run_seed=0, sampling={"steps": 3}, batch_size=2)
    engine = pipeline.engine(options.conduct(on_step=lambda step: steps.append((step.stage, step.step, step.steps))))
    targets = [target for record in given_prompts(prompts, 0) for target in plan(pipeline, record, options).targets()]
    drawn = engine.draw_all([target.task() for target in targets])
    seeds = [target.job.record.seed for target in targets]
    expected = pipeline(prompts, seed=seeds, steps=3, batch_size=2, output_type="np").images
    assert np.array_equal([result.pixels[-1].permute(1, 2, 0).numpy() for result in drawn], expected)
    assert steps == [(stage, step, 3) for stage in ("base", "sr32") for step in range(3)]


def test_a_line_that_asks_for_more_steps_than_the_schedule_has_is_refused_when_planned(
    peers: dict[bool, tuple[Path, Any]],
) -> None:
    pipeline = CascadePipeline.from_pretrained(peers[False][0], device="cpu")
    (record,) = given_prompts(["a red apple"], 0)
    with pytest.raises(CascadeError, match="steps: 1001; its schedule has only 1000"):
        plan(pipeline, record, DrawOptions(run_seed=0, sampling={"steps": 1001}))


def test_other_weights_in_a_folder_of_diffusers_are_another_model(tmp_path: Path) -> None:
    make_if(tmp_path / "if")
    before = model_identity(read_index(tmp_path / "if"))
    assert model_identity(read_index(tmp_path / "if")) == before
    make_unet(False, layers_per_block=[1, 1]).save_pretrained(tmp_path / "if" / "unet")
    assert model_identity(read_index(tmp_path / "if")) != before


def test_the_least_memory_of_a_network_call_is_no_more_than_it_takes(peers: dict[bool, tuple[Path, Any]]) -> None:
    for folder, _ in peers.values():
        config = read_stage(folder)
        taken = stage_memory(config).activations / 4 / (2 * config.resolution**2)  # with guidance two of each
        assert 0.05 * taken < config.geometry.least_activations < taken
