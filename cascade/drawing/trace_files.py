"""A trace as a folder: trace.json, a picture of each quantity at each step, a sheet and an animation."""

from __future__ import annotations

import inspect
import json
import math
import re
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from cascade.diffusion.samplers import SAMPLERS
from cascade.drawing.edit import resized
from cascade.drawing.trace import Recorder, StageTrace
from cascade.errors import CascadeError
from cascade.files.atomic import atomic_folder
from cascade.files.text import read_json_file
from cascade.pictures.format import PictureFormat
from cascade.pictures.rasters import shown as visible

# --- trace pictures --------------------------------------------------------------------------------------------------
# The visible form of a trace: a picture of each quantity at each step, the formulas, a sheet and an animation.

QUANTITIES = {
    "noised": "forward",
    "z": "z_t",
    "x_hat": "x_hat",
    "guidance": "x_cond - x_null",
    "attention": "attention",
}
"""Names in a trace and their labels, in order of display."""
_X_HAT = {
    "eps": "x_hat = (z_t - sqrt(1 - alpha_t) eps_hat) / sqrt(alpha_t)",
    "v": "x_hat = sqrt(alpha_t) z_t - sqrt(1 - alpha_t) v_hat",
    "x": "x_hat is what the network predicts",
    "velocity": "x_hat from velocity_hat = eps - x and z_t",
}
_QUANTILE = 0.995  # of the guidance difference; it sets the scale of a stage's pictures
_CELL, _SMALL, _GAP, _LINE = 256, 128, 6, 18
_COLUMNS = 8
_STEP_MILLISECONDS, _LAST_MILLISECONDS = 220, 1200
_ACCENT, _INK, _FAINT = (70, 81, 196), (34, 33, 29), (150, 145, 135)

Shown = dict[str, Image.Image]
"""The pictures of a step: the `QUANTITIES` that it has; `attention-N` for each word, from 0."""


def shown_steps(trace: StageTrace) -> list[Shown]:
    """The pictures of each step of a stage.

    z is clipped to the range of pictures. The guidance difference is gray at 0, with one scale for all steps of the
    stage. Attention is x_hat, bright where the word receives much of it, with a scale per step.
    """
    differences = [moment.guidance for moment in trace.moments if moment.guidance is not None]
    gain = _reciprocal(max((float(_top(each)) for each in differences), default=0.0))
    steps = []
    pil = partial(_pil, form=trace.stage.config.pictures)
    for moment in trace.moments:
        shown = {"noised": pil(trace.noised(moment)), "z": pil(moment.z), "x_hat": pil(moment.x_hat)}
        if moment.guidance is not None:
            shown["guidance"] = pil(moment.guidance * gain)
        if moment.attention is not None:
            for word, each in enumerate(moment.attention):
                shown[f"attention-{word}"] = pil(_lit(moment.x_hat, each * _reciprocal(float(each.max()))))
        steps.append(shown)
    return steps


def formulas(trace: StageTrace) -> list[dict[str, str]]:
    """The formula of each quantity, the function that computes it, and the source; as in docs/mathematics.md."""
    settings = trace.stage.config.sampling
    sampler = SAMPLERS[settings.sampler.kind]
    residual = " of r = (x - up(low)) / residual_scale" if trace.stage.config.path == "residual" else ""
    return [
        {
            "quantity": "noised",
            "formula": f"z_t = sqrt(alpha_t) x + sqrt(1 - alpha_t) eps{residual}",
            "function": "diffuse",
            "source": "Prince (2023) eq. 18.8",
        },
        {
            "quantity": "z",
            "formula": f"z_s from z_t and x_hat, by {sampler.__name__}{residual}",
            "function": sampler.__name__,
            "source": source_of(inspect.getdoc(sampler) or ""),
        },
        {
            "quantity": "x_hat",
            "formula": f"{_X_HAT[trace.stage.config.parameterization]}{residual}, then guided and thresholded",
            "function": "to_x",
            "source": "docs/mathematics.md, Backward",
        },
        {
            "quantity": "guidance",
            "formula": "x_hat = x_null + w (x_cond - x_null)",
            "function": "guide",
            "source": "Ho & Salimans (2022) eq. 6",
        },
        {
            "quantity": "attention",
            "formula": "softmax(q k^T / sqrt(d)) at the keys of the word, the mean over layers and heads",
            "function": "Attention.text_shares",
            "source": "Saharia et al. (2022) sec. D.1",
        },
    ]


def source_of(documentation: str) -> str:
    """The text after `Source:` in a docstring."""
    match = re.search(r"Source:\s*(.*)", documentation, re.DOTALL)
    return " ".join(match[1].split()).rstrip(".") if match else ""


def sheet(stages: Sequence[tuple[StageTrace, Sequence[Shown]]], word: int, words: Sequence[str]) -> Image.Image:
    """All stages, one below the other: some of the steps as columns, quantities as rows. word: index for attention."""
    blocks = [_block(trace, shown, word, words) for trace, shown in stages]
    whole = Image.new("RGB", (max(one.width for one in blocks), sum(one.height + 2 * _GAP for one in blocks)), "white")
    top = 0
    for block in blocks:
        whole.paste(block, (0, top))
        top += block.height + 2 * _GAP
    return whole


def animation(
    stages: Sequence[tuple[StageTrace, Sequence[Shown]]], word: int, words: Sequence[str]
) -> tuple[list[Image.Image], list[int]]:
    """(frames, milliseconds): each step of each stage, its quantities side by side above an axis of log SNR."""
    names = [name for name in QUANTITIES if any(_key(name, word) in each for _, shown in stages for each in shown)]
    frames, times = [], []
    for trace, shown in stages:
        for step, pictures in enumerate(shown):
            frames.append(_frame(trace, step, {name: pictures.get(_key(name, word)) for name in names}, words[word:]))
            times.append(_LAST_MILLISECONDS if step == len(shown) - 1 else _STEP_MILLISECONDS)
    return frames, times


def _frame(
    trace: StageTrace, step: int, pictures: Mapping[str, Image.Image | None], word: Sequence[str]
) -> Image.Image:
    width = len(pictures) * (_CELL + _GAP) + _GAP
    frame = Image.new("RGB", (width, _CELL + 6 * _LINE), "white")
    pen = ImageDraw.Draw(frame)
    for place, (name, picture) in enumerate(pictures.items()):
        left = _GAP + place * (_CELL + _GAP)
        _write(pen, (left, 2), _label(name, word))
        if picture is not None:
            frame.paste(_fitted(picture, _CELL), (left, _LINE + 4))
    said = f"{trace.stage.name}, step {step + 1} of {len(trace.moments)}"
    _axis(pen, (3 * _GAP, width - 3 * _GAP), _CELL + 3 * _LINE + 8, trace, step)
    _write(pen, (_GAP, _CELL + _LINE + 10), f"{said}, log SNR {trace.moments[step].log_snr:.2f}")
    return frame


def _axis(pen: Any, ends: tuple[int, int], top: int, trace: StageTrace, step: int) -> None:
    """Draw the axis of log SNR from noise to picture: the stage's levels as dots, the current one larger."""
    levels = [moment.log_snr for moment in trace.moments]
    low, high = math.floor(min(levels) / 2) * 2 - 2, math.ceil(max(levels) / 2) * 2 + 2
    left, right = ends

    def place(level: float) -> float:
        return left + (right - left) * (level - low) / (high - low)

    pen.line((left, top, right, top), fill=_FAINT)
    for tick in range(low, high + 1, 2):
        pen.line((place(tick), top - 3, place(tick), top + 3), fill=_FAINT)
        _write(pen, (place(tick) - 8, top + 8), str(tick), _FAINT)
    for number, moment in enumerate(trace.moments):
        radius, x = (6, place(moment.log_snr)) if number == step else (2, place(moment.log_snr))
        pen.ellipse((x - radius, top - radius, x + radius, top + radius), fill=_ACCENT)


def _block(trace: StageTrace, shown: Sequence[Shown], word: int, words: Sequence[str]) -> Image.Image:
    count = min(_COLUMNS, len(shown))
    columns = [round(place * (len(shown) - 1) / max(1, count - 1)) for place in range(count)]
    names = [name for name in QUANTITIES if any(_key(name, word) in each for each in shown)]
    left, top, pitch = 120, 2 * _LINE + 4, _SMALL + _GAP
    told = {each["quantity"]: each for each in formulas(trace)}
    block = Image.new("RGB", (left + _COLUMNS * pitch, top + len(names) * (pitch + _LINE)), "white")
    pen = ImageDraw.Draw(block)
    height, width = trace.moments[-1].x_hat.shape[-2:]
    _write(pen, (_GAP, 2), f"{trace.stage.name}, {width} x {height}, {len(shown)} steps")
    for place, step in enumerate(columns):
        _write(pen, (left + place * pitch, _LINE + 2), f"log SNR {trace.moments[step].log_snr:.1f}", _FAINT)
    for row, name in enumerate(names):
        y = top + row * (pitch + _LINE)
        _write(pen, (_GAP, y + _SMALL // 2), _label(name, words[word:]))
        for place, step in enumerate(columns):
            picture = shown[step].get(_key(name, word))
            if picture is not None:
                block.paste(_fitted(picture, _SMALL), (left + place * pitch, y))
        _write(pen, (left, y + _SMALL + 1), f"{told[name]['formula']}   [{told[name]['source']}]", _FAINT)
    return block


def _key(name: str, word: int) -> str:
    return f"attention-{word}" if name == "attention" else name


def _label(name: str, word: Sequence[str]) -> str:
    return f'to "{word[0]}"' if name == "attention" and word else QUANTITIES[name]


def _write(pen: Any, place: tuple[float, float], text: str, colour: tuple[int, int, int] = _INK) -> None:
    pen.text(place, text.encode("ascii", "replace").decode(), fill=colour, font=ImageFont.load_default(size=12))


def _fitted(picture: Image.Image, cell: int) -> Image.Image:
    """The picture in a square: pixels repeated if it is small, so that they are visible; area means if it is large."""
    scale = cell / max(picture.size)
    size = max(1, round(picture.width * scale)), max(1, round(picture.height * scale))
    return picture.resize(size, Image.Resampling.NEAREST if scale >= 1 else Image.Resampling.BOX)


def _lit(picture: Tensor, share: Tensor) -> Tensor:
    """A picture (C, H, W), darkened where a share (h, w) in [0, 1] is 0."""
    light = resized(share[None, None], (picture.shape[-2], picture.shape[-1]))[0].clamp(0, 1)
    return (picture.clamp(-1, 1) + 1) * (0.15 + 0.85 * light) - 1


def _top(difference: Tensor) -> Tensor:
    values = difference.abs().flatten()
    return values.kthvalue(max(1, round(_QUANTILE * len(values)))).values


def _reciprocal(value: float) -> float:
    return 1 / value if value > 0 else 0.0


def _pil(picture: Tensor, form: PictureFormat) -> Image.Image:
    return visible(form.from_float(picture), form)


# --- trace files -----------------------------------------------------------------------------------------------------

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
