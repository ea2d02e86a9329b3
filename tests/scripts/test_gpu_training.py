"""The loss, the optimizer, the averages and the clock of the scripts that train on one device."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from gpu import loop, network
from gpu.loop import Phase, Run, Task, Timing, train
from gpu.loss import PROBED, Levels, Measured, gradient_error, loss_of
from gpu.optim import Average, Muon, orthogonal
from gpu.recipe import stage_config
from gpu.views import View
from torch import Tensor, nn

from cascade.conditioning import Conditioning
from cascade.config.training import OptimizerConfig
from cascade.diffusion.noise import diffuse, target
from cascade.errors import CascadeError
from cascade.system.process import stop_signals
from cascade.training import optim as library

CPU = torch.device("cpu")


def views(count: int, size: int, generator: torch.Generator) -> View:
    """Gray pictures under a text of ones."""
    x = torch.rand(count, 1, 1, 1, generator=generator).expand(count, 3, size, size) * 2 - 1
    return View(x.contiguous(), Conditioning(torch.ones(count, 3, 32), torch.ones(count, 3, dtype=torch.bool)))


@pytest.fixture
def run(configs: Path) -> Run:
    return Run(Task(stage_config(configs, "base"), views, Levels(-0.5, 3.0)), CPU)


def no_check(weights: Sequence[Tensor]) -> Measured:  # noqa: ARG001 - a check is given weights
    return Measured(1.0, (0.0,) * len(PROBED))


def not_stopped() -> bool:
    return False


def timing(minutes: float) -> Timing:
    return Timing(minutes, 1e-3, (Phase(0.0, 64, 2),), warmup=1, log_every=1)


# --- loss ----------------------------------------------------------------------------------------------------


def test_levels_are_normal_with_one_in_each_stratum() -> None:
    levels = Levels(-0.5, 3.0, -100, 100).draw(4096, torch.Generator().manual_seed(0)).flatten()
    assert float(levels.mean()) == pytest.approx(-0.5, abs=0.01)
    assert float(levels.std()) == pytest.approx(3.0, abs=0.01)
    u = torch.special.ndtr((levels.double() + 0.5) / 3.0)
    assert torch.equal((u * 4096).floor().sort().values, torch.arange(4096).double())
    assert not torch.equal(levels, levels.sort().values), "the order is random"


def test_levels_stay_in_their_range() -> None:
    levels = Levels(0.0, 9.0, -2, 3).draw(256, torch.Generator().manual_seed(0))
    assert (float(levels.min()), float(levels.max())) == (-2, 3)


def test_gradients_count_three_times_where_flat_and_not_where_they_are_right() -> None:
    flat = torch.zeros(1, 1, 8, 8)
    steep = torch.arange(8.0).expand(1, 1, 8, 8) / 4
    ramp = torch.arange(8.0).expand(1, 1, 8, 8) * 0.01
    assert gradient_error(steep + 0.25, steep).item() == 0
    assert gradient_error(flat + ramp, flat).item() == pytest.approx(3 * 0.01, rel=1e-4)
    assert gradient_error(steep + ramp, steep).item() == pytest.approx(0.01, rel=1e-4)


def test_the_loss_of_a_network_that_gives_nothing_is_the_mean_square_of_v(run: Run) -> None:
    view = views(4, 64, torch.Generator().manual_seed(0))
    log_snr = torch.tensor([-4.0, -1.0, 1.0, 4.0])[:, None, None, None]
    eps = torch.randn(view.x.shape, generator=torch.Generator().manual_seed(1))
    expected = target("v", view.x, eps, log_snr).square().mean((1, 2, 3))
    found = loss_of(run.net, view, log_snr, eps)  # a new network's last layer is zero
    assert torch.allclose(found, expected, rtol=1e-5)
    assert torch.equal(loss_of(run.net, view, log_snr, eps, 0.1)[:2], found[:2]), "counted below log SNR 0"
    assert (loss_of(run.net, view, log_snr, eps, 0.1)[2:] > found[2:]).all()


def test_the_call_without_a_wait_is_the_networks_own(run: Run) -> None:
    for parameter in run.net.parameters():  # a new network gives zero
        nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(parameter.numel()))
    view = views(2, 64, torch.Generator().manual_seed(0))
    mask = torch.tensor([[True, True, False], [True, True, True]])
    cond, level = Conditioning(view.cond.text, mask), torch.zeros(2, 1, 1, 1)
    z = diffuse(view.x, torch.randn(view.x.shape, generator=torch.Generator().manual_seed(1)), level)
    with torch.no_grad(), network.autocast(CPU):
        assert torch.equal(network.call(run.net, z, level, cond), run.net(z, level, cond).float())


# --- optimizer and averages ----------------------------------------------------------------------------------


def stepped(run: Run, optimizer: Muon | torch.optim.Optimizer, rate: float, steps: int = 3) -> dict[str, Tensor]:
    """How far each weight has gone after steps under gradients that are always the same."""
    before = {name: p.detach().clone() for name, p in run.net.named_parameters()}
    for step in range(steps):
        for number, parameter in enumerate(run.net.parameters()):
            gradient = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(100 * step + number))
            # In the layout of its weight, as autograd lays out every gradient.
            parameter.grad = torch.empty_like(parameter).copy_(gradient)
        if isinstance(optimizer, Muon):
            optimizer.step(rate)
        else:
            library.set_learning_rate(optimizer, rate)
            optimizer.step()
    return {name: p.detach() - before[name] for name, p in run.net.named_parameters()}


def is_hidden(name: str, weight: Tensor) -> bool:
    return weight.ndim >= 2 and name.split(".")[0] in ("levels", "middle")


def test_a_step_is_that_of_the_librarys_muon(run: Run) -> None:
    other = Run(run.task, CPU)
    config = OptimizerConfig(kind="muon", learning_rate=1e-2, betas=(0.9, 0.95), weight_decay=0.01)
    moved = stepped(run, Muon(run.net, weight_decay=0.01), 1e-2)
    expected = stepped(other, library.Muon(other.net, config), 1e-2)
    hidden = [name for name, weight in moved.items() if is_hidden(name, weight)]
    assert hidden
    for name in hidden:
        # Five Newton-Schulz steps in bf16 of rows in another order; singular values lie between 0.7 and 1.2 anyway.
        cosine = nn.functional.cosine_similarity(moved[name].flatten(), expected[name].flatten(), dim=0)
        assert cosine > 0.98, name
        assert float(moved[name].norm() / expected[name].norm()) == pytest.approx(1, abs=0.05), name


def test_other_weights_take_the_librarys_step_at_half_the_rate_and_do_not_decay(run: Run) -> None:
    other = Run(run.task, CPU)
    config = OptimizerConfig(kind="muon", learning_rate=1e-2, betas=(0.9, 0.95), weight_decay=0.0)
    moved = stepped(run, Muon(run.net, weight_decay=0.01), 1e-2)
    expected = stepped(other, library.Muon(other.net, config), 0.5e-2)
    others = [name for name, weight in moved.items() if not is_hidden(name, weight)]
    assert {moved[name].ndim for name in others} >= {1, 2}
    for name in others:
        assert torch.allclose(moved[name], expected[name], atol=1e-6), name  # float32; a step is 5e-3


def test_what_is_forgotten_does_not_move_the_next_step(run: Run) -> None:
    other = Run(run.task, CPU)
    used = Muon(run.net)
    stepped(run, used, 0.0)
    used.forget()
    again, fresh = stepped(run, used, 1e-2, steps=1), stepped(other, Muon(other.net), 1e-2, steps=1)
    for name, moved in again.items():
        assert torch.allclose(moved, fresh[name], atol=1e-6), name


def test_orthogonal_keeps_the_singular_vectors_and_levels_the_values() -> None:
    matrix = torch.randn(1, 24, 60, generator=torch.Generator().manual_seed(0))
    found = orthogonal(matrix)[0]
    values = torch.linalg.svdvals(found)
    assert values.min() > 0.6
    assert values.max() < 1.3
    u, _, v = torch.linalg.svd(matrix[0], full_matrices=False)
    assert nn.functional.cosine_similarity(found.flatten(), (u @ v).flatten(), dim=0) > 0.97


@pytest.mark.parametrize("std", [0.05, 0.10])
def test_an_average_weighs_by_a_power_of_the_step(std: float) -> None:
    weight = torch.zeros(1)
    average = Average([weight], std)
    count = 400
    for step in range(1, count + 1):
        weight.fill_(step / count)
        average.update([weight])
    times = (torch.arange(count) + 0.5).double() / count
    weights = times**average.power
    mean = (weights * times).sum() / weights.sum()
    spread = ((weights * (times - mean) ** 2).sum() / weights.sum()).sqrt()
    assert float(spread) == pytest.approx(std, rel=0.02)  # the width that was asked for
    assert float(average.mean[0]) == pytest.approx(float(mean), abs=2 / count)


@pytest.mark.parametrize("std", [0.05, 0.10])
def test_an_average_is_the_weighted_mean_of_all_weights_so_far(std: float) -> None:
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(50, 7, generator=generator)
    average = Average([values[0]], std)
    for value in values:
        average.update([value])
    steps = torch.arange(51).double() / 50
    weights = (steps ** (average.power + 1)).diff()  # the integral of t^power over each step
    assert float(weights.sum()) == pytest.approx(1)
    assert torch.allclose(average.mean[0].double(), weights @ values.double(), atol=1e-6)  # float32


def test_an_average_of_a_constant_is_that_constant() -> None:
    constant = torch.randn(100, generator=torch.Generator().manual_seed(0))
    average = Average([torch.zeros(100)], 0.1)
    for _ in range(20):
        average.update([constant])
    assert torch.equal(average.mean[0], constant)


# --- the clock -----------------------------------------------------------------------------------------------


def test_the_rate_rises_holds_and_falls_to_zero_with_the_time() -> None:
    clock = Timing(1.0, 2.0, (Phase(0.0, 32, 4), Phase(0.5, 64, 2)), decay=0.25, warmup=10)
    assert clock.rate(0, 0.0) == pytest.approx(0.2)
    assert clock.rate(100, 0.5) == 2.0
    assert clock.rate(100, 0.875) == pytest.approx(1.0)
    assert clock.rate(100, 1.0) == 0.0
    assert (clock.phase(0.49).size, clock.phase(0.5).size) == (32, 64)


def test_a_run_ends_with_its_minutes_and_leaves_every_set_of_weights(run: Run, tmp_path: Path) -> None:
    best = train(run, timing(0.05), tmp_path, "base", not_stopped, no_check)
    for name in ("base", "other-base", "raw-base", "guide-base"):
        assert set(network.read_parts(tmp_path, name)) == set(run.names)
    lines = [json.loads(line) for line in (tmp_path / "base.jsonl").read_text().splitlines()]
    assert lines[-1]["seconds"] < 3 + 5  # the minutes, and one step on a busy machine
    assert lines[-1]["views"] == 2 * len(lines)
    assert lines[0]["loss"] < 2
    assert all(torch.isfinite(weight).all() for weight in best)


def test_the_last_step_of_a_run_is_a_small_one(run: Run, tmp_path: Path) -> None:
    train(run, timing(0.05), tmp_path, "base", not_stopped, no_check)
    rates = [json.loads(line)["rate"] for line in (tmp_path / "base.jsonl").read_text().splitlines()]
    assert rates[0] == 1e-3
    assert rates == sorted(rates, reverse=True)
    falling = sum(rate < 1e-3 for rate in rates)
    assert rates[-1] <= 1e-3 * 4 / falling  # zero were one step later; steps may be of unlike length


def test_a_run_that_breaks_after_the_last_line_of_the_log_ends_with_weights_from_before(
    run: Run, tmp_path: Path
) -> None:
    good, step = [p.detach().clone() for p in run.params], run.step

    def spoilt(phase: Phase, rate: float) -> Tensor:  # noqa: ARG001 - in place of a step
        loss = step(phase, 0.0)
        for weights in (run.params, *(average.mean for average in run.averages.values())):
            for weight in weights:
                weight.detach().fill_(float("nan"))
        return loss * float("nan")

    run.step = spoilt  # type: ignore[method-assign]
    clock = Timing(0.01, 1e-3, (Phase(0.0, 64, 2),), log_every=10**6)
    best = train(run, clock, tmp_path, "base", not_stopped, no_check)
    assert all(torch.equal(a, b) for a, b in zip(best, good, strict=True))


def test_a_loss_that_is_nan_takes_the_run_back_to_earlier_weights_at_half_the_rate(run: Run, tmp_path: Path) -> None:
    good, step = [p.detach().clone() for p in run.params], run.step
    rates: list[float] = []

    def spoilt(phase: Phase, rate: float) -> Tensor:
        rates.append(rate)
        if len(rates) > 1:
            return step(phase, 0.0)
        for parameter in run.params:
            parameter.detach().fill_(float("nan"))
        return torch.tensor(float("nan"))

    run.step = spoilt  # type: ignore[method-assign]
    train(run, timing(0.02), tmp_path, "base", not_stopped, no_check)
    assert rates[1] <= rates[0] / 2
    assert all(torch.equal(a, b) for a, b in zip(run.params, good, strict=True))


def test_a_signal_ends_a_run_in_good_order(run: Run, tmp_path: Path) -> None:
    step = run.step

    def once(phase: Phase, rate: float) -> Tensor:
        os.kill(os.getpid(), signal.SIGTERM)
        return step(phase, rate)

    run.step = once  # type: ignore[method-assign]
    with stop_signals() as stopped:
        train(run, timing(60), tmp_path, "base", stopped, no_check)
    assert len((tmp_path / "base.jsonl").read_text().splitlines()) == 1
    assert set(network.read_parts(tmp_path, "base")) == set(run.names)


# --- weights that travel -------------------------------------------------------------------------------------


def test_weights_come_back_in_bf16_from_files_below_the_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(network, "MOST_BYTES", 5000)
    weights = {f"layer{n}": torch.randn(1000, generator=torch.Generator().manual_seed(n)) for n in range(7)}
    network.write_parts(weights, tmp_path, "base")
    files = list(tmp_path.iterdir())
    assert len(files) == 4
    assert max(file.stat().st_size for file in files) < 5500
    found = network.read_parts(tmp_path, "base")
    assert all(torch.equal(found[name], weight.bfloat16()) for name, weight in weights.items())


def test_more_than_ten_files_come_back_and_none_of_an_older_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(network, "MOST_BYTES", 2000)
    network.write_parts({f"layer{n}": torch.full((1000,), float(n)) for n in range(12)}, tmp_path, "base")
    network.write_parts({"other": torch.zeros(1000)}, tmp_path, "raw-base")
    found = network.read_parts(tmp_path, "base")
    assert {name: float(weight[0]) for name, weight in found.items()} == {f"layer{n}": n for n in range(12)}
    network.write_parts({f"layer{n}": torch.zeros(1000) for n in range(3)}, tmp_path, "base")
    assert set(network.read_parts(tmp_path, "base")) == {"layer0", "layer1", "layer2"}
    assert set(network.read_parts(tmp_path, "raw-base")) == {"other"}


def test_weights_are_read_in_the_order_of_the_parameters_whatever_that_of_the_file(run: Run, tmp_path: Path) -> None:
    weights = dict(reversed(list(run.net.named_parameters())))
    network.write_parts(weights, tmp_path, "base")
    assert list(network.read_parts(tmp_path, "base")) != run.names
    found = network.read_weights(tmp_path, "base", run.task.stage)
    assert all(torch.equal(a, b.bfloat16().float()) for a, b in zip(found, run.params, strict=True))
    again = Run(run.task, CPU, found)
    assert all(torch.equal(a, b) for a, b in zip(again.params, found, strict=True))


def test_weights_of_other_settings_are_named(run: Run, tmp_path: Path) -> None:
    weights = dict(run.net.named_parameters())
    del weights[run.names[0]]
    network.write_parts(weights, tmp_path, "base")
    with pytest.raises(CascadeError, match=r"is missing; the weights belong to other settings"):
        network.read_weights(tmp_path, "base", run.task.stage)


def test_a_folder_without_weights_is_named(tmp_path: Path) -> None:
    with pytest.raises(CascadeError, match=r"holds no raw-base-\*\.safetensors"):
        network.read_parts(tmp_path, "raw-base")


def test_the_seconds_are_those_since_the_start(capsys: pytest.CaptureFixture[str]) -> None:
    loop.say("hello", 3)
    assert capsys.readouterr().out.split()[1:] == ["hello", "3"]
