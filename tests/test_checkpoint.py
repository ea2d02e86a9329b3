"""A file or folder is written atomically; damaged weights are reported by name."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from cascade.config.stage import StageConfig, read_stage_config, save_stage
from cascade.errors import CascadeError
from cascade.files.atomic import atomic_file, atomic_folder, read_json, write_json, write_text
from cascade.files.tensors import load_tensors, load_weights, save_tensors


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*"))


class Stop(BaseException):
    """As KeyboardInterrupt, which no `except Exception` sees."""


def write_half(path: Path, error: type[BaseException]) -> None:
    path.write_text("half")
    raise error


def test_a_file_appears_whole_with_ordinary_permissions(tmp_path: Path) -> None:
    write_text(tmp_path / "new" / "a.txt", "é\n")
    assert (tmp_path / "new" / "a.txt").read_text(encoding="utf-8") == "é\n"
    assert names(tmp_path) == ["a.txt", "new"]
    (tmp_path / "plain").touch()
    assert (tmp_path / "new" / "a.txt").stat().st_mode == (tmp_path / "plain").stat().st_mode


@pytest.mark.parametrize("error", [RuntimeError, Stop])
def test_a_file_that_fails_halfway_leaves_the_old_one(tmp_path: Path, error: type[BaseException]) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(error), atomic_file(path) as temporary:
        write_half(temporary, error)
    assert path.read_text() == "old"
    assert names(tmp_path) == ["a.txt"]


@pytest.mark.parametrize("error", [RuntimeError, Stop])
def test_a_folder_that_fails_halfway_leaves_the_old_one(tmp_path: Path, error: type[BaseException]) -> None:
    path = tmp_path / "run"
    path.mkdir()
    (path / "a.txt").write_text("old")
    with pytest.raises(error), atomic_folder(path) as temporary:
        write_half(temporary / "b.txt", error)
    assert names(tmp_path) == ["a.txt", "run"]


def test_a_folder_is_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "run"
    for name in ("a.txt", "b.txt"):
        with atomic_folder(path) as temporary:
            (temporary / name).write_text(name)
        assert names(tmp_path) == [name, "run"]


def test_an_unwritable_place_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for write in (atomic_file, atomic_folder):
        with pytest.raises(CascadeError, match=r"file/a: cannot be written: "), write(tmp_path / "file" / "a"):
            pass
    assert names(tmp_path) == ["file"]


FULL_DISK = """
import resource, signal, sys, torch
from cascade.files.tensors import save_tensors
from cascade.errors import CascadeError
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # so that the write fails as on a full disk
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
try:
    save_tensors(sys.argv[1], {"a": torch.zeros(10_000)})
except CascadeError as error:
    print(error)
"""


def test_a_write_that_fails_halfway_is_named_and_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_text("old")
    done = subprocess.run([sys.executable, "-c", FULL_DISK, path], capture_output=True, text=True, check=True)
    assert done.stdout.startswith(f"{path}: cannot be written: ")
    assert len(done.stdout.splitlines()) == 1
    assert path.read_text() == "old"
    assert names(tmp_path) == ["model.safetensors"]


def test_tensors_survive_saving(tmp_path: Path) -> None:
    tensors = {
        "a": torch.randn(3, 4).T,
        "n": torch.arange(3),
        "z": torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last),
    }
    save_tensors(tmp_path / "t.safetensors", tensors)
    loaded = load_tensors(tmp_path / "t.safetensors")
    assert loaded.keys() == tensors.keys()
    assert all(torch.equal(loaded[name], tensors[name]) for name in tensors)


def test_tied_tensors_are_saved_twice_and_integers_are_not_cast(tmp_path: Path) -> None:
    shared = torch.randn(4)
    save_tensors(tmp_path / "t.safetensors", {"a": shared, "b": shared, "n": torch.arange(3)}, dtype=torch.bfloat16)
    loaded = load_tensors(tmp_path / "t.safetensors")
    assert torch.equal(loaded["a"], shared.bfloat16())
    assert torch.equal(loaded["b"], shared.bfloat16())
    assert loaded["n"].dtype == torch.int64


@pytest.mark.parametrize("kept", [0, 4, 60, 200])
def test_truncated_weights_are_named(tmp_path: Path, kept: int) -> None:
    path = tmp_path / "t.safetensors"
    save_tensors(path, {"a": torch.zeros(100)})
    os.truncate(path, kept)
    with pytest.raises(CascadeError, match=re.escape(f"{path}: damaged, or not safetensors")) as raised:
        load_tensors(path)
    assert "\n" not in str(raised.value)


def test_missing_weights_are_named(tmp_path: Path) -> None:
    with pytest.raises(CascadeError, match=r"none\.safetensors: no such file$"):
        load_tensors(tmp_path / "none.safetensors")
    with pytest.raises(CascadeError, match="damaged, or not safetensors"):
        load_tensors(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bias": None}, "w: bias is missing; the weights belong to other settings"),
        ({"extra": torch.zeros(1)}, "w: extra is not in this network; the weights belong to other settings"),
        (
            {"weight": torch.zeros(2, 4)},
            "w: weight has shape [2, 4], this network has [2, 3]; the weights belong to other settings",
        ),
        (
            {"bias": None, "extra": torch.zeros(1)},
            "w: bias is missing (and 1 more); the weights belong to other settings",
        ),
    ],
)
def test_weights_of_another_network_are_named(change: dict[str, torch.Tensor | None], message: str) -> None:
    module = nn.Linear(3, 2)
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    tensors = {**{name: torch.ones_like(tensor) for name, tensor in before.items()}, **change}
    with pytest.raises(CascadeError) as raised:
        load_weights(module, {name: tensor for name, tensor in tensors.items() if tensor is not None}, "w")
    assert str(raised.value) == message
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_weights_are_cast_to_the_modules_number_format(device: str) -> None:
    module = nn.Linear(3, 2, device=device)
    weights = {"weight": torch.ones(2, 3, dtype=torch.bfloat16), "bias": torch.ones(2, dtype=torch.bfloat16)}
    load_weights(module, weights, "w")
    assert module.weight.dtype == torch.float32
    assert torch.equal(module(torch.ones(1, 3)), torch.full((1, 2), 4.0))


def test_a_stage_folder_holds_its_settings_and_weights(tmp_path: Path) -> None:
    config = StageConfig(name="base", resolution=64)
    save_stage(tmp_path / "base", config, {"a": torch.ones(2)})
    assert names(tmp_path / "base") == ["model.safetensors", "stage.json"]
    assert read_stage_config(tmp_path / "base") == config


@pytest.mark.parametrize("version", [None, 0, 2, "1"])
def test_another_format_version_is_refused_with_the_way_out(tmp_path: Path, version: object) -> None:
    data = StageConfig(name="base", resolution=64).model_dump(mode="json")
    write_json(tmp_path / "stage.json", data if version is None else {"format": version, **data})
    with pytest.raises(CascadeError, match=r"stage\.json: format .*; this version of cascade reads format 1"):
        read_stage_config(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [("{", "not readable as JSON"), ("[1]", "expected a JSON object, found list"), ("", "not readable")],
)
def test_damaged_json_is_named(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(CascadeError, match=rf"a\.json: {message}"):
        read_json(tmp_path / "a.json")
    with pytest.raises(CascadeError, match=r"none\.json: no such file"):
        read_json(tmp_path / "none.json")
