"""A run's folder: what in it is the run's own, and that nothing else is written over."""

from __future__ import annotations

from pathlib import Path

from cascade.config.training import TrainConfig
from cascade.errors import CascadeError
from cascade.files.text import NotTextError, read_text
from cascade.settings import parse, read_yaml, to_yaml
from cascade.training.state import begun_mark, checkpoints

SETTINGS = "config.yaml"
_SIGNS = {"stage": "stage.json", "adapter": "adapter_config.json"}
"""What tells that a folder of these names is what we write."""


def check_new(output: Path) -> None:
    """Whether a new run may begin in a folder. Raises CascadeError for a run, or for anything that it would replace."""
    if checkpoints(output):
        raise CascadeError(f"{output}: holds a run already; continue it with --resume, or set another output")
    _check_beginning(output)


def check_resumed(output: Path) -> None:
    """Whether a run may go on in its folder. Raises CascadeError for what it would replace, and that is not its own."""
    if not checkpoints(output):
        _check_beginning(output)
    for name, sign in _SIGNS.items():
        folder = output / name
        if folder.exists() and not (folder / sign).is_file():
            raise CascadeError(f"{folder}: is there already, and no {name} of a run; move it, or set another output")


def mark_begun(output: Path) -> None:
    """From now on what a run leaves behind may be there before its first checkpoint."""
    if not checkpoints(output):
        begun_mark(output).parent.mkdir(exist_ok=True)
        begun_mark(output).touch()


def is_own_settings(path: Path) -> bool:
    """Whether a file is settings as a run writes them: all of them, in their order, without a comment."""
    try:
        return read_text(path) == to_yaml(parse(TrainConfig, read_yaml(path), str(path)))
    except (OSError, NotTextError, CascadeError):
        return False


def _check_beginning(output: Path) -> None:
    """Raises CascadeError for what a run leaves behind, whose checkpoints are gone, and for what is of no run."""
    begun = is_own_settings(output / SETTINGS)
    for name in () if begun and begun_mark(output).exists() else _SIGNS:
        if (output / name).exists():
            raise CascadeError(
                f"{output / name}: is there already, and the checkpoints that led to it are not; set another output;"
                f" training.init_from={output} begins with its weights"
            )
    for name in () if begun else (SETTINGS, "log.jsonl", "samples", "checkpoints"):
        if (output / name).exists():
            raise CascadeError(f"{output / name}: is there already, and not of a run; set another output, or move it")
