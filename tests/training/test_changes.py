"""Every setting has a defined effect when it changes on resume."""

import logging
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers_training import micro_config, trainer

from cascade.config.training import TrainConfig
from cascade.errors import CascadeError
from cascade.settings import Settings
from cascade.training.changes import EFFECTS, Effect, check_changes, differences, effect_of

ORIGIN = Path("runs/base/checkpoints/step-00000005")


def check(tmp_path: Path, *changes: str, base: tuple[str, ...] = ()) -> list[str]:
    saved = micro_config(tmp_path / "run", *base).model_dump(mode="json")
    return check_changes(saved, micro_config(tmp_path / "run", *base, *changes), ORIGIN)


def test_unchanged_settings_give_no_message(tmp_path: Path) -> None:
    assert check(tmp_path) == []


def test_changes_with_and_without_effect_are_reported_separately(tmp_path: Path) -> None:
    other, same = check(tmp_path, "training.batch_size=8", "data.flip=0.5", "training.log_every=7", "data.workers=2")
    assert "the result will differ" in other
    assert "training.batch_size: 4 -> 8 (the data continues at view step x batch_size" in other
    assert "data.flip: 0.0 -> 0.5" in other
    assert "log_every" not in other
    assert "without effect on the weights: data.workers: 0 -> 2; training.log_every: 1 -> 7" in same


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ("training.optimizer.kind=adafactor", "training.optimizer.kind: adamw -> adafactor"),
        ("stage.parameterization=v", "stage.parameterization: eps -> v"),
        ("stage.model.embedding_dim=32", "stage.model.embedding_dim: 16 -> 32"),
        ("training.lora_rank=2", "training.lora_rank: 0 -> 2"),
    ],
)
def test_changes_that_make_another_run_are_refused_with_the_way_out(tmp_path: Path, change: str, line: str) -> None:
    with pytest.raises(CascadeError, match=rf"cannot resume with {line}.*init_from=runs/base"):
        check(tmp_path, change)


def test_settings_that_an_earlier_version_did_not_have_are_no_change(tmp_path: Path) -> None:
    config = micro_config(tmp_path / "run")
    saved = config.model_dump(mode="json")
    del saved["training"]["frozen"], saved["training"]["validation"]
    assert check_changes(saved, config, ORIGIN) == []


def test_differences_name_added_and_removed_settings() -> None:
    lines = [line for _, line in differences({"a": {"b": 1}, "c": 2}, {"a": {"d": 3}, "c": 2})]
    assert lines == ["a.b: 1 -> None", "a.d: None -> 3"]


def names_of(kind: type[Settings], prefix: str = "") -> Iterator[str]:
    """Dotted names of all settings and sections."""
    for name, field in kind.model_fields.items():
        yield prefix + name
        for section in sections_in(field.annotation):
            yield from names_of(section, f"{prefix}{name}.")


def sections_in(annotation: Any) -> list[type[Settings]]:
    if isinstance(annotation, type) and issubclass(annotation, Settings):
        return [annotation]
    return [section for argument in typing.get_args(annotation) for section in sections_in(argument)]


def test_every_setting_has_an_effect_and_every_effect_a_setting() -> None:
    names = set(names_of(TrainConfig))
    assert all(isinstance(effect_of(name), Effect) for name in names)
    assert set(EFFECTS) <= names


def test_a_resume_reports_changes_and_continues(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert trainer(micro_config(tmp_path / "run", "training.steps=2")).run()
    with caplog.at_level(logging.WARNING, "cascade.training"):
        assert trainer(micro_config(tmp_path / "run", "training.steps=3", "data.flip=0.5")).run(resume=True)
    assert "step-00000002: settings changed since the checkpoint, so the result will differ" in caplog.text
    assert "training.steps: 2 -> 3 (with a decay, it changes the learning rate of every remaining step)" in caplog.text


def test_a_section_of_another_version_is_a_change_of_the_result(tmp_path: Path) -> None:
    config = micro_config(tmp_path)
    (line,) = check_changes({**config.model_dump(mode="json"), "weather": {"rain": 1}}, config, tmp_path / "a" / "b")
    assert "weather" in line
