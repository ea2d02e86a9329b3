"""What became of the settings since a checkpoint, and which of the changes matter.

Every setting belongs to one of three kinds, by the longest entry below that begins its name:
- `OTHER_RUN`: the weights would mean something else or not fit; a resume is refused and `init_from` named;
- `OTHER_RESULT`: the run goes on, but ends elsewhere than it would have; a warning says so;
- `SAME_RESULT`: the weights are what they would have been; said in passing.
"""

from __future__ import annotations

from collections.abc import Iterator
from enum import Enum
from pathlib import Path
from typing import Any

from cascade.config.training import TrainConfig
from cascade.errors import CascadeError
from cascade.settings import parse


class Effect(Enum):
    """What a changed setting does to a run that goes on with it."""

    OTHER_RUN = "another run"
    OTHER_RESULT = "another result"
    SAME_RESULT = "the same result"


EFFECTS: dict[str, Effect] = {
    "format": Effect.OTHER_RUN,
    "output": Effect.SAME_RESULT,
    # What the weights are weights of.
    "stage": Effect.OTHER_RUN,
    "stage.name": Effect.SAME_RESULT,
    "stage.resolution": Effect.OTHER_RESULT,
    "stage.schedule": Effect.OTHER_RESULT,
    "stage.model.dropout": Effect.OTHER_RESULT,
    "stage.sampling": Effect.SAME_RESULT,
    "stage.presets": Effect.SAME_RESULT,
    # The meaning of a text; another encoder may be the same one in another folder, so it is only a warning.
    "text": Effect.OTHER_RESULT,
    "text.cache": Effect.SAME_RESULT,
    "data": Effect.OTHER_RESULT,
    "data.max_bad_share": Effect.SAME_RESULT,
    "data.workers": Effect.SAME_RESULT,
    "data.decoded": Effect.SAME_RESULT,
    "training": Effect.OTHER_RESULT,
    "training.init_from": Effect.SAME_RESULT,  # it was read once, at the start
    "training.lora_rank": Effect.OTHER_RUN,
    "training.lora_layers": Effect.OTHER_RUN,
    "training.optimizer.kind": Effect.OTHER_RUN,
    "training.log_every": Effect.SAME_RESULT,
    "training.sample_every": Effect.SAME_RESULT,
    "training.sample_prompts": Effect.SAME_RESULT,
    "training.sample_count": Effect.SAME_RESULT,
    "training.save_every": Effect.SAME_RESULT,
    "training.keep_checkpoints": Effect.SAME_RESULT,
    "training.trackers": Effect.SAME_RESULT,
    "training.validation": Effect.SAME_RESULT,
}

_NOTES = {
    "training.batch_size": "the data goes on at view step x batch_size, so views are skipped or seen again",
    "training.accumulation": "the steps are the same up to rounding, but for dropout's masks",
    "training.steps": "with a decay, the learning rate of every step left follows from it",
    "text.encoder": "the embeddings must be the same, or the network has learnt another language",
    "training.seed": "order, crops and noise are drawn anew from here on",
}


def check_changes(saved: dict[str, Any], config: TrainConfig, origin: Path) -> list[str]:
    """A line for each kind of change that a run can go on with. saved: the settings in the checkpoint `origin`.

    Raises CascadeError for changes that make it another run.
    """
    changed: dict[Effect, list[str]] = {effect: [] for effect in Effect}
    for name, line in differences(_complete(saved), config.model_dump(mode="json")):
        note = _NOTES.get(name)
        changed[effect_of(name)].append(f"{line} ({note})" if note else line)
    if changed[Effect.OTHER_RUN]:
        raise CascadeError(
            f"{origin}: cannot go on with {'; '.join(changed[Effect.OTHER_RUN])}: the checkpoint's weights belong to"
            f" other settings; start a new run with training.init_from={origin.parents[1]}, or put the setting back"
        )
    said = {
        Effect.OTHER_RESULT: "settings changed since the checkpoint, so the run will end elsewhere than it would have",
        Effect.SAME_RESULT: "settings changed since the checkpoint that leave the weights as they would have been",
    }
    return [f"{origin}: {text}: {'; '.join(changed[effect])}" for effect, text in said.items() if changed[effect]]


def check_surroundings(saved: dict[str, Any], now: dict[str, Any], origin: Path) -> list[str]:
    """A line when the torch version or the number of processes is another: bits depend on both, the result hardly.

    saved, now: `torch` and `processes`; what an earlier version did not keep is not compared.
    """
    changed = [f"{name}: {saved[name]} -> {value}" for name, value in now.items() if saved.get(name, value) != value]
    if not changed:
        return []
    return [f"{origin}: {'; '.join(changed)}: the run goes on, but not bit for bit as it would have"]


def effect_of(name: str) -> Effect:
    """What a change of the setting `name`, such as `training.seed`, does."""
    parts = name.split(".")
    prefixes = (".".join(parts[:count]) for count in range(len(parts), 0, -1))
    return next(EFFECTS[prefix] for prefix in prefixes if prefix in EFFECTS)


def differences(old: Any, new: Any, name: str = "") -> Iterator[tuple[str, str]]:
    """The name of each setting that differs, and a line such as `training.batch_size: 16 -> 32`."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in [*old, *(key for key in new if key not in old)]:
            yield from differences(old.get(key), new.get(key), f"{name}.{key}" if name else key)
    elif old != new:
        yield name, f"{name}: {old} -> {new}"


def _complete(saved: dict[str, Any]) -> dict[str, Any]:
    """Settings of an earlier version, with the defaults of those that it did not have; unreadable ones as they are."""
    try:
        return parse(TrainConfig, saved, "checkpoint").model_dump(mode="json")
    except CascadeError:
        return saved
