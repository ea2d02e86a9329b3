"""Training runs over HTTP: progress, time left, curves, warnings and grids are those of the files."""

from __future__ import annotations

import io
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers_server import Live, live
from PIL import Image

from cascade import CascadePipeline
from cascade.server.runs import Runs


def made(folder: Path, losses: list[float], **training: Any) -> Path:
    """A run with an entry every 10 steps, 40 pictures a second."""
    folder.mkdir(parents=True)
    settings = {"steps": 1000, "batch_size": 16, "log_every": 10, **training}
    (folder / "config.yaml").write_text(json.dumps({"stage": {"name": "base"}, "training": settings}))
    entries = [{"step": 10 * (place + 1), "loss": loss, "images_per_second": 40.0} for place, loss in enumerate(losses)]
    (folder / "log.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    return folder


@pytest.fixture
def following(pipeline: CascadePipeline, tmp_path: Path) -> Iterator[tuple[Live, Path]]:
    with live(lambda: pipeline, tmp_path / "out", runs=tmp_path / "runs") as server:
        yield server, tmp_path / "runs"


def test_progress_and_time_left_follow_from_the_log(following: tuple[Live, Path]) -> None:
    server, runs = following
    made(runs / "base", [0.5, 0.4])
    (run,) = server.client.get("/api/runs").json()["runs"]
    assert (run["name"], run["stage"], run["state"]) == ("base", "base", "running")
    assert (run["step"], run["steps"], run["loss"]) == (20, 1000, 0.4)
    assert run["seconds_left"] == pytest.approx((1000 - 20) * 16 / 40)
    with (runs / "base" / "log.jsonl").open("a") as log:
        log.write('{"step": 30, "loss": 0.3, "images_per_second": 40.0}\n{"step": 40, "lo')
    told = server.client.get(f"/api/runs/{run['id']}").json()
    assert told["step"] == 30
    assert told["curves"]["loss"] == [[10, 0.5], [20, 0.4], [30, 0.3]]
    assert told["panels"][0] == "loss"


def test_a_run_that_ended_and_one_that_is_silent_are_not_running(following: tuple[Live, Path]) -> None:
    server, runs = following
    made(runs / "whole", [0.5] * 3, steps=30)
    old = made(runs / "deep" / "er" / "silent", [0.5] * 3) / "log.jsonl"
    os.utime(old, (time.time() - 3600,) * 2)
    told = {run["name"]: run for run in server.client.get("/api/runs").json()["runs"]}
    assert told["whole"]["state"] == "done"
    assert told["deep/er/silent"]["state"] == "stopped"
    assert told["deep/er/silent"]["seconds_left"] is None


def test_warnings_are_those_that_training_gives_at_the_same_step(following: tuple[Live, Path]) -> None:
    server, runs = following
    made(runs / "spiked", [*[1.0, 1.01, 0.99] * 4, 50.0, 1.0, 1.0])
    (run,) = server.client.get("/api/runs").json()["runs"]
    assert run["warned"] == 1
    (warning,) = server.client.get(f"/api/runs/{run['id']}").json()["warnings"]
    assert warning["step"] == 130
    assert warning["text"].startswith("the loss is 50")


def test_grids_are_the_files_of_the_run_and_of_no_other_name(following: tuple[Live, Path]) -> None:
    server, runs = following
    samples = made(runs / "base", [0.5]) / "samples"
    samples.mkdir()
    for step in (1000, 200):
        Image.new("RGB", (8, 8), (step % 256, 0, 0)).save(samples / f"step-{step:08d}.png")
    (samples / "notes.png").write_bytes(b"")
    (run,) = server.client.get("/api/runs").json()["runs"]
    assert server.client.get(f"/api/runs/{run['id']}").json()["grids"] == [200, 1000]
    grid = server.client.get(f"/api/runs/{run['id']}/grids/200").content
    assert Image.open(io.BytesIO(grid)).getpixel((0, 0)) == (200, 0, 0)
    assert server.client.get(f"/api/runs/{run['id']}/grids/300").status_code == 404
    assert server.client.get(f"/api/runs/{run['id']}/grids/-1").status_code == 422
    for path in ("base", "..%2fout", "0" * 16):
        assert server.client.get(f"/api/runs/{path}").status_code == 404


def test_settings_and_logs_that_hold_anything_end_nothing(tmp_path: Path) -> None:
    run = made(tmp_path / "runs" / "odd", [0.5])
    for settings in ("[1, 2]", "training: {steps: many, batch_size: -3}", "training: 7", ": :", "stage: other/base"):
        (run / "config.yaml").write_text(settings)
        (told,) = Runs(tmp_path / "runs").every()
        assert (told["step"], told["steps"], told["seconds_left"]) == (10, 0, None)
    (run / "log.jsonl").write_bytes(b'\xff\n[]\n{"step": "x"}\n{"step": 5, "loss": "low"}\n{"step": 6, "loss": null}\n')
    runs = Runs(tmp_path / "runs")
    (told,) = runs.every()
    assert told["step"] == 6
    assert runs.get(told["id"])["warnings"] == []
    assert Runs(tmp_path / "nothing").every() == []
