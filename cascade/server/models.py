"""The available models, and a model's card as shown on the page: stages, settings, examples and style words."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from cascade._version import __version__
from cascade.conditions.settings import ClassCondition, ConditionConfig, NumberCondition
from cascade.config.sampling import SamplingConfig
from cascade.config.values import PRESETS, SETTINGS
from cascade.diffusion.samplers import SAMPLERS
from cascade.drawing.arguments import common_step, resolve_sampling
from cascade.drawing.slots import StageSlot
from cascade.errors import CascadeError, quoted
from cascade.files.text import read_text
from cascade.pipeline import CascadePipeline
from cascade.server.asked import LONGEST_PROMPT, MOST_PICTURES, MOST_PIXELS
from cascade.settings import parse_yaml
from cascade.storage.index import find_model, read_index
from cascade.storage.pipeline import with_adapters
from cascade.storage.stage import WEIGHTS, Adapter, AdapterLike, read_adapters

Load = Callable[[str | None], CascadePipeline]
Fixed = Callable[[str | None], Mapping[str, AdapterLike]]
_COMBINATIONS = 8  # of adapters whose stages are remembered, so that requests of equal ones share a batch
SIGN = "cascade.json"
BUNDLED = "bundled"


class Models:
    """Models by the name of their folder; an unknown name in a request does not reach the disk."""

    def __init__(
        self,
        load: Load,
        first: str | None = None,
        folder: Path | None = None,
        *,
        adapters: Path | None = None,
        fixed: Fixed = lambda _: {},
    ) -> None:
        """load: loads a folder or hub id, None: the bundled model. folder: its subfolders are further models.

        adapters: a folder of adapters that requests may name. fixed: those that `load` adds, by stage.
        """
        self._adapters, self._fixed = adapters, fixed
        self._equipped: Adapters | None = None
        self._load, self._first, self._folder = load, first, folder
        self.current = BUNDLED if first is None else Path(first).name or first
        self.lock = threading.RLock()
        """Held while `current` and the queue's model change together."""
        self._titles: dict[str, str] = {}

    def names(self) -> list[str]:
        """Names of all models, the current one first."""
        return [self.current, *(name for name in self._places() if name != self.current)]

    def ids(self, pipeline: CascadePipeline | None) -> dict[str, str]:
        """Names by the id of each model in OpenAI's API: the name in its cascade.json, which its pictures record.

        A model without a readable one, or with that of another model, has its folder's name. pipeline: of the current
        model, None if it could not be loaded.
        """
        with self.lock:
            if pipeline is not None:
                self._titles[self.current] = pipeline.name
            titles = {name: self._title(name) for name in self.names()}
        count = Counter(titles.values())
        return {title if count[title] == 1 else name: name for name, title in titles.items()}

    def _title(self, name: str) -> str:
        place = self._places().get(name)
        if name not in self._titles and (place is None or Path(place).is_dir()):  # nothing is downloaded for a list
            try:
                self._titles[name] = read_index(place).name
            except CascadeError:  # reported when it is chosen
                return name
        return self._titles.get(name, name)

    def choose(self, name: str) -> Callable[[], CascadePipeline]:
        """Make a model the current one; returns the function that loads it. Raises CascadeError for an unknown name."""
        places = self._places()
        if name not in places:
            raise CascadeError(f"name: {quoted(name)}; expected one of {', '.join(map(quoted, places))}")
        self.current = name
        return lambda: self._loaded(places[name])

    def adapters_of(self, pipeline: CascadePipeline) -> Adapters | None:
        """The adapters that requests may add to a loaded model; None without a folder of adapters."""
        equipped = self._equipped
        return equipped if equipped is not None and equipped.pipeline is pipeline else None

    def _loaded(self, place: str | None) -> CascadePipeline:
        self._equipped = None  # which holds the model before
        pipeline = self._load(place)
        if self._adapters is not None:
            self._equipped = Adapters(self._adapters, pipeline, place, self._fixed(place))
        return pipeline

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


class Adapters:
    """Low-rank adapters that a request may add to the first stage of a model, by the name of their folder."""

    def __init__(
        self, folder: Path, pipeline: CascadePipeline, place: str | None, fixed: Mapping[str, AdapterLike]
    ) -> None:
        """folder: its subfolders are adapters, or training runs with one. place, fixed: see `Models`."""
        stages = [slot.config.name for slot in pipeline.slots]
        self.pipeline = pipeline
        self._folder, self._stage = folder, stages[0]
        self._adapt = with_adapters(pipeline, place)
        self._fixed = read_adapters(fixed, stages)
        self._remembered: dict[tuple[tuple[str, float], ...], list[StageSlot]] = {}
        self._lock = threading.Lock()

    def every(self) -> dict[str, Adapter]:
        """The adapters that are there now, by name."""
        folders = sorted(self._folder.iterdir()) if self._folder.is_dir() else []
        found = {path.name: path / "adapter" if (path / "config.yaml").is_file() else path for path in folders}
        return {name: Adapter(path) for name, path in found.items() if (path / WEIGHTS).is_file()}

    def named(self, recorded: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
        """Scales by name, of a recipe's adapters; without those that the model has anyway, or that are not here."""
        own = recorded.get(self._stage, {})
        fixed = {one.digest for one in self._fixed.get(self._stage, ())}
        names = {adapter.digest: name for name, adapter in self.every().items()} if own else {}
        return {names[digest]: scale for digest, scale in own.items() if digest in names and digest not in fixed}

    def slots(self, scales: Mapping[str, float]) -> list[StageSlot]:
        """The stages with adapters at these scales, besides those that the model has anyway. Raises CascadeError."""
        known = self.every()
        for name in scales:
            if name not in known:
                names = ", ".join(map(quoted, known)) or "none"
                raise CascadeError(f"adapters: {quoted(name)}; expected one of {names}")
        added = tuple(replace(known[name], scale=scale) for name, scale in sorted(scales.items()) if scale)
        several = (*self._fixed.get(self._stage, ()), *added)
        key = tuple((one.digest, one.scale) for one in several)
        if len({digest for digest, _ in key}) < len(key):
            raise CascadeError("adapters: one is named twice, or is part of the model already")
        with self._lock:
            if key not in self._remembered:
                self._remembered[key] = self._adapt({**self._fixed, self._stage: several})
                for old in tuple(self._remembered)[:-_COMBINATIONS]:
                    del self._remembered[old]
            return self._remembered[key]


# --- card ------------------------------------------------------------------------------------------------------------
# The model as shown on the page: stages and settings, and the examples and style words of its model card.


def model_card(pipeline: CascadePipeline, folder: Path | None, adapters: Adapters | None = None) -> dict[str, Any]:
    """Everything that a form needs for a model. folder: of its README.md. adapters: those that requests may name."""
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
        "loras": [] if adapters is None else list(adapters.every()),
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
