"""A run apart from its steps: precision, refusals, samples, logs, and the stage folder."""

import errno
import json
import logging
import multiprocessing
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_text import make_tiny_t5
from helpers_training import SUPER_RESOLUTION, WordEncoder, log_entries, micro_config, trainer
from PIL import Image
from torch import nn

from cascade.errors import CascadeError
from cascade.files.tensors import load_tensors
from cascade.storage.stage import load_stage
from cascade.storage.training import load_train_config, load_trainer
from cascade.training.accelerator import check_finite
from cascade.training.actions import Moment
from cascade.training.log import MEASURED, Meter, RunLog, band_names
from cascade.training.state import load_newest

VALIDATE = "training.validation={sources: [{kind: scenes, held_out: true}], every: 2, batches: 2}"


def losses_of(output: Path, *changes: str) -> list[float]:
    assert trainer(micro_config(output, *changes)).run()
    return [entry["loss"] for entry in log_entries(output)]


def cpu_shortage() -> Exception:
    """What torch raises when a CPU's memory does not suffice."""
    with pytest.raises(RuntimeError) as told:
        torch.empty(1 << 50)
    return told.value


# --- the loss ----------------------------------------------------------------------------------------------


def test_a_loss_that_is_not_finite_stops_with_step_and_views_named(tmp_path: Path) -> None:
    config = micro_config(tmp_path / "run", "training.save_every=2")

    def poison(call: int) -> None:
        if call == 4:
            run.stage.network.head.bias.data[0] = float("nan")

    run = trainer(config, WordEncoder(poison))
    with pytest.raises(CascadeError, match=r"not finite at step 4, views \[12, 13, 14, 15\]"):
        run.run()
    state = load_newest(tmp_path / "run", config)
    assert state.step == 2
    assert all(torch.isfinite(weight).all() for weight in state.network.values())
    assert trainer(config).run(resume=True)


def test_only_the_views_whose_loss_is_not_finite_are_named(tmp_path: Path) -> None:
    run = trainer(micro_config(tmp_path / "run"))
    batch = next(run._batches(0))
    loss = torch.tensor([1.0, float("inf"), 2.0, float("nan")])
    with pytest.raises(CascadeError, match=r"views \[1, 3\]"):
        check_finite(loss, 1, batch, run.accelerator)


def test_a_gradient_that_is_not_finite_never_reaches_a_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = micro_config(tmp_path / "run", "training.save_every=1")
    run = trainer(config)
    norms = iter([1.0, 1.0, float("inf")])
    monkeypatch.setattr(run, "_clip", lambda: next(norms))
    with pytest.raises(CascadeError, match="gradient is not finite at step 3"):
        run.run()
    assert load_newest(tmp_path / "run", config).step == 2


# --- precision and memory ----------------------------------------------------------------------------------


def test_fp16_on_a_cpu_is_refused_and_bf16_named(tmp_path: Path) -> None:
    with pytest.raises(CascadeError, match=r"training\.precision.*bf16"):
        trainer(micro_config(tmp_path / "run", "training.precision=fp16"))


@pytest.mark.parametrize(("precision", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_the_arithmetic_inside_the_network_has_the_precision_asked_for(
    tmp_path: Path, precision: str, dtype: torch.dtype
) -> None:
    run = trainer(micro_config(tmp_path / "run", "training.steps=1", f"training.precision={precision}"))
    seen: set[torch.dtype] = set()
    run.stage.network.stem.register_forward_hook(lambda _module, _inputs, output: seen.add(output.dtype))
    assert run.run()
    assert seen == {dtype}
    assert {parameter.dtype for parameter in run.stage.network.parameters()} == {torch.float32}
    assert {value.dtype for value in run.ema.weights.values()} == {torch.float32}


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to\nmore"), r"out of memory in training .*accumulation"),
        (cpu_shortage(), r"DefaultCPUAllocator.* memory: .*accumulation"),
        (MemoryError(), r"out of memory in training \(MemoryError\); raise training\.accumulation"),
    ],
    ids=["gpu", "cpu", "python"],
)
def test_too_little_memory_is_one_line_with_the_way_out(tmp_path: Path, error: Exception, message: str) -> None:
    def fail(call: int) -> None:
        if call == 3:
            raise error

    config = micro_config(tmp_path / "run", "training.save_every=1")
    with pytest.raises(CascadeError, match=message) as told:
        trainer(config, WordEncoder(fail)).run()
    assert "\n" not in str(told.value)
    assert load_newest(tmp_path / "run", config).step == 2


def test_too_little_memory_for_the_weights_is_one_line_too(
    tmp_path: Path, tiny_t5: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to\nmore")

    monkeypatch.setattr("cascade.training.trainer.EMA", full)
    config = micro_config(tmp_path / "run", *tiny_t5)
    with pytest.raises(CascadeError, match=r"before the first step \(CUDA out of memory.*smaller stage\.model") as told:
        load_trainer(config)
    assert "\n" not in str(told.value)


def test_an_error_that_is_no_shortage_keeps_its_name(tmp_path: Path) -> None:
    def fail(_call: int) -> None:
        raise RuntimeError("a mistake of ours")

    with pytest.raises(RuntimeError, match="a mistake of ours"):
        trainer(micro_config(tmp_path / "run"), WordEncoder(fail)).run()


@pytest.mark.slow
def test_a_killed_reading_process_is_one_line(tmp_path: Path) -> None:
    def kill_readers(call: int) -> None:
        if call == 2:
            for process in multiprocessing.active_children():
                process.kill()
            time.sleep(0.5)

    config = micro_config(tmp_path / "run", "training.steps=20", "data.workers=1")
    with pytest.raises(CascadeError, match=r"was killed.*lower data\.workers"):
        trainer(config, WordEncoder(kill_readers)).run()


def test_activation_checkpointing_gives_the_same_losses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from cascade.models import unet

    calls = []

    def counted(*arguments: Any, **options: Any) -> Any:
        calls.append(1)
        return real(*arguments, **options)

    real = unet.checkpoint
    monkeypatch.setattr(unet, "checkpoint", counted)
    dropout = "stage.model.dropout=0.3"  # its masks must be the same when activations are computed again
    plain = losses_of(tmp_path / "plain", dropout)
    assert not calls
    assert losses_of(tmp_path / "checkpointed", dropout, "training.activation_checkpointing=true") == plain
    assert calls


def test_compile_compiles_the_network_and_trains_its_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[nn.Module] = []

    def compile_nothing(network: nn.Module) -> nn.Module:
        compiled.append(network)
        return network

    monkeypatch.setattr(torch, "compile", compile_nothing)
    plain = losses_of(tmp_path / "plain")
    assert not compiled
    assert losses_of(tmp_path / "compiled", "training.compile=true") == plain
    assert len(compiled) == 1


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # torch's tracer asks every tensor for it
def test_a_compiled_run_saves_under_the_plain_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Traced by the real compiler, without its code generation, which needs a C++ compiler."""
    real = torch.compile
    monkeypatch.setattr(torch, "compile", lambda network: real(network, backend="eager"))
    plain = losses_of(tmp_path / "plain")
    # Float32: the compiler may order a sum in another way.
    assert losses_of(tmp_path / "compiled", "training.compile=true") == pytest.approx(plain, rel=1e-4)
    weights = [load_tensors(tmp_path / name / "stage" / "model.safetensors") for name in ("plain", "compiled")]
    assert weights[0].keys() == weights[1].keys()


# --- several processes --------------------------------------------------------------------------------------


def test_a_batch_that_does_not_divide_among_the_processes_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from accelerate import Accelerator

    monkeypatch.setattr(Accelerator, "num_processes", property(lambda _self: 3))
    with pytest.raises(CascadeError, match=r"= 4 does not divide among 3 processes; make it a multiple of 3, or"):
        trainer(micro_config(tmp_path / "run"))


@pytest.mark.parametrize("process", [0, 1])
def test_a_share_of_a_batch_knows_its_places_in_the_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, process: int
) -> None:
    from accelerate import Accelerator

    run = trainer(micro_config(tmp_path / "run"))
    monkeypatch.setattr(Accelerator, "num_processes", property(lambda _self: 2))
    monkeypatch.setattr(Accelerator, "process_index", property(lambda _self: process))
    ready = run.ready(next(run._batches(3)))
    assert ready.samples == [12 + 2 * process, 13 + 2 * process]
    assert ready.positions.tolist() == [2 * process, 2 * process + 1]
    assert ready.batch_size == 4


@pytest.mark.parametrize("changes", [(), SUPER_RESOLUTION], ids=["base", "super-resolution"])
def test_accumulation_makes_the_same_steps_in_smaller_passes(tmp_path: Path, changes: tuple[str, ...]) -> None:
    """Losses, their noise bands, gradients and validation, up to float32's rounding."""
    settings = (*changes, "training.steps=2", "training.batch_size=8", "training.loss.stratified=true", VALIDATE)
    entries = []
    for accumulation in (1, 2, 4):
        output = tmp_path / str(accumulation)
        assert trainer(micro_config(output, *settings, f"training.accumulation={accumulation}")).run()
        entries.append(log_entries(output))
    assert "validation_loss" in entries[0][1]
    for others in entries[1:]:
        for entry, other in zip(entries[0], others, strict=True):
            assert other == pytest.approx(entry, rel=1e-4)


# --- what a run leaves ---------------------------------------------------------------------------------------


def test_the_finished_stage_holds_the_averaged_weights(tmp_path: Path) -> None:
    config = micro_config(tmp_path / "run")
    run = trainer(config)
    assert run.run()
    stage = load_stage(tmp_path / "run" / "stage")
    assert stage.config == config.stage
    weights = dict(stage.network.named_parameters())
    assert all(torch.equal(weights[name], value) for name, value in run.ema.weights.items())
    assert any(not torch.equal(weights[name], value) for name, value in run.stage.network.named_parameters())


def test_base_grids_hold_a_picture_for_each_prompt(tmp_path: Path) -> None:
    config = micro_config(tmp_path / "run", "training.sample_every=2", 'training.sample_prompts=["a", "b", "c"]')
    assert trainer(config).run()
    names = sorted(path.name for path in (tmp_path / "run" / "samples").iterdir())
    assert names == ["step-00000002.png", "step-00000004.png"]
    with Image.open(tmp_path / "run" / "samples" / names[0]) as grid:
        assert grid.width > 2.5 * grid.height  # three cells and their labels


def test_super_resolution_grids_show_low_input_output_and_truth(tmp_path: Path) -> None:
    """From a white picture without noise on it: white, whatever the network makes of it, and white."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    Image.new("RGB", (8, 8), "white").save(folder / "white.png")
    (folder / "white.txt").write_text("white")
    source = f"data.sources=[{{kind: folder, path: {folder}}}]"
    config = micro_config(
        tmp_path / "run", *SUPER_RESOLUTION, source, "training.sample_every=4", "training.sample_count=1"
    )
    assert trainer(config).run()
    with Image.open(tmp_path / "run" / "samples" / "step-00000004.png") as grid:
        # Cells of 256 px with narrow gaps; their inner parts.
        low, output, truth = (grid.crop((256 * k + 20, 20, 256 * k + 240, 240)) for k in range(3))
    assert truth.getextrema() == ((255, 255),) * 3
    assert low.getextrema()[0][0] > 250  # sampling.aug_level is 0
    assert output.getextrema() != truth.getextrema()  # 4 steps of training draw no plain white


def test_samples_leave_the_run_as_it_is(tmp_path: Path) -> None:
    assert losses_of(tmp_path / "sampled", "training.sample_every=1", "stage.model.dropout=0.3") == losses_of(
        tmp_path / "plain", "stage.model.dropout=0.3"
    )


def test_tensorboard_gets_the_values_of_the_log(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    validation = "training.validation={sources: [{kind: scenes, held_out: true}], every: 2, batches: 1}"
    assert trainer(micro_config(tmp_path / "run", "training.trackers=[tensorboard]", validation)).run()
    (events,) = (path for path in (tmp_path / "run").rglob("events.out.tfevents.*"))
    scalars = EventAccumulator(str(events)).Reload()
    entries = log_entries(tmp_path / "run", without=())
    names = {name for entry in entries for name in entry} - {"step"}
    assert {"loss", "validation_loss", "gradient_norm", "learning_rate", "ema_distance", *MEASURED} <= names
    assert names == set(scalars.Tags()["scalars"])
    assert [event.step for event in scalars.Scalars("loss")] == [1, 2, 3, 4]
    assert [event.value for event in scalars.Scalars("loss")] == pytest.approx([entry["loss"] for entry in entries])


def test_tensorboard_shows_each_step_once_after_a_kill_and_a_resume(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    changes = ("training.trackers=[tensorboard]", "training.steps=6", "training.save_every=2")

    def fail(call: int) -> None:
        if call == 4:
            raise RuntimeError

    with pytest.raises(RuntimeError):
        trainer(micro_config(tmp_path / "run", *changes), WordEncoder(fail)).run()
    assert trainer(micro_config(tmp_path / "run", *changes)).run(resume=True)
    events = sorted((tmp_path / "run").rglob("events.out.tfevents.*"))
    assert len(events) == 2
    scalars = EventAccumulator(str(events[0].parent)).Reload().Scalars("loss")
    assert [event.step for event in scalars] == [1, 2, 3, 4, 5, 6]
    assert [event.value for event in scalars] == pytest.approx(
        [entry["loss"] for entry in log_entries(tmp_path / "run")]
    )


def test_an_unknown_tracker_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CascadeError, match=r"training\.trackers.*nonesuch"):
        trainer(micro_config(tmp_path / "run", "training.trackers=[nonesuch]"))


def test_a_tracker_that_is_not_installed_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from accelerate.utils import LoggerType

    monkeypatch.setattr("accelerate.tracking.get_available_trackers", lambda: [LoggerType.TENSORBOARD])
    with pytest.raises(CascadeError, match=r"training\.trackers: wandb is not installed"):
        trainer(micro_config(tmp_path / "run", "training.trackers=[tensorboard, wandb]"))


def test_the_log_has_the_loss_of_each_noise_band() -> None:
    meter = Meter()
    meter.add_losses([1.0, 2.0, 4.0, 8.0], [-9.0, -1.0, -2.0, 9.0])
    summary = meter.means()
    names = band_names()
    assert summary["loss"] == 3.75
    assert {name: summary[name] for name in summary if name in names} == {names[0]: 1.0, names[2]: 3.0, names[-1]: 8.0}


def test_means_go_on_from_the_sums_of_a_checkpoint() -> None:
    meter = Meter()
    meter.add_losses([0.1, 0.2], [-9.0, 9.0])
    meter.add("gradient_norm", 3.0)
    resumed = Meter(json.loads(json.dumps(meter.sums)))
    for each in (meter, resumed):
        each.add_losses([0.3], [0.0])
        each.add("gradient_norm", 4.0)
    assert resumed.means() == meter.means()
    assert meter.means()["gradient_norm"] == 3.5


def test_waiting_for_data_is_a_share_of_the_time() -> None:
    meter = Meter()
    assert "images_per_second" not in meter.measured(torch.device("cpu"))
    meter.add_losses([1.0], [0.0])
    with meter.waiting():
        time.sleep(0.1)
    measured = meter.measured(torch.device("cpu"))
    assert 0.5 < measured["data_wait_share"] <= 1
    assert 0.01 < measured["memory_gigabytes"] < 1000


def test_a_spike_of_the_loss_is_one_line_and_the_run_goes_on(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def jolt(call: int) -> None:
        if call == 14:
            run.stage.network.head.bias.data += 30

    run = trainer(micro_config(tmp_path / "run", "training.steps=16"), WordEncoder(jolt))
    with caplog.at_level(logging.WARNING, "cascade.training"):
        assert run.run()
    (line,) = [record.message for record in caplog.records]
    assert line.startswith("step 14: the loss is ")


def test_a_resumed_log_drops_later_entries_and_half_a_line(tmp_path: Path) -> None:
    (tmp_path / "log.jsonl").write_text('{"step": 1, "loss": 1}\n{"step": 2, "loss": 1}\n{"step": 3, "lo')
    log = RunLog(tmp_path / "log.jsonl", resume_step=1)
    log.write(2, {"loss": 5})
    assert log_entries(tmp_path) == [{"step": 1, "loss": 1}, {"step": 2, "loss": 5}]


def test_the_log_has_null_for_values_that_are_not_finite(tmp_path: Path) -> None:
    log = RunLog(tmp_path / "log.jsonl", 0)
    log.write(1, {"loss": 1.0, "validation_loss": float("nan"), "gradient_norm": float("inf")})
    assert log_entries(tmp_path) == [{"step": 1, "loss": 1.0, "validation_loss": None, "gradient_norm": None}]
    assert RunLog(tmp_path / "log.jsonl", 1).entries == log.entries


# --- through the loading code ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny_t5(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    folder = make_tiny_t5(tmp_path_factory.mktemp("t5"), dim=16)
    return f"text.encoder={folder}", "text.max_length=200"  # its tokens are hardly longer than letters


def test_a_text_width_that_the_encoder_does_not_give_is_refused(tmp_path: Path, tiny_t5: tuple[str, str]) -> None:
    config = micro_config(tmp_path / "run", *tiny_t5, "stage.model.text_dim=24")
    with pytest.raises(CascadeError, match=r"text_dim is 24.*width 16; set stage.model.text_dim=16"):
        load_trainer(config)


def test_a_run_can_start_from_the_weights_of_another(tmp_path: Path, tiny_t5: tuple[str, str]) -> None:
    first = load_trainer(micro_config(tmp_path / "first", *tiny_t5))
    assert first.run()
    second = load_trainer(micro_config(tmp_path / "second", *tiny_t5, f"training.init_from={tmp_path / 'first'}"))
    weights = dict(second.stage.network.named_parameters())
    assert all(torch.equal(weights[name], value) for name, value in first.ema.weights.items())
    assert second.run()
    shutil.copytree(tmp_path / "first" / "stage", tmp_path / "model" / "base")
    third = load_trainer(
        micro_config(tmp_path / "third", *tiny_t5, f"training.init_from={tmp_path / 'model' / 'base'}")
    )
    weights = dict(third.stage.network.named_parameters())
    assert all(torch.equal(weights[name], value) for name, value in first.ema.weights.items())


def test_a_resume_does_not_need_the_initial_weights(tmp_path: Path, tiny_t5: tuple[str, str]) -> None:
    assert load_trainer(micro_config(tmp_path / "first", *tiny_t5)).run()
    shutil.copytree(tmp_path / "first", tmp_path / "gone")
    begun = (*tiny_t5, f"training.init_from={tmp_path / 'gone'}")
    assert load_trainer(micro_config(tmp_path / "run", *begun, "training.steps=2")).run()
    shutil.rmtree(tmp_path / "gone")
    assert load_trainer(micro_config(tmp_path / "run", *begun)).run(resume=True)
    whole = micro_config(tmp_path / "whole", *tiny_t5, f"training.init_from={tmp_path / 'first'}")
    assert load_trainer(whole).run()
    a, b = (load_newest(tmp_path / name, whole) for name in ("whole", "run"))
    assert all(torch.equal(value, b.network[name]) for name, value in a.network.items())
    with pytest.raises(CascadeError, match="gone"):
        load_trainer(micro_config(tmp_path / "new", *begun))


def test_a_resume_needs_no_more_the_stage_that_its_settings_named(tmp_path: Path, tiny_t5: tuple[str, str]) -> None:
    first = micro_config(tmp_path / "first", *tiny_t5)
    assert load_trainer(first).run()
    shutil.copytree(tmp_path / "first" / "stage", tmp_path / "model" / "base")
    settings = first.model_dump(mode="json") | {"stage": str(tmp_path / "model" / "base")}
    (tmp_path / "named.yaml").write_text(json.dumps(settings))
    run = (f"output={tmp_path / 'run'}", "training.steps=2")
    assert load_trainer(load_train_config(tmp_path / "named.yaml", run)).run()
    shutil.rmtree(tmp_path / "model")
    resumed = load_train_config(tmp_path / "named.yaml", (run[0], "training.steps=3"))
    assert resumed.stage == first.stage
    assert load_trainer(resumed).run(resume=True)
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "config.yaml").write_text("stage: bundled/base\n")  # no run's
    with pytest.raises(CascadeError, match=r"named\.yaml: stage: .*model/base: no stage here"):
        load_train_config(tmp_path / "named.yaml", (f"output={tmp_path / 'new'}", "stage.sampling.steps=3"))


def test_with_a_complete_cache_the_text_encoder_is_never_loaded(
    tmp_path: Path, tiny_t5: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from cascade.storage import training as load
    from cascade.text.cached import fill

    config = micro_config(tmp_path / "run", *tiny_t5, f"text.cache={tmp_path / 'cache'}").text
    encoder = load.load_plain_text_encoder(config)
    cache = load.open_cache(tmp_path / "cache", encoder)
    cache.note_settings(load.encoder_settings(config))
    fill(cache, encoder, ["a red fox"])
    loads: list[object] = []

    def counted(settings: object) -> object:
        loads.append(settings)
        return encoder

    monkeypatch.setattr("cascade.storage.training.load_plain_text_encoder", counted)
    text = load.load_text_encoder(config)
    text.encode(["a red fox", ""])
    assert not loads
    text.encode(["a blue fox"])
    text.encode(["a green fox"])
    assert len(loads) == 1
    load.load_text_encoder(config.model_copy(update={"encoder": "the same elsewhere"}))
    assert len(loads) == 2


def test_the_text_encoder_is_moved_to_the_device_of_the_run(tmp_path: Path) -> None:
    text = WordEncoder()
    run = trainer(micro_config(tmp_path / "run"), text)
    assert text.device == run.accelerator.device


def test_a_request_to_stop_in_the_last_step_finds_the_run_finished(tmp_path: Path) -> None:
    def interrupt(call: int) -> None:
        if call == 4:
            signal.raise_signal(signal.SIGINT)

    changes = ("training.sample_every=4", "training.sample_prompts=[a]")
    assert trainer(micro_config(tmp_path / "run", *changes), WordEncoder(interrupt)).run()
    assert (tmp_path / "run" / "samples" / "step-00000004.png").exists()


def test_a_full_disk_is_one_clear_line_for_log_and_samples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = RunLog(tmp_path / "log.jsonl", 0)

    def full(*_arguments: object, **_options: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    run = trainer(micro_config(tmp_path / "run", "training.sample_prompts=[a]"))
    monkeypatch.setattr(Path, "open", full)
    with pytest.raises(CascadeError, match=r"log\.jsonl: cannot be written: No space left"):
        log.write(1, {})
    monkeypatch.setattr(Image.Image, "save", full)
    with pytest.raises(CascadeError, match=r"step-00000001\.png: cannot be written: No space left"):
        run.actions[-1].run(Moment(1, run.averaged_stage, lambda: False))
