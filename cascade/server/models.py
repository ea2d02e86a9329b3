"""The available models, and a model's card as shown on the page: stages, settings, examples and style words."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from cascade._version import __version__
from cascade.conditions.settings import ClassCondition, ConditionConfig, NumberCondition
from cascade.config.sampling import SamplingConfig
from cascade.config.values import PRESETS, SETTINGS
from cascade.diffusion.samplers import SAMPLERS
from cascade.drawing.arguments import common_step, resolve_sampling
from cascade.errors import CascadeError, quoted
from cascade.files.text import read_text
from cascade.pipeline import CascadePipeline
from cascade.server.asked import LONGEST_PROMPT, MOST_PICTURES, MOST_PIXELS
from cascade.settings import parse_yaml
from cascade.storage.index import find_model

Load = Callable[[str | None], CascadePipeline]
SIGN = "cascade.json"
BUNDLED = "bundled"


class Models:
    """Models by the name of their folder; an unknown name in a request does not reach the disk."""

    def __init__(self, load: Load, first: str | None = None, folder: Path | None = None) -> None:
        """load: loads a folder or hub id, None: the bundled model. folder: its subfolders are further models."""
        self._load, self._first, self._folder = load, first, folder
        self.current = BUNDLED if first is None else Path(first).name or first

    def names(self) -> list[str]:
        """Names of all models, the current one first."""
        return [self.current, *(name for name in self._places() if name != self.current)]

    def choose(self, name: str) -> Callable[[], CascadePipeline]:
        """Make a model the current one; returns the function that loads it. Raises CascadeError for an unknown name."""
        places = self._places()
        if name not in places:
            raise CascadeError(f"name: {quoted(name)}; expected one of {', '.join(map(quoted, places))}")
        self.current = name
        return lambda: self._load(places[name])

    def card(self) -> Path | None:
        """The folder of the current model's card."""
        return find_model(self._places()[self.current])

    def _places(self) -> dict[str, str | None]:
        found: dict[str, str | None] = (
            {} if self._first is None else {Path(self._first).name or self._first: self._first}
        )
        for path in sorted(self._folder.iterdir()) if self._folder is not None and self._folder.is_dir() else ():
            if (path / SIGN).is_file():
                found.setdefault(path.name, str(path))
        return {**found, BUNDLED: None} if BUNDLED not in found else found


# --- card ------------------------------------------------------------------------------------------------------------
# The model as shown on the page: stages and settings, and the examples and style words of its model card.


def model_card(pipeline: CascadePipeline, folder: Path | None) -> dict[str, Any]:
    """Everything that a form needs for a model. folder: of its README.md."""
    configs = [slot.config for slot in pipeline.slots]
    presets = ["default", *(name for name in PRESETS if any(name in config.presets for config in configs))]
    said = {} if folder is None else front_matter(folder / "README.md")
    conditions = {name: condition for config in configs for name, condition in config.conditions.items()}
    resolved = {name: resolve_sampling(configs, name, {}) for name in presets}
    return {
        "name": pipeline.name,
        "license": pipeline.license,
        "version": __version__,
        "device": pipeline.device.type,
        "dtype": str(pipeline.dtype).removeprefix("torch."),
        "stages": [
            {"name": config.name, "resolution": config.resolution, "multiple": common_step(configs[: place + 1])}
            for place, config in enumerate(configs)
        ],
        "enlargers": [
            {"name": slot.config.name, "resolution": slot.config.resolution}
            for slot in pipeline.enlargers
            if slot.config.low_resolution is not None
        ],
        "reads_text": any(config.model.reads_text for config in configs),
        "conditions": [_field(name, config) for name, config in conditions.items()],
        "adapters": {slot.config.name: list(slot.adapters.values()) for slot in pipeline.slots if slot.adapters},
        "presets": {name: {stage: _shown(own) for stage, own in stages.items()} for name, stages in resolved.items()},
        "samplers": list(SAMPLERS),
        **examples_of(said),
        "limits": {"prompt": LONGEST_PROMPT, "pictures": MOST_PICTURES, "pixels": MOST_PIXELS},
    }


def _field(name: str, config: ConditionConfig) -> dict[str, Any]:
    """A condition as a form shows it. values: in words. default: None if it must be given."""
    shown: dict[str, Any] = {"name": name, "kind": config.kind, "values": config.described, "default": config.default}
    match config:
        case ClassCondition(labels=labels):
            return {**shown, "labels": list(labels)}
        case NumberCondition(range=(low, high)):
            return {**shown, "range": [low, high]}
    return shown


def front_matter(path: Path) -> Mapping[str, Any]:
    """The YAML between two lines of dashes at the top of a model card, in the format of the Hugging Face hub; else {}.

    `widget` holds example prompts ({"text": ...}), `styles` style words.
    """
    try:
        text = read_text(path)
        head = text.split("---\n", 2)[1] if text.startswith("---\n") else ""
        said = parse_yaml(head)
    except (OSError, ValueError, IndexError):
        return {}
    return said if isinstance(said, Mapping) else {}


def examples_of(said: Mapping[str, Any]) -> dict[str, list[str]]:
    """The example prompts and style words in a front matter, which may hold anything."""
    prompts = [example.get("text") for example in _list(said, "widget") if isinstance(example, Mapping)]
    styles = _list(said, "styles")
    return {
        "examples": [prompt for prompt in prompts if isinstance(prompt, str)],
        "styles": [style for style in styles if isinstance(style, str)],
    }


def _list(said: Mapping[str, Any], name: str) -> list[Any]:
    values = said.get(name)
    return values if isinstance(values, list) else []


def _shown(settings: SamplingConfig) -> dict[str, Any]:
    values = {**settings.model_dump(mode="json"), "sampler": settings.sampler.kind}
    return {name: values[name] for name in SETTINGS}
