"""A run's folder: recognizing the run's own files, and protecting all others from being overwritten."""

from __future__ import annotations

from pathlib import Path

from cascade.config.training import TrainConfig
from cascade.errors import CascadeError
from cascade.files.text import NotTextError, read_text
from cascade.settings import parse, read_yaml, to_yaml
from cascade.training.state import begun_mark, checkpoints

SETTINGS = "config.yaml"
_SIGNS = {"stage": "stage.json", "adapter": "adapter_config.json"}
"""The file by which a folder of each name is recognized as a run's own."""


def check_new(output: Path) -> None:
    """Check a new run's folder. Raises CascadeError if it holds a run, or anything that the run would replace."""
    if checkpoints(output):
        raise CascadeError(f"{output}: already holds a run; continue it with --resume, or set another output")
    _check_beginning(output)


def check_resumed(output: Path) -> None:
    """Check a resumed run's folder. Raises CascadeError for a file that the run would replace but did not write."""
    if not checkpoints(output):
        _check_beginning(output)
    for name, sign in _SIGNS.items():
        folder = output / name
        if folder.exists() and not (folder / sign).is_file():
            raise CascadeError(f"{folder}: exists, but is not a run's {name}; move it, or set another output")


def mark_begun(output: Path) -> None:
    """Mark the folder as a run's, whose files may exist before its first checkpoint."""
    if not checkpoints(output):
        begun_mark(output).parent.mkdir(exist_ok=True)
        begun_mark(output).touch()


def is_own_settings(path: Path) -> bool:
    """Whether a file contains settings as a run writes them: all settings, in order, without comments."""
    try:
        return read_text(path) == to_yaml(parse(TrainConfig, read_yaml(path), str(path)))
    except (OSError, NotTextError, CascadeError):
        return False


def _check_beginning(output: Path) -> None:
    """Raise CascadeError for results of a run whose checkpoints are gone, and for files that no run wrote."""
    begun = is_own_settings(output / SETTINGS)
    for name in () if begun and begun_mark(output).exists() else _SIGNS:
        if (output / name).exists():
            raise CascadeError(
                f"{output / name}: exists, but its checkpoints are missing; set another output;"
                f" training.init_from={output} starts from its weights"
            )
    for name in () if begun else (SETTINGS, "log.jsonl", "samples", "checkpoints"):
        if (output / name).exists():
            raise CascadeError(f"{output / name}: exists, but is not from a run; set another output, or move it")
