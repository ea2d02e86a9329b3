"""A run's progress in lines, where no bar is drawn."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers_training import micro_config, trainer

from cascade.training.log import SECONDS_BETWEEN, Spoken, duration


def test_a_line_has_step_loss_speed_and_the_time_that_is_left() -> None:
    now = [0.0]
    spoken = Spoken("base", 100, 300, clock=lambda: now[0])
    now[0] = 60.0
    line = spoken.line(150, {"loss": 0.5, "images_per_second": 12.0})
    assert line == "base: step 150 of 300, loss 0.5000, 12.0 pictures/s, 3 min left"  # 50 steps took 60 s


def test_lines_keep_their_distance_except_for_the_last() -> None:
    now = [0.0]
    spoken = Spoken("base", 0, 100, clock=lambda: now[0])
    lines = []
    for step in range(1, 101):
        now[0] += SECONDS_BETWEEN / 10
        lines.append(spoken.line(step, {"loss": 1.0}))
    assert [step for step, line in enumerate(lines, start=1) if line] == [1, 11, 21, 31, 41, 51, 61, 71, 81, 91, 100]


def test_times_are_written_as_people_write_them() -> None:
    assert [duration(seconds) for seconds in (5, 89, 600, 7200, 12000)] == [
        "5 s",
        "89 s",
        "10 min",
        "2 h",
        "3 h 20 min",
    ]


def test_a_run_whose_output_is_no_terminal_reports_its_first_and_last_entry(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", logger="cascade.training")
    trainer(micro_config(tmp_path / "run")).run()
    lines = [record.message for record in caplog.records if "pictures/s" in record.message]
    assert [line.partition(", ")[0] for line in lines] == ["base: step 1 of 4", "base: step 4 of 4"]


def test_grids_show_the_captions_of_held_out_pictures(tmp_path: Path) -> None:
    from PIL import Image

    from cascade.training.actions import first_views

    for name in ("seen", "held-out"):
        (tmp_path / name).mkdir()
        Image.new("RGB", (8, 8)).save(tmp_path / name / "a.png")
        (tmp_path / name / "a.txt").write_text(f"a {name} picture")
    seen = f"data.sources=[{{kind: folder, path: '{tmp_path / 'seen'}'}}]"
    held_out = f"training.validation={{sources: [{{kind: folder, path: '{tmp_path / 'held-out'}'}}]}}"
    assert set(first_views(micro_config(tmp_path / "run", seen)).captions) == {"a seen picture"}
    assert set(first_views(micro_config(tmp_path / "run", seen, held_out)).captions) == {"a held-out picture"}


def test_a_missing_folder_is_found_before_a_hub_is_asked_for_the_encoder(tmp_path: Path) -> None:
    from cascade.errors import CascadeError
    from cascade.storage.training import load_trainer

    sources = f"data.sources=[{{kind: folder, path: '{tmp_path / 'none'}'}}]"
    config = micro_config(tmp_path / "run", sources, "text.encoder=someone/an-encoder-that-nobody-has")
    with pytest.raises(CascadeError, match="none: no such folder"):
        load_trainer(config)
