"""Settings that changed since a checkpoint, and the effect of each change on a resumed run.

Every setting has one of three effects, given by the longest entry below that begins its name:
- `OTHER_RUN`: the weights would have another meaning or not fit; a resume is refused with a hint to `init_from`;
- `OTHER_RESULT`: the run continues, with a warning that its result will differ;
- `SAME_RESULT`: the weights are unaffected; the change is logged.
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
    """The effect of a changed setting on a resumed run."""

    OTHER_RUN = "another run"
    OTHER_RESULT = "another result"
    SAME_RESULT = "the same result"


EFFECTS: dict[str, Effect] = {
    "format": Effect.OTHER_RUN,
    "output": Effect.SAME_RESULT,
    # The network that the weights belong to.
    "stage": Effect.OTHER_RUN,
    "stage.name": Effect.SAME_RESULT,
    "stage.resolution": Effect.OTHER_RESULT,
    "stage.schedule": Effect.OTHER_RESULT,
    "stage.model.dropout": Effect.OTHER_RESULT,
    "stage.sampling": Effect.SAME_RESULT,
    "stage.presets": Effect.SAME_RESULT,
    # The embeddings of texts; only a warning, since the same encoder may be in another folder.
    "text": Effect.OTHER_RESULT,
    "text.cache": Effect.SAME_RESULT,
    "data": Effect.OTHER_RESULT,
    "data.max_bad_share": Effect.SAME_RESULT,
    "data.workers": Effect.SAME_RESULT,
    "data.decoded": Effect.SAME_RESULT,
    "training": Effect.OTHER_RESULT,
    "training.init_from": Effect.SAME_RESULT,  # read only at the start
    "training.distill.teacher": Effect.SAME_RESULT,  # the same stage may have moved
    "training.lora_rank": Effect.OTHER_RUN,
    "training.lora_kind": Effect.OTHER_RUN,
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
    "training.batch_size": "the data continues at view step x batch_size, so views are skipped or repeated",
    "training.accumulation": "the steps are the same up to rounding, except for dropout's masks",
    "training.steps": "with a decay, it changes the learning rate of every remaining step",
    "text.encoder": "the network needs the embeddings that it was trained with",
    "training.seed": "order, crops and noise differ from here on",
}


def check_changes(saved: dict[str, Any], config: TrainConfig, origin: Path) -> list[str]:
    """One line for each kind of permitted change. saved: the settings in the checkpoint `origin`.

    Raises CascadeError for changes with the effect `OTHER_RUN`.
    """
    changed: dict[Effect, list[str]] = {effect: [] for effect in Effect}
    for name, line in differences(_complete(saved), config.model_dump(mode="json")):
        note = _NOTES.get(name)
        changed[_effect_of_any(name)].append(f"{line} ({note})" if note else line)
    if changed[Effect.OTHER_RUN]:
        raise CascadeError(
            f"{origin}: cannot resume with {'; '.join(changed[Effect.OTHER_RUN])}: the checkpoint's weights belong to"
            f" other settings; start a new run with training.init_from={origin.parents[1]}, or restore the setting"
        )
    said = {
        Effect.OTHER_RESULT: "settings changed since the checkpoint, so the result will differ",
        Effect.SAME_RESULT: "settings changed since the checkpoint, without effect on the weights",
    }
    return [f"{origin}: {text}: {'; '.join(changed[effect])}" for effect, text in said.items() if changed[effect]]


def check_surroundings(saved: dict[str, Any], now: dict[str, Any], origin: Path) -> list[str]:
    """A line if the torch version or the number of processes changed, on which the last bits of a result depend.

    saved, now: `torch` and `processes`; values missing in checkpoints of an earlier version are not compared.
    """
    changed = [f"{name}: {saved[name]} -> {value}" for name, value in now.items() if saved.get(name, value) != value]
    if not changed:
        return []
    return [f"{origin}: {'; '.join(changed)}: the run continues, but not bit for bit as before"]


def effect_of(name: str) -> Effect:
    """The effect of a change of the setting `name`, such as `training.seed`. Raises KeyError for an unknown section."""
    parts = name.split(".")
    prefixes = (".".join(parts[:count]) for count in range(len(parts), 0, -1))
    found = next((EFFECTS[prefix] for prefix in prefixes if prefix in EFFECTS), None)
    if found is None:
        raise KeyError(name)
    return found


def _effect_of_any(name: str) -> Effect:
    """`effect_of`; of a setting that this version lacks, another result."""
    try:
        return effect_of(name)
    except KeyError:
        return Effect.OTHER_RESULT


def differences(old: Any, new: Any, name: str = "") -> Iterator[tuple[str, str]]:
    """The name of each setting that differs, and a line such as `training.batch_size: 16 -> 32`."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in [*old, *(key for key in new if key not in old)]:
            yield from differences(old.get(key), new.get(key), f"{name}.{key}" if name else key)
    elif old != new:
        yield name, f"{name}: {old} -> {new}"


def _complete(saved: dict[str, Any]) -> dict[str, Any]:
    """Settings of an earlier version, with defaults for newer settings; unreadable ones are returned unchanged."""
    try:
        return parse(TrainConfig, saved, "checkpoint").model_dump(mode="json")
    except CascadeError:
        return saved
