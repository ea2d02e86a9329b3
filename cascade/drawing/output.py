"""The result of a pipeline call (pictures in the requested type), and reports of its progress."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Self

from torch import Tensor
from tqdm.auto import tqdm

from cascade.drawing.task import Step
from cascade.errors import CascadeError, quoted
from cascade.pictures.format import RGB, PictureFormat
from cascade.pictures.images import contact_sheet
from cascade.pictures.rasters import as_pil, has_pil_mode

_COLUMNS = 4
_SHOWN = 1024
"""Maximum number of pictures side by side in a notebook, and maximum width of all of them in pixels."""

Callback = Callable[[str, int, int, Tensor], None]
"""callback(stage, step, steps, x_hat) after each step, x_hat (B, 3, H, W) in about [-1, 1]."""


@dataclass(frozen=True)
class CascadeOutput:
    """The pictures of a call: all pictures of the first prompt, then of the second, and so on.

    images: those of the last stage that ran. stages: {resolution: pictures}, the last stage included. `seeds` and
    `prompts` have one entry per picture. Types follow `output_type`.
    """

    images: Any
    stages: dict[int, Any]
    seeds: list[int]
    prompts: list[str]

    def _repr_png_(self) -> bytes | None:
        """The picture for a notebook, several on a sheet; None if the pictures are not PIL images."""
        pictures = self.images if isinstance(self.images, list) else []
        if not pictures:
            return None
        buffer = io.BytesIO()
        columns = min(len(pictures), _COLUMNS)
        cell = min(max(max(picture.size) for picture in pictures), _SHOWN // columns)
        (pictures[0] if len(pictures) == 1 else contact_sheet(pictures, columns, cell=cell)).save(buffer, format="PNG")
        return buffer.getvalue()

    def _repr_html_(self) -> str | None:
        """The same with the prompt and seed of each picture below it."""
        png = self._repr_png_()
        if png is None:
            return None
        lines = dict.fromkeys(zip(self.prompts, self.seeds, strict=False))
        entries = "".join(f"<li>{html.escape(prompt)} <small>seed {seed}</small></li>" for prompt, seed in lines)
        return f'<img src="data:image/png;base64,{base64.b64encode(png).decode()}"><ul>{entries}</ul>'

    @classmethod
    def of(
        cls,
        drawn: Mapping[int, Tensor],
        output_type: str,
        seeds: list[int],
        prompts: list[str],
        form: PictureFormat = RGB,
    ) -> Self:
        """An output from the pictures of each stage, stored values (B, C, H, W) of `form`, the largest last."""
        stages = {resolution: as_type(pixels, output_type, form) for resolution, pixels in drawn.items()}
        return cls(stages[max(stages)], stages, seeds, prompts)


def as_type(pixels: Tensor, output_type: str, form: PictureFormat = RGB) -> Any:
    """Stored values (B, C, H, W) as PIL pictures, NumPy (B, H, W, C) of the same type, or torch float32 in [-1, 1]."""
    match output_type:
        case "pil":
            return [as_pil(picture, form) for picture in pixels]
        case "np":
            return pixels.permute(0, 2, 3, 1).contiguous().numpy()
        case _:
            return form.to_float(pixels)


def check_output_arguments(output_type: str, callback: Callback | None, form: PictureFormat = RGB) -> None:
    """Raises CascadeError for an output type that is unknown or cannot hold `form`, and for a callback that is none."""
    if callback is not None and not callable(callback):
        raise CascadeError(f"callback: {quoted(callback)}; expected a function (stage, step, steps, x_hat)")
    if output_type not in ("pil", "np", "pt"):
        raise CascadeError(f'output_type: {quoted(output_type)}; expected "pil", "np" or "pt"')
    if output_type == "pil" and not has_pil_mode(form):
        raise CascadeError(f'output_type: "pil" cannot hold {form}; choose "np" or "pt"')


class Watcher:
    """Progress of a call: a bar for each stage, the caller's callback, or neither. Used with `with`."""

    def __init__(self, progress: bool, callback: Callback | None) -> None:
        self._progress, self._callback = progress, callback
        self._bar: tqdm[Any] | None = None

    def __enter__(self) -> Watcher:
        return self

    def __exit__(self, *_error: object) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def step(self, step: Step) -> None:
        """Report a finished step."""
        if self._progress:
            self._count(step)
        if self._callback is not None:
            self._callback(step.stage, step.step, step.steps, step.x_hat)

    def _count(self, step: Step) -> None:
        if (step.batch, step.step) == (0, 0):
            self.__exit__()
            self._bar = tqdm(total=step.steps * step.batches, desc=step.stage, unit="step")
        if self._bar is not None:
            self._bar.update()
