"""Drawing and training on an emulated GPU: see helpers_device."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers_device import HERE, OnDevice, Refused
from helpers_model import make_tiny_cascade, tiny_stage_config
from helpers_training import SUPER_RESOLUTION, WordEncoder, log_entries, micro_config

from cascade import CascadePipeline
from cascade.cli.program import main
from cascade.conditioning import Conditioning, TextEmbeddings
from cascade.config.sampling import SamplingConfig
from cascade.config.stage import LinearSchedule, SquaredCosineSchedule, StageConfig
from cascade.config.training import TrainConfig
from cascade.drawing.batches import Inputs, Picture, Texts, draw_batch
from cascade.errors import CascadeError
from cascade.models.if_unet import IFUNetConfig
from cascade.models.unet import UNetConfig
from cascade.resources.number_format import settled_dtype
from cascade.stage import Stage, build_stage
from cascade.system.device import choose_device, choose_dtype
from cascade.training.state import load_newest
from cascade.training.trainer import Trainer

SAMPLERS = ("ddpm", "ddim", "heun", "dpm++")
THRESHOLDS = (None, "clip", 0.995)
IF_MODEL = IFUNetConfig(
    channels=(32, 64),
    blocks=(1, 1),
    attention=(False, True),
    embedding_dim=64,
    text_dim=32,
    context_dim=32,
    head_dim=8,
    pooling_heads=4,
)
PIXELWISE = UNetConfig(
    channels=(8, 16),
    blocks=(1, 1),
    strides=(2, 2),
    attention=(False, False),
    norm="pixel",
    skips="add",
    head_dim=8,
    embedding_dim=16,
    text="pooled",
    text_dim=32,
)


def if_stage(name: str, resolution: int, low_resolution: int | None = None) -> StageConfig:
    return tiny_stage_config(
        name,
        resolution,
        low_resolution,
        model=IF_MODEL,
        parameterization="eps",
        schedule=SquaredCosineSchedule(),
    )


STAGES = {
    "base": tiny_stage_config("base", 8),
    "sr": tiny_stage_config("sr16", 16, 8),
    "residual": tiny_stage_config("sr16", 16, 8, model=PIXELWISE, path="residual", residual_scale=0.2),
    "discrete": tiny_stage_config("base", 8, schedule=LinearSchedule(), parameterization="v"),
    "if": if_stage("base", 8),
    "if_sr": if_stage("sr16", 16, 8),
}


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """accelerate's device is the one that stands for a GPU."""
    from accelerate import Accelerator

    monkeypatch.setattr(Accelerator, "device", HERE)
    adam = sys.modules[torch.optim.Adam.__module__]
    monkeypatch.setattr(adam, "_device_dtype_check_for_fused", lambda *_: None)  # it has none for `meta`


def stage_there(config: StageConfig) -> Stage:
    """A stage whose weights lie on the GPU."""
    stage = build_stage(config, device=HERE)
    stage.network.eval().requires_grad_(False)
    return stage


def embeddings() -> TextEmbeddings:
    return TextEmbeddings(torch.zeros(2, 5, 32), torch.tensor([[True] * 5, [True] * 3 + [False] * 2]))


def drawn(stage: Stage, tile: int | None = None, **settings: Any) -> None:
    """Two pictures. What a GPU does not do is refused, and until the last step nobody waits for it."""
    side = stage.config.resolution
    waits: list[int] = []
    low = None
    if stage.config.low_resolution is not None:
        side = 2 * side if tile else side
        low = torch.zeros(2, 3, side // stage.scale, side // stage.scale, dtype=torch.uint8)
    with torch.no_grad(), OnDevice() as mode:
        x = draw_batch(
            stage.tiled(tile),
            Inputs(
                SamplingConfig(**{"steps": 3, "guidance": 2.0, "aug_level": 0.1} | settings),
                (side, side),
                [Picture(0, 1, 0), Picture(1, 1, 1)],
                Texts(embeddings(), embeddings()),
                low,
            ),
            lambda _step, _x_hat: waits.append(len(mode.waits)),
        )
    assert x.is_meta
    assert x.shape == (2, 3, side, side)
    assert len(waits) == 3
    assert mode.operations > 100  # the arithmetic was there, and seen
    assert waits == [0, 0, 0], mode.waits


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_no_sampler_asks_a_gpu_for_what_it_does_not_do(sampler: str) -> None:
    stage = stage_there(STAGES["residual"])
    for threshold in THRESHOLDS:
        drawn(stage, sampler=sampler, threshold=threshold)


@pytest.mark.parametrize(
    "settings",
    [
        {"eta": 0.5},
        {"guidance": 1.0, "consistency": 2},
        {"guidance_interval": (-3.0, 3.0)},
        {"sampler": "ddpm", "variance": "beta"},
        {"threshold": 0.9, "threshold_maximum": 1.5, "spacing": "log_snr"},
    ],
    ids=" ".join,
)
def test_no_setting_of_a_sampler_does(settings: dict[str, Any]) -> None:
    drawn(stage_there(STAGES["residual"]), **settings)


@pytest.mark.parametrize("name", STAGES)
def test_no_network_does(name: str) -> None:
    drawn(stage_there(STAGES[name]), sampler="ddpm", variance="learned" if name.startswith("if") else "posterior")


def test_a_picture_in_tiles_does_not() -> None:
    drawn(stage_there(STAGES["residual"]), tile=16)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["base", "if_sr"])
def test_networks_in_16_bits_do_not(name: str, dtype: torch.dtype) -> None:
    drawn(stage_there(STAGES[name]).to(dtype=dtype))


def test_the_device_refuses_what_gpus_refuse_and_knows_when_they_are_waited_for() -> None:
    there = torch.ones(2, device=HERE)
    with OnDevice(), pytest.raises(Refused, match="two devices"):
        there + torch.ones(2)
    with OnDevice(), pytest.raises(Refused, match="float64"):
        there.double()
    with OnDevice(), pytest.raises(Refused, match="float64"):
        torch.zeros(2, dtype=torch.float64, device=HERE)
    for inference in (False, True):
        with torch.inference_mode(inference), OnDevice() as mode:
            there + torch.tensor(1.0)
            torch.ones(2).to(HERE, non_blocking=True)
            assert not mode.waits
            assert float(there[0]) == 1.0
            assert bool((there > 0).all())
            assert there.tolist() == [1, 1]
            torch.ones(2).to(HERE)
            there[torch.tensor([0])]
        assert len(mode.waits) == 5


# --- which device, and which numbers --------------------------------------------------------------------------------


def seeing_gpus(monkeypatch: pytest.MonkeyPatch, local_rank: int) -> None:
    """Eight GPUs, of which a launcher gave us one."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 8)
    monkeypatch.setenv("LOCAL_RANK", str(local_rank))


@pytest.mark.parametrize("asked", [None, "cuda", torch.device("cuda")])
def test_drawing_follows_the_local_rank(monkeypatch: pytest.MonkeyPatch, asked: Any) -> None:
    seeing_gpus(monkeypatch, 5)
    assert choose_device(asked) == torch.device("cuda:5")


def test_encoding_captions_follows_the_local_rank(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seeing_gpus(monkeypatch, 5)
    moved: list[torch.device] = []
    monkeypatch.setattr("cascade.text.t5.TextEncoder.to", lambda self, *where: moved.append(where[0]) or self)
    (tmp_path / "run.yaml").write_text(
        f"{{output: {tmp_path}, stage: bundled/base, text: {{cache: {tmp_path}/cache}},"
        " data: {sources: [{kind: scenes}]}}"
    )
    monkeypatch.setattr("cascade.text.cached.fill", lambda *_, **__: 0)
    main(["encode", str(tmp_path / "run.yaml")])
    assert moved[-1] == torch.device("cuda:5")


def without_bfloat16(monkeypatch: pytest.MonkeyPatch, *modules: str) -> None:
    for module in modules:
        monkeypatch.setattr(f"{module}.has_bfloat16", lambda device: device.type == "cpu")
        monkeypatch.setattr(f"{module}.name_of", lambda _device: "Tesla T4")


def test_bfloat16_is_taken_only_where_the_gpu_has_it(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    gpu = torch.device("cuda:0")
    monkeypatch.setattr("cascade.system.device.has_bfloat16", lambda _device: True)
    assert choose_dtype(None, gpu) == torch.bfloat16
    without_bfloat16(monkeypatch, "cascade.system.device")
    for _ in range(2):
        assert choose_dtype(None, gpu) == torch.float32
    assert [record.message for record in caplog.records] == [
        "Tesla T4 does not support bfloat16: using float32; float16 is faster if pictures stay finite"
    ]
    assert choose_dtype("float16", gpu) == torch.float16
    assert choose_dtype("bfloat16", gpu) == torch.bfloat16  # it is imitated, which `settled_dtype` says
    assert choose_dtype("bfloat16", torch.device("cpu")) == torch.bfloat16


def test_an_older_gpu_imitates_bfloat16_and_one_line_says_how_slowly(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    gpu = torch.device("cuda:0")
    without_bfloat16(monkeypatch, "cascade.system.device")
    without_bfloat16(monkeypatch, "cascade.resources.number_format")
    monkeypatch.setattr("cascade.resources.number_format.time_share", lambda *_: 3.4)
    configs = [tiny_stage_config("base", 8)]
    assert settled_dtype("bfloat16", gpu, configs) == torch.bfloat16
    assert caplog.messages == ["bfloat16 takes 3.4 times as long as float32 on Tesla T4"]
    assert settled_dtype("auto", gpu, configs) == torch.float32


def test_bfloat16_is_refused_where_there_is_none_at_all(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from cascade.training.accelerator import build_accelerator

    mps = torch.device("mps")
    monkeypatch.setattr("cascade.system.device.has_bfloat16", lambda _device: False)
    with pytest.raises(CascadeError, match=r"dtype: device mps does not support bfloat16; use float32, or float16"):
        choose_dtype("bfloat16", mps)
    monkeypatch.setattr("cascade.training.accelerator.has_bfloat16", lambda _device: False)
    monkeypatch.setattr("cascade.training.accelerator.launched_processes", lambda: SimpleNamespace(device=mps))
    with pytest.raises(CascadeError, match=r"training.precision: device mps has no bfloat16; use fp16 or fp32"):
        build_accelerator(micro_config(tmp_path, "training.precision=bf16"))


@pytest.mark.parametrize(("dtype", "expected"), [("bfloat16", torch.bfloat16), ("float32", torch.float32)])
def test_a_large_text_encoder_of_ours_is_bfloat16_beside_stages_that_are(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, dtype: str, expected: torch.dtype
) -> None:
    folder = make_tiny_cascade(tmp_path / "cascade")
    assert CascadePipeline.from_pretrained(folder, dtype=dtype).text_encoder.dtype == torch.float32
    monkeypatch.setattr("cascade.storage.index.LARGE_ENCODER", 100)
    assert CascadePipeline.from_pretrained(folder, dtype=dtype).text_encoder.dtype == expected


# --- training -------------------------------------------------------------------------------------------------------


IF_TRAINING = (
    "stage.schedule.kind=squared_cosine",
    "stage.parameterization=eps",
    "stage.model={kind: if_unet, channels: [8], blocks: [1], attention: [true], embedding_dim: 16, text_dim: 16,"
    " context_dim: 32, head_dim: 4, pooling_heads: 2, groups: 4}",
)
TRAINED: dict[str, tuple[str, ...]] = {
    "base": ("training.accumulation=2", "training.loss.stratified=true"),
    "base, logit-normal": ("training.loss.levels.kind=logit_normal", "training.activation_checkpointing=true"),
    "sr": (*SUPER_RESOLUTION, "data.crop=8"),
    "discrete": ("stage.schedule.kind=linear", "training.loss.min_snr_gamma=5"),
    "if": IF_TRAINING,
    "if_sr": (*IF_TRAINING, "stage.name=sr", "stage.low_resolution=4", "training.activation_checkpointing=true"),
    "muon": ("training.optimizer.kind=muon",),
}


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("name", TRAINED)
def test_no_step_of_training_asks_a_gpu_for_what_it_does_not_do(name: str, tmp_path: Path) -> None:
    trained(micro_config(tmp_path, "training.steps=3", "training.log_every=3", *TRAINED[name]))


def trained(config: TrainConfig) -> OnDevice:
    """A run. What a GPU does not do is refused, and within a step nobody waits for it."""
    trainer = Trainer(config, build_stage(config.stage, device=HERE), WordEncoder())
    step = trainer._step

    def counted(number: int, data: Any) -> None:
        before, waits = mode.operations, len(mode.waits)
        step(number, data)
        assert mode.operations > before + 300  # forward, backward, optimizer
        assert mode.waits[waits:] == []

    trainer._step = counted  # type: ignore[method-assign]
    trainer._save = lambda *_: None  # type: ignore[method-assign]  # there are no numbers to write
    with OnDevice() as mode:
        assert trainer.run()
    return mode


@pytest.mark.usefixtures("gpu")
def test_losses_are_read_from_a_gpu_when_they_are_logged(tmp_path: Path) -> None:
    mode = trained(micro_config(tmp_path, "training.steps=6", "training.log_every=3", "training.accumulation=2"))
    entries = log_entries(tmp_path)
    assert [entry["step"] for entry in entries] == [3, 6]
    assert all(entry["loss"] == entry["gradient_norm"] == 1.0 for entry in entries)  # what is read from there
    assert len([wait for wait in mode.waits if "training/log.py" in wait]) == 2 * len(entries)


@pytest.mark.usefixtures("gpu")
def test_a_run_that_logs_seldom_still_reads_its_losses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cascade.training.trainer.MOST_UNREAD", 2)
    config = micro_config(tmp_path, "training.steps=5", "training.log_every=5")
    trainer = Trainer(config, build_stage(config.stage, device=HERE), WordEncoder())
    trainer._save = lambda *_: None  # type: ignore[method-assign]
    with OnDevice():
        assert trainer.run()
    assert trainer._unread == []


class Late(Trainer):
    """A trainer that reads its numbers as late as on a GPU."""

    _reads_late = True


def test_numbers_read_late_are_those_read_at_once(tmp_path: Path) -> None:
    runs = {}
    for kind in (Trainer, Late):
        config = micro_config(
            tmp_path / kind.__name__, "training.steps=6", "training.log_every=3", "training.save_every=2"
        )
        assert kind(config, build_stage(config.stage), WordEncoder()).run()
        runs[kind] = load_newest(tmp_path / kind.__name__, config), log_entries(tmp_path / kind.__name__)
    (state, log), (late_state, late_log) = runs[Trainer], runs[Late]
    assert log == late_log
    assert all(torch.equal(value, late_state.network[name]) for name, value in state.network.items())
    assert state.meter == late_state.meter


def test_a_loss_that_is_not_finite_is_found_before_it_is_saved_though_it_is_read_late(tmp_path: Path) -> None:
    config = micro_config(tmp_path, "training.steps=6", "training.log_every=6", "training.save_every=2")

    def poison(call: int) -> None:
        if call == 3:
            run.stage.network.head.bias.data[0] = float("nan")

    run = Late(config, build_stage(config.stage), WordEncoder(poison))
    with pytest.raises(CascadeError, match=r"not finite at step 3, views \[8, 9, 10, 11\]"):
        run.run()
    assert load_newest(tmp_path, config).step == 2


@pytest.mark.parametrize("name", ["base", "residual", "if", "if_sr"])
def test_a_compiled_network_is_one_graph(name: str) -> None:
    config = STAGES[name]
    network = build_stage(config).network
    side = config.resolution
    low = (torch.zeros(2, 3, side, side), torch.zeros(2, 1, 1, 1)) if config.low_resolution else (None, None)
    cond = Conditioning(embeddings().tokens, embeddings().mask, *low)
    z, log_snr = torch.randn(2, 3, side, side), torch.zeros(2, 1, 1, 1)
    torch._dynamo.reset()
    whole = torch.compile(network, backend="eager", fullgraph=True)  # raises where the graph breaks
    torch.testing.assert_close(whole(z, log_snr, cond), network(z, log_snr, cond))
    with torch.no_grad():
        prepared = network.prepare(cond)
        torch.testing.assert_close(whole(z, log_snr, prepared), network(z, log_snr, prepared))
