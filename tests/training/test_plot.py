"""Curves: every logged quantity gets a panel, for any state of the log."""

from __future__ import annotations

import builtins
import json
from pathlib import Path

import pytest
from PIL import Image

from cascade.cli.program import main
from cascade.errors import CascadeError
from cascade.training.log import band_names
from cascade.training.watch import MOST_POINTS, draw_curves, panels, read_curves, thinned


def write_log(folder: Path, **values: list[float]) -> Path:
    """A run whose log has an entry every 10 steps."""
    folder.mkdir(parents=True)
    count = max(len(column) for column in values.values())
    lines = [
        json.dumps(
            {"step": 10 * index} | {name: column[index] for name, column in values.items() if index < len(column)}
        )
        for index in range(count)
    ]
    (folder / "log.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def test_curves_are_what_was_logged(tmp_path: Path) -> None:
    run = write_log(tmp_path / "run", loss=[1.0, 0.5], learning_rate=[1e-3])
    assert read_curves(run) == {"loss": [(0, 1.0), (10, 0.5)], "learning_rate": [(0, 1e-3)]}
    assert read_curves(run / "log.jsonl") == read_curves(run)


def test_a_truncated_line_and_values_that_are_no_numbers_are_skipped(tmp_path: Path) -> None:
    run = write_log(tmp_path / "run", loss=[1.0])
    with (run / "log.jsonl").open("a") as file:
        file.write('{"step": 10, "loss": NaN, "note": "x"}\n[1]\n{"step": 20, "lo')
    assert read_curves(run) == {"loss": [(0, 1.0)]}


def test_losses_come_first_from_noisy_to_clean() -> None:
    bands = band_names()
    first = {"gradient_norm": [(1, 1.0)], bands[2]: [(1, 1.0)], "loss": [(1, 1.0)]}
    second = {bands[0]: [(1, 1.0)], "validation_loss": [(1, 1.0)]}
    assert panels([first, second]) == ["loss", "validation_loss", bands[0], bands[2], "gradient_norm"]


def test_each_run_is_a_line_of_its_own_colour_in_every_panel() -> None:
    runs = {"one": {"loss": [(0, 1.0), (10, 0.5)]}, "two": {"loss": [(0, 2.0)], "images_per_second": [(0, 3.0)]}}
    figure = draw_curves(runs)
    drawn = {axis.get_title(): axis for axis in figure.axes if axis.get_title()}
    assert list(drawn) == ["loss", "images_per_second"]
    for axis in drawn.values():
        assert [line.get_label() for line in axis.get_lines()] == ["one", "two"]
    assert drawn["loss"].get_lines()[0].get_xydata().tolist() == [[0, 1.0], [10, 0.5]]
    assert drawn["loss"].get_lines()[1].get_color() == drawn["images_per_second"].get_lines()[1].get_color()
    assert (drawn["loss"].get_yscale(), drawn["images_per_second"].get_yscale()) == ("log", "linear")


def test_the_command_writes_a_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [write_log(tmp_path / name, loss=[3.0, 2.0, 1.0], learning_rate=[1e-3] * 3) for name in "ab"]
    assert main(["plot", *map(str, runs), "--out", str(tmp_path / "curves.png")]) == 0
    assert capsys.readouterr().out == f"2 runs: {tmp_path / 'curves.png'}\n"
    with Image.open(tmp_path / "curves.png") as image:
        assert image.width > 500


def test_a_binary_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "curves.png").write_bytes(b"\x89PNG\r\n\xff\xfe")
    with pytest.raises(CascadeError, match=r"curves\.png: holds no entries; is it the log\.jsonl of a training run"):
        read_curves(tmp_path / "curves.png")


def test_a_folder_without_log_and_an_empty_log_are_named(tmp_path: Path) -> None:
    with pytest.raises(CascadeError, match=r"log\.jsonl: no such file; name the folder of a training run"):
        read_curves(tmp_path)
    (tmp_path / "log.jsonl").write_text("")
    with pytest.raises(CascadeError, match=r"log\.jsonl: holds no entries"):
        read_curves(tmp_path)


def test_without_matplotlib_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *rest: object) -> object:
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(CascadeError, match=r"pip install 'cascade-diffusion\[plot\]'"):
        draw_curves({"run": {"loss": [(0, 1.0)]}})


def test_a_long_curve_is_thinned_to_the_extremes_of_its_stretches() -> None:
    curve = [(step, float(step % 7)) for step in range(100_000)]
    curve[54_321] = (54_321, 1000.0)
    curve[12_345] = (12_345, -1000.0)
    thin = thinned(curve)
    assert len(thin) <= MOST_POINTS
    assert thin == sorted(thin)
    assert {(54_321, 1000.0), (12_345, -1000.0)} <= set(thin) <= set(curve)
    assert thinned(curve[:MOST_POINTS]) == curve[:MOST_POINTS]


def test_long_curves_are_thinned(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    run = write_log(tmp_path / "run", loss=[1.0 + step % 5 for step in range(5000)])
    axis = draw_curves({"run": read_curves(run)}).axes[0]
    assert len(axis.lines[0].get_xdata()) <= MOST_POINTS
