"""The validation loss: held-out pictures, fixed noise, averaged weights, and no effect on the run."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_text import make_tiny_t5
from helpers_training import SUPER_RESOLUTION, TEXT_DIM, log_entries, micro_config, trainer

from cascade.data import loader
from cascade.errors import CascadeError
from cascade.text.t5 import TextEncoder
from cascade.training import step as step_module
from cascade.training.actions import Moment, Validate, Validation
from cascade.training.step import Draw
from cascade.training.trainer import Trainer

VALIDATE = "training.validation={sources: [{kind: scenes, held_out: true}], every: 2, batches: 3}"


def validation_of(run: Trainer) -> Validation:
    """What the run validates with."""
    return next(action.validation for action in run.actions if isinstance(action, Validate))


def losses_of(run: Trainer) -> torch.Tensor:
    stage = run.averaged_stage()
    return validation_of(run).losses(stage, run.text, torch.device("cpu"))[0]


@pytest.mark.parametrize("changes", [(), SUPER_RESOLUTION], ids=["base", "super-resolution"])
def test_views_noise_and_losses_are_the_same_each_time_and_for_every_seed(
    tmp_path: Path, changes: tuple[str, ...]
) -> None:
    run = trainer(micro_config(tmp_path / "run", VALIDATE, *changes, "stage.model.dropout=0.5"))
    first = losses_of(run)
    assert first.shape == (12,)
    assert torch.equal(losses_of(run), first)
    other = micro_config(tmp_path / "run", VALIDATE, *changes, "training.seed=5", "data.flip=1.0")
    validation = Validation(other, other.training.validation)  # type: ignore[arg-type]
    again = validation.losses(run.averaged_stage(), run.text, torch.device("cpu"))[0]
    assert torch.equal(again, first)


def test_processes_share_the_views(tmp_path: Path) -> None:
    run = trainer(micro_config(tmp_path / "run", VALIDATE))
    config = run.config
    parts = [
        Validation(config, config.training.validation, process, 2).losses(
            run.averaged_stage(), run.text, torch.device("cpu")
        )
        for process in (0, 1)
    ]
    # Float32: a batch of another size may order its sums in another way.
    together = torch.cat([torch.stack(part).unflatten(1, (3, 2)) for part in parts], dim=2).flatten(1)
    whole = torch.stack(validation_of(run).losses(run.averaged_stage(), run.text, torch.device("cpu")))
    torch.testing.assert_close(together, whole, rtol=1e-4, atol=1e-5)


def test_the_log_has_it_by_noise_band_and_training_goes_on_as_without(tmp_path: Path) -> None:
    assert trainer(micro_config(tmp_path / "with", VALIDATE, "stage.model.dropout=0.5")).run()
    assert trainer(micro_config(tmp_path / "without", "stage.model.dropout=0.5")).run()
    entries, plain = log_entries(tmp_path / "with"), log_entries(tmp_path / "without")
    found = [{name for name in entry if name.startswith("validation_loss")} for entry in entries]
    assert [bool(names) for names in found] == [False, True, False, True]
    assert {"validation_loss", "validation_loss/log_snr-3..0", "validation_loss/log_snr0..3"} <= found[1]
    training = [{name: entry[name] for name in entry if not name.startswith("validation_")} for entry in entries]
    assert training == plain


def test_it_is_the_loss_of_the_averaged_weights(tmp_path: Path) -> None:
    run = trainer(micro_config(tmp_path / "run", VALIDATE))
    before = losses_of(run)
    with torch.no_grad():
        run.stage.network.head.bias += 1
    assert torch.equal(losses_of(run), before)
    run.ema.weights["head.bias"] += 1
    assert not torch.equal(losses_of(run), before)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("changes", [("stage.model.attention=[false]", "stage.model.text=pooled"), SUPER_RESOLUTION])
def test_it_is_the_training_loss_of_the_same_views_in_every_bit(
    tmp_path: Path, precision: str, changes: tuple[str, ...]
) -> None:
    """Text, network and square are computed alike: through T5 itself, which autocast must not reach."""
    config = micro_config(tmp_path / "run", VALIDATE, *changes, f"training.precision={precision}", "data.flip=0")
    run = trainer(config, TextEncoder.from_pretrained(make_tiny_t5(tmp_path / "t5", dim=TEXT_DIM), max_length=128))
    validate = next(action for action in run.actions if isinstance(action, Validate))
    captured: list[tuple[Draw, torch.Tensor]] = []
    real = step_module.training_loss

    def capturing(*given: Any) -> tuple[torch.Tensor, torch.Tensor]:
        found = real(*given)
        captured.append((given[4], found[0]))
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(step_module, "training_loss", capturing)
        validate.run(Moment(1, lambda: run.stage, lambda: False))
    assert len(captured) == 3
    batches, settings = validate.validation._batches, validate.validation.objective.settings
    total = sum(len(batch.samples) for batch in batches)
    for batch, (draw, validated) in zip(batches, captured, strict=True):
        ready = replace(run.ready(batch), positions=torch.tensor(batch.samples), batch_size=total)
        trained, _ = real(run.stage, run.network, ready, settings, draw)
        assert torch.equal(trained.detach(), validated)


@pytest.mark.parametrize("changes", [(), SUPER_RESOLUTION], ids=["base", "super-resolution"])
def test_sources_are_opened_once_however_many_validations_and_grids_there_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: tuple[str, ...]
) -> None:
    """Once for the steps, once for the validations and once for the grids."""
    opened: list[object] = []

    def counted(*arguments: object) -> object:
        opened.append(arguments[0])
        return real(*arguments)  # type: ignore[arg-type]

    real = loader.open_source
    monkeypatch.setattr(loader, "open_source", counted)
    assert trainer(micro_config(tmp_path / "run", VALIDATE, *changes, "training.sample_every=1")).run()
    assert len(list((tmp_path / "run" / "samples").iterdir())) == 4
    assert len(opened) == 3


def test_held_out_pictures_that_are_not_there_stop_before_the_first_step(tmp_path: Path) -> None:
    with pytest.raises(CascadeError, match="no such folder"):
        trainer(micro_config(tmp_path / "run", "training.validation={sources: [{kind: folder, path: nowhere}]}"))
