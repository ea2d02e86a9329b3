"""A trace as a folder: trace.json, a picture for every quantity at every step, a sheet and an animation."""

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
_EXACT = 64  # pixels of the longer side, up to which no number is lost; noise is large


def check_free(folder: Path) -> None:
    """Raises CascadeError for a folder that holds anything but an earlier trace."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    try:
        if read_trace(folder)["format"] == FORMAT:
            return
    except (OSError, ValueError, KeyError, TypeError):
        pass
    raise CascadeError(f"{folder}: is there already, and holds no trace; name another folder with --out")


def read_trace(folder: Path) -> Any:
    """What trace.json holds. Raises OSError, ValueError."""
    return read_json_file(folder / INDEX)


def main_word(prompt: str, words: Sequence[str]) -> str | None:
    """The last word before the first comma, which in a caption is mostly its subject; None where there are no words."""
    subject = [word for word in re.findall(r"[\w'-]+", prompt.partition(",")[0]) if word in words]
    return [*words, *subject][-1] if words else None


def write_trace(folder: Path, recorder: Recorder, said: Mapping[str, Any], word: str | None = None) -> None:
    """Write a folder, in place of an earlier trace. said: of the picture. word: of the sheet; see `main_word`."""
    words = list(recorder.words)
    word = main_word(str(said["prompt"]), words) if word is None else word
    number = words.index(word) if word in words else 0
    stages = [(trace, shown_steps(trace)) for trace in recorder.stages]
    with atomic_folder(folder) as temporary:
        told = [_write_stage(temporary, place, *stage) for place, stage in enumerate(stages)]
        index = {"format": FORMAT, **said, "words": words, "stages": told}
        (temporary / INDEX).write_text(json.dumps(index, indent=1), encoding="utf-8")
        sheet(stages, number, words).save(temporary / SHEET)
        frames, times = animation(stages, number, words)
        frames[0].save(
            temporary / ANIMATION, save_all=True, append_images=frames[1:], duration=times, loop=0, quality=_QUALITY
        )


def _write_stage(folder: Path, place: int, trace: StageTrace, shown: Sequence[Shown]) -> dict[str, Any]:
    """The pictures of a stage; what trace.json holds of it."""
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
