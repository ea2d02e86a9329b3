"""A trace as a folder: trace.json, a picture of each quantity at each step, a sheet and an animation."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cascade.checkpoint import atomic_folder
from cascade.drawing.trace import Recorder, StageTrace
from cascade.drawing.trace_pictures import Shown, animation, formulas, sheet, shown_steps
from cascade.errors import CascadeError
from cascade.files.parsed import read_json_file

FORMAT = 1
INDEX, SHEET, ANIMATION = "trace.json", "sheet.png", "trace.webp"
_QUALITY = 90
_EXACT = 64  # pixels of the longer side up to which pictures are lossless; beyond, noise takes too much space


def check_free(folder: Path) -> None:
    """Raises CascadeError for a folder that holds anything but an earlier trace."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    try:
        if read_trace(folder)["format"] == FORMAT:
            return
    except (OSError, ValueError, KeyError, TypeError):
        pass
    raise CascadeError(f"{folder}: exists, and holds no trace; name another folder with --out")


def read_trace(folder: Path) -> Any:
    """The content of trace.json. Raises OSError, ValueError."""
    return read_json_file(folder / INDEX)


def main_word(prompt: str, words: Sequence[str]) -> str | None:
    """The last word before the first comma, in a caption usually its subject; None if there are no words."""
    subject = [word for word in re.findall(r"[\w'-]+", prompt.partition(",")[0]) if word in words]
    return [*words, *subject][-1] if words else None


def write_trace(folder: Path, recorder: Recorder, entries: Mapping[str, Any], word: str | None = None) -> None:
    """Write a folder, replacing an earlier trace. entries: about the picture, for trace.json. word: see `main_word`."""
    words = list(recorder.words)
    word = main_word(str(entries["prompt"]), words) if word is None else word
    number = words.index(word) if word in words else 0
    stages = [(trace, shown_steps(trace)) for trace in recorder.stages]
    with atomic_folder(folder) as temporary:
        told = [_write_stage(temporary, place, *stage) for place, stage in enumerate(stages)]
        index = {"format": FORMAT, **entries, "words": words, "stages": told}
        (temporary / INDEX).write_text(json.dumps(index, indent=1), encoding="utf-8")
        sheet(stages, number, words).save(temporary / SHEET)
        frames, times = animation(stages, number, words)
        frames[0].save(
            temporary / ANIMATION, save_all=True, append_images=frames[1:], duration=times, loop=0, quality=_QUALITY
        )


def _write_stage(folder: Path, place: int, trace: StageTrace, shown: Sequence[Shown]) -> dict[str, Any]:
    """Write the pictures of a stage; returns its entry of trace.json."""
    steps = []
    for number, (moment, pictures) in enumerate(zip(trace.moments, shown, strict=True)):
        files = {name: f"{place}-{number:03d}-{name.replace('_', '-')}.webp" for name in pictures}
        for name, picture in pictures.items():
            exact = max(picture.size) <= _EXACT
            picture.save(folder / files[name], lossless=exact, quality=_QUALITY, method=2)
        steps.append({"log_snr": round(moment.log_snr, 4), "files": files})
    config = trace.stage.config
    height, width = trace.moments[-1].x_hat.shape[-2:]
    return {
        "name": config.name,
        "width": width,
        "height": height,
        "path": config.path,
        "parameterization": config.parameterization,
        "formulas": formulas(trace),
        "steps": steps,
    }
