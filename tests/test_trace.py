"""A trace holds what happened, by a denoiser known exactly; and tracing changes no bit of a picture."""

from __future__ import annotations

import inspect
import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers_model import make_tiny_cascade, tiny_stage, tiny_stage_config
from PIL import Image
from torch import Tensor

from cascade import CascadePipeline, Stage
from cascade.cli.program import main
from cascade.conditioning import Conditioning, TextEmbeddings
from cascade.config.sampling import SamplingConfig
from cascade.config.stage import SquaredCosineSchedule
from cascade.diffusion.noise import alpha, one_minus_alpha, x_of
from cascade.diffusion.samplers import SAMPLERS
from cascade.drawing.engine import Conduct, Engine
from cascade.drawing.recipe import Recipe
from cascade.drawing.slots import StageSlot
from cascade.drawing.task import Pass, Step, Task
from cascade.drawing.trace import Recorder, traced
from cascade.drawing.trace_files import main_word, shown_steps, source_of
from cascade.models.attention import Attention
from cascade.models.if_blocks import IFAttention
from cascade.models.if_unet import IFUNetConfig
from cascade.models.network import Network
from cascade.models.transformer import TokenAttention, TransformerConfig, centres, rotations
from cascade.seeds import generator
from cascade.stage import build_schedule
from cascade.text.t5 import words_of

STD, WEIGHT = 0.25, 2.5
SMALL = TransformerConfig(width=16, depth=2, patch=2, bottleneck=8, head_dim=8, embedding_dim=16, text_dim=12)
IF_MODEL = IFUNetConfig(
    channels=(32, 32),
    blocks=(1, 1),
    attention=(False, True),
    embedding_dim=32,
    text_dim=32,
    context_dim=32,
    head_dim=8,
    pooling_heads=4,
)
RECIPE = Recipe(
    prompt="a fox", negative_prompt="", seed=1, number=0, height=8, width=16, stages={"base": SamplingConfig()}
)


class Gaussian(Network):
    """The exact denoiser of x ~ N(mu, STD^2), where mu is the first number of the text."""

    def __init__(self) -> None:
        super().__init__()
        self.unused = torch.nn.Parameter(torch.zeros(1))

    def prepare(self, cond: Conditioning) -> Conditioning:  # type: ignore[override]
        return cond

    def forward(self, z: Tensor, log_snr: Tensor, cond: Conditioning) -> Tensor:
        return exact(z, log_snr, cond.text[:, 0, 0][:, None, None, None])

    def repeated_blocks(self) -> list[torch.nn.Module]:
        return []

    def attention_layers(self) -> list[torch.nn.Module]:
        return []


def exact(z: Tensor, log_snr: Tensor, mean: Tensor | float) -> Tensor:
    """E[x | z] for x ~ N(mean, STD^2): mean + cov(x, z) / var(z) (z - E z)."""
    signal, noise = alpha(log_snr), one_minus_alpha(log_snr)
    return mean + signal.sqrt() * STD**2 / (signal * STD**2 + noise) * (z - signal.sqrt() * mean)


def gaussian_trace(sampler: str, own: float = 0.5, null: float = -0.25) -> Recorder:
    settings = SamplingConfig(steps=6, guidance=WEIGHT, sampler=sampler, threshold=None)
    config = tiny_stage_config("base", 8, sampling=settings)
    stage = Stage(config, Gaussian(), build_schedule(config.schedule, config.resolution))
    recipe = Recipe(
        prompt="x", negative_prompt="", seed=3, number=0, height=8, width=8, stages={"base": config.sampling}
    )

    def encode(texts: list[str]) -> TextEmbeddings:
        tokens = torch.tensor([[[own if text == "x" else null]] for text in texts])
        return TextEmbeddings(tokens, torch.ones(len(texts), 1, dtype=torch.bool))

    recorder = Recorder({})
    task = Task(recipe, [Pass(StageSlot.holding(stage), (8, 8), config.sampling, 0)])
    (drawn,) = Engine(encode, torch.device("cpu"), Conduct(1)).draw_all([task])
    (again,) = Engine(encode, torch.device("cpu"), Conduct(2, on_step=recorder.step)).draw_all([traced(task, recorder)])
    assert torch.equal(drawn.pixels[-1], again.pixels[-1])
    return recorder


@pytest.mark.parametrize("sampler", ["ddim", "ddpm", "heun", "dpm++"])
def test_a_trace_of_an_exact_denoiser_holds_what_the_formulas_say(sampler: str) -> None:
    (trace,) = gaussian_trace(sampler).stages
    levels = trace.stage.noise_levels()
    assert [moment.log_snr for moment in trace.moments] == levels[:-1].tolist()
    start = torch.randn(3, 8, 8, generator=generator(3, 0, "base", "start"))
    assert torch.equal(trace.moments[0].z, start)
    for moment in trace.moments:
        level = torch.tensor(moment.log_snr)
        x_cond, x_null = exact(moment.z, level, 0.5), exact(moment.z, level, -0.25)
        assert moment.guidance is not None
        # The two differ by the same at every pixel: (1 - alpha) / (alpha s^2 + 1 - alpha) (mu - mu_null).
        signal, noise = alpha(level), one_minus_alpha(level)
        assert torch.allclose(moment.guidance, (noise / (signal * STD**2 + noise) * 0.75).expand(3, 8, 8), atol=1e-5)
        assert torch.allclose(moment.guidance, x_cond - x_null, atol=1e-5)
        if sampler != "heun":  # whose x_hat may be that of a step's second call
            assert torch.allclose(moment.x_hat, x_null + WEIGHT * (x_cond - x_null), atol=1e-5)
        noised = signal.sqrt() * trace.moments[-1].x_hat + noise.sqrt() * start
        assert torch.allclose(trace.noised(moment), noised, atol=1e-6)
        assert moment.attention is None


def test_one_step_of_a_trace_leads_to_the_next_by_ddims_formula() -> None:
    (trace,) = gaussian_trace("ddim").stages
    for now, after in zip(trace.moments, trace.moments[1:], strict=False):
        level, next_level = torch.tensor(now.log_snr), torch.tensor(after.log_snr)
        eps = (now.z - alpha(level).sqrt() * now.x_hat) / one_minus_alpha(level).sqrt()
        z = alpha(next_level).sqrt() * now.x_hat + one_minus_alpha(next_level).sqrt() * eps
        assert torch.allclose(after.z, z, atol=1e-5)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_cascade(tmp_path_factory.mktemp("m") / "tiny")


@pytest.fixture(scope="module")
def pipeline(model: Path) -> CascadePipeline:
    return CascadePipeline.from_pretrained(model, device="cpu")


def test_every_stage_of_a_cascade_is_traced_and_no_bit_of_the_picture_changes(pipeline: CascadePipeline) -> None:
    expected = pipeline("a red fox", seed=5)
    configs = [slot.config for slot in pipeline.slots]
    recipe = Recipe(
        prompt="a red fox",
        negative_prompt="",
        seed=5,
        number=0,
        height=32,
        width=32,
        stages={config.name: config.sampling for config in configs},
    )
    recorder = Recorder(words_of(pipeline.text_encoder, "a red fox"))
    conduct = Conduct(1, keep_stages=True, on_step=recorder.step)
    (drawn,) = pipeline.engine(conduct).draw_all([traced(pipeline.task(recipe), recorder)])
    for resolution, pixels in zip((8, 16, 32), drawn.pixels, strict=True):
        assert np.array_equal(np.array(expected.stages[resolution][0]), pixels.permute(1, 2, 0).numpy())
    assert [trace.stage.name for trace in recorder.stages] == ["base", "sr16", "sr32"]
    for trace, side in zip(recorder.stages, (8, 16, 32), strict=True):
        assert len(trace.moments) == 2
        for moment in trace.moments:
            assert moment.z.shape == moment.x_hat.shape == (3, side, side)
            assert moment.attention is not None
            assert moment.attention.shape == (3, side, side)  # a, red, fox
            assert (moment.attention >= 0).all()
            assert (moment.attention.sum(0) <= 1).all()


def test_a_residual_stage_is_traced_in_pictures() -> None:
    """The last step's z is the picture that its noisy residual stands for; without noise left, x_hat itself."""
    settings = SamplingConfig(steps=3, guidance=WEIGHT, sampler="ddim", threshold=None)
    config = tiny_stage_config("sr16", 16, 8, path="residual", residual_scale=0.5, sampling=settings)
    stage = Stage(config, Gaussian(), build_schedule(config.schedule, config.resolution))
    low = torch.zeros(1, 3, 8, 8) + 0.3
    text = torch.full((1, 1, 1), 0.5)
    cond = Conditioning(text, torch.ones(1, 1, dtype=torch.bool), low, torch.full((1, 1, 1, 1), 20.0))
    null = replace(cond, text=-text)
    recorder = Recorder({})
    task = Task(
        Recipe(prompt="", negative_prompt="", seed=1, number=0, height=16, width=16, stages={"sr16": settings}),
        [Pass(StageSlot.holding(stage), (16, 16), settings, 0)],
    )
    own = traced(task, recorder).passes[0].slot.load()
    noise = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    seen: list[Tensor] = []

    def on_step(number: int, x_hat: Tensor) -> None:
        seen.append(x_hat[0])
        recorder.step(Step("sr16", number, 3, 0, 1, [task], x_hat))

    own.sample(cond, null, noise, [torch.Generator()], settings, on_step)
    (trace,) = recorder.stages
    assert torch.allclose(trace.base, torch.tensor(0.3), atol=1e-4)
    assert torch.allclose(trace.moments[0].z, trace.base + 0.5 * noise[0], atol=1e-6)
    for moment, x_hat in zip(trace.moments, seen, strict=True):
        level = torch.tensor(moment.log_snr)
        residual = (moment.z - trace.base) / 0.5
        difference = exact(residual, level, 0.5) - exact(residual, level, -0.5)
        assert moment.guidance is not None
        assert torch.allclose(moment.guidance, 0.5 * difference, atol=1e-5)
        assert torch.equal(moment.x_hat, x_hat)


# --- attention --------------------------------------------------------------------------------------------------------


def layer(sees_picture: bool = True) -> Attention:
    torch.manual_seed(0)
    return Attention(16, 8, 12, "group", 4, sees_picture).eval()


@pytest.mark.parametrize("sees_picture", [True, False])
def test_shares_of_attention_are_the_softmax_over_pixels_and_tokens(sees_picture: bool) -> None:
    """Against NumPy in float64, which shares no code with it; the last two of five tokens are padding."""
    own = layer(sees_picture)
    h, text = torch.randn(2, 16, 3, 4), torch.randn(2, 5, 12)
    visible = torch.tensor([[True, True, True, False, False]] * 2)
    with torch.no_grad():
        keys_values = own.read_text(text)
        shares = own.text_shares(h, keys_values, visible[:, None, None, :])
        assert shares is not None
        tokens = own.norm(h).permute(0, 2, 3, 1).reshape(2, 12, 16).double().numpy()
        weight = own.qkv.weight.double().numpy()
        key_weight = own.text_key_value.weight.double().numpy()[:16]  # type: ignore[union-attr]
    for picture in range(2):
        for head in range(2):
            rows = slice(8 * head, 8 * head + 8)
            query = tokens[picture] @ weight[rows].T
            to_text = query @ (text[picture].double().numpy() @ key_weight[rows].T).T / np.sqrt(8)
            to_text[:, 3:] = -np.inf
            to_pixels = query @ (tokens[picture] @ weight[16:][rows].T).T / np.sqrt(8) if sees_picture else None
            both = to_text if to_pixels is None else np.concatenate([to_pixels, to_text], axis=1)
            expected = np.exp(both - both.max(1, keepdims=True))
            expected /= expected.sum(1, keepdims=True)
            assert np.allclose(shares[picture, head].numpy(), expected[:, -5:], atol=1e-5)


def test_attention_to_a_word_lies_where_the_layer_looks_for_it() -> None:
    """Pixels of the upper half ask for the second token alone, those of the lower half for nothing in particular."""
    own = layer(sees_picture=False)
    own.norm = torch.nn.Identity()  # type: ignore[assignment]
    with torch.no_grad():
        own.qkv.weight.copy_(torch.eye(16))
        own.text_key_value.weight.zero_()  # type: ignore[union-attr]
        own.text_key_value.weight[:16, :12] = torch.eye(16)[:, :12] * 1.0  # type: ignore[union-attr]
    h = torch.zeros(1, 16, 4, 4)
    h[:, 0, :2] = h[:, 8, :2] = 100.0
    text = torch.zeros(1, 2, 12)
    text[0, 1, 0] = text[0, 1, 8] = 5.0
    shares = own.text_shares(h, own.read_text(text), None)
    assert shares is not None
    maps = shares.mean(1)[0, :, 1].reshape(4, 4)
    assert torch.allclose(maps[:2], torch.tensor(1.0))
    assert torch.allclose(maps[2:], torch.tensor(0.5))


def test_shares_in_the_transformer_weigh_the_values_of_the_text() -> None:
    """Attention is linear in the values: changed values of the text change its output by shares times the change."""
    torch.manual_seed(0)
    own = TokenAttention(SMALL).eval()
    h, turns = torch.randn(2, 6, 16), rotations(centres(2, 3, torch.device("cpu")), 8)
    key, value, change = torch.randn(3, 2, 2, 5, 8)
    visible = torch.tensor([[True, True, True, False, False]] * 2)[:, None, None, :]
    with torch.no_grad():
        shares = own.text_shares(h, turns, (key, value), visible)
        difference = own(h, turns, (key, value + change), visible) - own(h, turns, (key, value), visible)
        assert shares is not None
        expected = (shares @ change).transpose(1, 2).flatten(2) @ own.out.weight.T
    assert torch.allclose(difference, expected, atol=1e-5)
    assert (shares[..., 3:] == 0).all()
    assert shares.sum(-1).max() < 1  # the patches have the rest


@pytest.mark.parametrize("self_attention", [True, False])
def test_shares_in_deepfloyds_network_weigh_the_values_of_the_text(self_attention: bool) -> None:
    torch.manual_seed(0)
    own = IFAttention(IF_MODEL.model_copy(update={"self_attention": self_attention}), 32).eval()
    h = torch.randn(2, 32, 2, 3)
    key, value, change = torch.randn(3, 2, 4, 5, 8)
    with torch.no_grad():
        shares = own.text_shares(h, (key, value))
        difference = own(h, (key, value + change)) - own(h, (key, value))
        expected = (shares @ change).transpose(1, 2).flatten(2) @ own.to_out[0].weight.T
    assert torch.allclose(difference.flatten(2).mT, expected, atol=1e-5)
    assert torch.allclose(shares.sum(-1), torch.tensor(1.0)) != self_attention


@pytest.mark.parametrize("model", ["transformer", "deepfloyd"])
def test_other_networks_have_attention_maps_in_the_layout_of_the_picture(model: str) -> None:
    theirs = {"model": IF_MODEL, "schedule": SquaredCosineSchedule(), "parameterization": "eps"}
    config = tiny_stage_config("base", 8, **({"model": SMALL} if model == "transformer" else theirs))
    stage = tiny_stage(config)
    recorder = Recorder({"a": [0], "fox": [1, 2]})
    own = traced(Task(RECIPE, [Pass(StageSlot.holding(stage), (8, 16), config.sampling, 0)]), recorder)
    text = torch.randn(1, 4, config.model.text_dim)
    cond = Conditioning(text, torch.ones(1, 4, dtype=torch.bool))
    z, level = torch.randn(1, 3, 8, 16), torch.zeros(1, 1, 1, 1)
    heard, told = own.passes[0].slot.load(), list[Tensor | None]()
    recorder.called = lambda *said: told.append(said[-1])  # type: ignore[method-assign]
    with torch.no_grad():
        assert torch.equal(x_of(heard.prepare(cond)(z, level)), x_of(stage.prepare(cond)(z, level)))
    (maps,) = told
    assert maps is not None
    assert maps.shape == (2, 8, 16)
    assert (maps > 0).all()
    assert (maps.sum(0) < 1).all()


def test_words_have_the_rows_of_their_tokens(pipeline: CascadePipeline) -> None:
    encoder = pipeline.text_encoder
    words = words_of(encoder, "a red fox, red style")
    assert list(words) == ["a", "red", "fox", "style"]
    text, spans = encoder.spans("a red fox, red style")
    for word, rows in words.items():
        assert "".join(text[slice(*spans[row])] for row in rows).replace(" ", "") == word * text.replace(
            ",", ""
        ).split().count(word)
    everything = [row for rows in words.values() for row in rows]
    assert len(set(everything)) == len(everything)


# --- files -----------------------------------------------------------------------------------------------------------


def size(path: Path) -> tuple[int, int]:
    with Image.open(path) as image:
        return image.size


def test_the_command_writes_every_step_of_the_picture_that_generate_draws(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "trace"
    call = ["trace", "a red fox, drawn", "--seed", "5", "--model", str(model), "--out", str(out)]
    assert main([*call, "--steps", "base=3"]) == 0
    assert "7 steps of seed 5" in capsys.readouterr().out
    said = json.loads((out / "trace.json").read_text())
    assert (said["prompt"], said["words"]) == ("a red fox, drawn", ["a", "red", "fox", "drawn"])
    assert [(stage["name"], len(stage["steps"])) for stage in said["stages"]] == [("base", 3), ("sr16", 2), ("sr32", 2)]
    for stage in said["stages"]:
        levels = [step["log_snr"] for step in stage["steps"]]
        assert levels == sorted(levels)
        assert {formula["quantity"] for formula in stage["formulas"]} == {
            "noised",
            "z",
            "x_hat",
            "guidance",
            "attention",
        }
        for step in stage["steps"]:
            assert set(step["files"]) >= {"noised", "z", "x_hat", "guidance", "attention-0", "attention-3"}
            assert all(size(out / name) == (stage["width"],) * 2 for name in step["files"].values())
    assert size(out / "sheet.png")[0] > 1000
    with Image.open(out / "trace.webp") as frames:
        assert frames.n_frames == 7  # type: ignore[attr-defined]
    assert main([*call, "--until", "8"]) == 0  # an earlier trace is replaced
    assert len(json.loads((out / "trace.json").read_text())["stages"]) == 1


def test_a_folder_of_others_and_a_word_that_is_not_there_are_refused(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    assert main(["trace", "a fox", "--model", str(model), "--out", str(tmp_path)]) == 2
    assert "holds no trace" in capsys.readouterr().err
    call = ["trace", "a fox", "--model", str(model), "--word", "owl", "--out", str(tmp_path / "trace")]
    assert main(call) == 2
    assert "expected one of a, fox" in capsys.readouterr().err
    assert (tmp_path / "mine.txt").read_text() == "mine"


def test_a_guidance_difference_of_zero_is_gray_and_signs_are_opposite_colours() -> None:
    (trace,) = gaussian_trace("ddim").stages  # x_cond is brighter everywhere
    (first, *_) = shown_steps(trace)
    assert np.array(first["guidance"]).min() > 128
    (opposite,) = gaussian_trace("ddim", own=-0.25, null=0.5).stages
    assert np.array(shown_steps(opposite)[0]["guidance"]).max() < 127
    (none,) = gaussian_trace("ddim", own=0.5, null=0.5).stages
    assert set(np.array(shown_steps(none)[0]["guidance"]).flatten().tolist()) <= {127, 128}


@pytest.mark.parametrize("name", list(SAMPLERS))
def test_every_sampler_names_its_source(name: str) -> None:
    assert re.search(r"\(\d{4}\)", source_of(inspect.getdoc(SAMPLERS[name]) or ""))


@pytest.mark.parametrize(
    ("prompt", "word"), [("a red fox, noto style", "fox"), ("fox", "fox"), ("a cat", "cat"), ("?", None)]
)
def test_the_word_of_the_sheet_is_the_subject(prompt: str, word: str | None) -> None:
    assert main_word(prompt, list(dict.fromkeys(re.findall(r"\w+", prompt)))) == word
