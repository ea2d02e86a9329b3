"""Checkpoints: the newest are kept, damaged ones are skipped, and nothing is overwritten by accident."""

import errno
import logging
import shutil
from pathlib import Path

import pytest
import torch
from helpers_training import WordEncoder, log_entries, micro_config, trainer

from cascade.config.training import TrainConfig
from cascade.errors import CascadeError
from cascade.files.atomic import read_json, write_json
from cascade.settings import to_yaml
from cascade.training.state import (
    RunState,
    checkpoints,
    load_newest,
    newest,
    read_state,
    remove_unfinished,
    save_state,
    thin_out_resumed,
)


def tiny_state(step: int) -> RunState:
    return RunState(step, *({"weight": torch.full((2,), float(step))} for _ in range(3)))


def names(output: Path) -> list[str]:
    return [folder.name for folder in checkpoints(output)]


def config_with(output: Path, *changes: str) -> TrainConfig:
    return micro_config(output, "training.steps=2", *changes)


@pytest.fixture
def config(tmp_path: Path) -> TrainConfig:
    """A run with checkpoints of the steps 1 to 3, of which 2 are kept."""
    config = micro_config(tmp_path / "run")
    for step in (1, 2, 3):
        save_state(tmp_path / "run", tiny_state(step), config, keep=2)
    return config


def damage(config: TrainConfig, step: int) -> None:
    path = Path(config.output) / "checkpoints" / f"step-{step:08d}" / "network.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1  # one bit: still valid safetensors
    path.write_bytes(data)


def description(config: TrainConfig, step: int) -> Path:
    return Path(config.output) / "checkpoints" / f"step-{step:08d}" / "state.json"


def test_the_newest_checkpoints_are_kept(config: TrainConfig) -> None:
    assert names(Path(config.output)) == ["step-00000002", "step-00000003"]


def test_the_newest_checkpoint_is_loaded(config: TrainConfig) -> None:
    state = load_newest(Path(config.output), config)
    assert state.step == 3
    for part in (state.network, state.ema, state.optimizer):
        assert part["weight"].tolist() == [3.0, 3.0]


def test_a_damaged_checkpoint_is_passed_over_with_a_warning(
    config: TrainConfig, caplog: pytest.LogCaptureFixture
) -> None:
    damage(config, step=3)
    with caplog.at_level(logging.WARNING, "cascade.training"):
        assert load_newest(Path(config.output), config).step == 2
    assert "step-00000003" in caplog.text
    assert "checksum" in caplog.text


def test_a_checkpoint_whose_description_lacks_a_part_is_passed_over(config: TrainConfig) -> None:
    output = Path(config.output)
    (output / "checkpoints" / "step-00000003" / "state.json").write_text('{"format": 1, "step": 3}')
    assert load_newest(output, config).step == 2


@pytest.mark.parametrize("change", [{"meter": {"loss": [9.0, 1]}}, {"step": 9}], ids=["meter", "step"])
def test_a_checkpoint_whose_description_was_changed_is_passed_over(
    config: TrainConfig, change: dict[str, object]
) -> None:
    path = description(config, step=3)
    write_json(path, read_json(path) | change)
    assert load_newest(Path(config.output), config).step == 2


def test_a_checkpoint_in_the_place_of_another_step_is_passed_over(config: TrainConfig) -> None:
    output = Path(config.output)
    (output / "checkpoints" / "step-00000003").rename(output / "checkpoints" / "step-00000009")
    assert load_newest(output, config).step == 2


def test_a_checkpoint_of_before_descriptions_had_a_checksum_is_loaded(config: TrainConfig) -> None:
    path = description(config, step=3)
    meta = read_json(path)
    del meta["sha256"]["state"]
    write_json(path, meta)
    assert load_newest(Path(config.output), config).step == 3


def test_with_the_newest_checkpoint_deleted_a_run_goes_on_from_the_one_before(tmp_path: Path) -> None:
    """As the warning of a spike advises; the log forgets what came after it."""
    config = micro_config(tmp_path / "run", "training.save_every=2")
    assert trainer(config).run()
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-00000004")
    slower = micro_config(tmp_path / "run", "training.save_every=2", "training.optimizer.learning_rate=1e-3")
    assert trainer(slower).run(resume=True)
    entries = log_entries(tmp_path / "run")
    assert [(entry["step"], entry["learning_rate"]) for entry in entries] == [
        (1, 1e-2),
        (2, 1e-2),
        (3, 1e-3),
        (4, 1e-3),
    ]


def test_a_damaged_checkpoint_does_not_outlive_sound_ones(config: TrainConfig) -> None:
    """After a resume from step 2 with 3 damaged, "the newest one" must not mean the damaged one."""
    damage(config, step=3)
    output = Path(config.output)
    (output / "checkpoints" / "step-00000003").rename(output / "checkpoints" / "step-00000009")
    save_state(output, tiny_state(4), config, keep=1)
    assert names(output) == ["step-00000004"]
    assert load_newest(output, config).step == 4


def test_a_resume_removes_what_a_failed_removal_left_but_nothing_beside_a_later_checkpoint(
    config: TrainConfig, tmp_path: Path
) -> None:
    output = tmp_path / "run"
    for step in (1, 2, 3):
        save_state(output, tiny_state(step), config, keep=3)
    thin_out_resumed(output, step=2, keep=1)
    assert names(output) == ["step-00000001", "step-00000002", "step-00000003"]
    thin_out_resumed(output, step=3, keep=2)
    assert names(output) == ["step-00000002", "step-00000003"]


def test_without_a_run_there_is_nothing_to_resume(config: TrainConfig, tmp_path: Path) -> None:
    with pytest.raises(CascadeError, match="no usable checkpoint to resume from; start the run without --resume"):
        load_newest(tmp_path / "elsewhere", config)


def test_when_all_checkpoints_are_damaged_the_way_out_leads_out(config: TrainConfig) -> None:
    """A start without --resume is refused while they stand; with the named folder deleted the run begins anew."""
    damage(config, step=2)
    description(config, step=3).unlink()
    (Path(config.output) / "config.yaml").write_text("as it was begun")
    with pytest.raises(
        CascadeError, match=r"run: every checkpoint is damaged; .* delete .*run/checkpoints and .* or set another"
    ):
        load_newest(Path(config.output), config)
    shutil.rmtree(Path(config.output) / "checkpoints")
    assert newest(Path(config.output), config) is None


def test_only_unfinished_files_of_a_killed_run_are_removed(config: TrainConfig) -> None:
    output = Path(config.output)
    (output / "checkpoints" / ".step-00000004.abcdefgh").mkdir()
    (output / "checkpoints" / ".step-00000004.abcdefgh" / "network.safetensors").write_bytes(b"half")
    (output / ".log.jsonl.abcdefgh").write_text("half")
    (output / ".stage.old.abc_e7gh").mkdir()
    (output / ".adapter.abc_e7gh").mkdir()
    (output / ".gitignore").write_text("*")
    (output / "log.jsonl").write_text("whole")
    remove_unfinished(output)
    assert names(output) == ["step-00000002", "step-00000003"]
    assert sorted(path.name for path in output.iterdir()) == [".gitignore", "checkpoints", "log.jsonl"]
    assert sorted(path.name for path in (output / "checkpoints").iterdir()) == names(output)


def test_a_run_that_ended_before_its_first_checkpoint_starts_again(tmp_path: Path) -> None:
    config = config_with(tmp_path / "run")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text(to_yaml(config))
    assert trainer(config).run(resume=True)
    assert load_newest(tmp_path / "run", config).step == 2


def test_another_torch_or_number_of_processes_is_one_line_and_the_run_goes_on(
    config: TrainConfig, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = Path(config.output)
    assert newest(output, config, processes=1) is not None
    assert not caplog.records
    monkeypatch.setattr(torch, "__version__", "99.0")
    assert newest(output, config, processes=2) is not None
    (line,) = [record.message for record in caplog.records]
    assert "-> 99.0; processes: 1 -> 2: the run continues, but not bit for bit" in line


def test_a_checkpoint_that_does_not_know_its_processes_is_loaded_without_a_word(
    config: TrainConfig, caplog: pytest.LogCaptureFixture
) -> None:
    path = description(config, step=3)
    meta = read_json(path)
    del meta["processes"], meta["sha256"]["state"]
    write_json(path, meta)
    assert newest(Path(config.output), config, processes=2) == path.parent
    assert not caplog.records


def test_a_run_that_exists_is_not_overwritten(tmp_path: Path) -> None:
    assert trainer(config_with(tmp_path / "run")).run()
    with pytest.raises(CascadeError, match="--resume"):
        trainer(config_with(tmp_path / "run")).run()


def test_a_network_of_another_shape_does_not_resume(tmp_path: Path) -> None:
    assert trainer(config_with(tmp_path / "run")).run()
    with pytest.raises(CascadeError, match=r"embedding_dim: 16 -> 32.*init_from"):
        trainer(config_with(tmp_path / "run", "stage.model.embedding_dim=32")).run(resume=True)


def test_a_finished_run_resumes_to_itself(tmp_path: Path) -> None:
    assert trainer(config_with(tmp_path / "run")).run()
    encoder = WordEncoder()
    assert trainer(config_with(tmp_path / "run"), encoder).run(resume=True)
    assert encoder.calls == 0


def test_a_checkpoint_that_fails_only_while_it_is_read_is_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A disk that fails between the checksum and the reading."""
    settings = micro_config(tmp_path / "run", "training.save_every=2")
    assert trainer(settings).run()

    def failing(folder: Path) -> RunState:
        if folder.name == "step-00000004":
            raise OSError(errno.EIO, "Input/output error")
        return read_state(folder)

    monkeypatch.setattr("cascade.training.trainer.read_state", failing)
    again = trainer(settings)
    with caplog.at_level(logging.INFO, "cascade.training"):
        assert again.run(resume=True)
    assert "step-00000004: skipped" in caplog.text
    assert "continuing after step 2" in caplog.text
