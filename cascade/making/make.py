"""From a folder of pictures to a cascade, in steps that each look at what is there and do only what is missing."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from cascade.config.data import DataConfig
from cascade.config.stage import StageConfig
from cascade.config.training import TrainConfig
from cascade.data.loader import Views
from cascade.data.sources import open_records
from cascade.drawing.slots import StageSlot
from cascade.errors import CascadeError
from cascade.evaluation.tower import load_tower
from cascade.files.atomic import read_json, write_json, write_text
from cascade.making import trials as sweeping
from cascade.making.look import Look, look_at, measure
from cascade.making.plan import LEAST_STEPS, Folder, Planned, choose, lines, shares_of, shortened, training_run
from cascade.making.trials import Trial, write_redrawn
from cascade.pictures.images import to_float
from cascade.pipeline import CascadePipeline
from cascade.settings import parse, to_yaml
from cascade.storage.diffusers import is_diffusers
from cascade.storage.index import BUNDLED, read_index
from cascade.storage.pipeline import LoadOptions, assemble, load_pipeline
from cascade.storage.saving import Card
from cascade.storage.stage import load_stage, read_config
from cascade.storage.training import (
    encoder_settings,
    load_plain_text_encoder,
    load_train_config,
    load_trainer,
    open_cache,
)
from cascade.text.cached import fill
from cascade.training.log import duration
from cascade.training.state import checkpoints, is_own_settings

logger = logging.getLogger("cascade.making")

SHARE_DRAWN = 0.25
"""Share of a super-resolution stage's views whose smaller picture the stages before drew."""
SHOWN = 12
"""Prompts on the card's sheet."""
MOST_SWEPT = 48
"""Captions that the sweep draws at most."""
_BATCH = 8  # pictures in a step of further training
_FURTHER_SHARE = 0.8  # of the time, for training a given base stage further; the rest tries settings and draws
MOST_VIEWS = 500
"""Views of each picture in further training at most: ten pictures, for instance, are learned by then, and any more
views only teach the stage to draw those ten."""
_KEPT_PICTURES, _KEPT_SHARE = 128, 0.5  # drawings of what must not be forgotten, and their share of the views
_FORWARD = 1 / 3  # of a training step's time
KEPT = (
    "a {red|blue|green|yellow|black|purple} {circle|square|triangle|star|heart|cross|ring}, drawn shapes",
    "two {red|blue|green|yellow} {circles|squares|stars|hearts}, drawn shapes",
    "{a cat|a dog|a fox|a bird|a fish|a face|a robot|an apple|a strawberry|a car|a house|a tree},"
    " {noto style|twemoji style|fluent 3d style|fluent flat style}",
)
"""What the bundled base stage should not forget: of all that it draws, a little each."""


@dataclass(frozen=True)
class Order:
    """What to make. hours: for training and everything else. start: a model whose weights to start from, or None.

    whole: with `start`, train all weights of its base stage and not a low-rank adapter. keep: with `start`, prompts of
    what its base stage must not forget (prior preservation). say: prints a line.
    """

    pictures: Path
    out: Path
    hours: float
    name: str
    license: str
    start: str | None = None
    whole: bool = False
    keep: tuple[str, ...] = ()
    say: Callable[[str], None] = print


def make(order: Order, plan_only: bool = False) -> bool:
    """Make a cascade, or continue one. False if it was asked to stop; the same call continues.

    plan_only: look, measure and write the YAML files, then end. Raises CascadeError for pictures that do not suffice.
    """
    folder, begun = Folder(order.out), time.monotonic()
    _check_start(order, folder)
    look = look_at(order.pictures)
    order.say("\n".join(look.lines()))
    names = _planned_names(folder)
    if not names:
        names = _write_plan(order, look, folder)
    else:
        order.say(f"{order.out}: continuing with {', '.join(f'{name}.yaml' for name in names)}")
    if plan_only:
        return True
    for place, name in enumerate(names):
        left = 3600 * order.hours - (time.monotonic() - begun)
        _shorten(order, folder, names[place:], left)
        if not _train(order, look, folder, names[:place], name):
            return False
    pipeline = _assembled(order, folder, names)
    trials = _swept(order, look, folder, pipeline)
    _save(order, look, folder, pipeline, trials)
    return True


def _check_start(order: Order, folder: Folder) -> None:
    """Raise CascadeError for a model that is not there, and for a plan that was made from other weights."""
    if order.start is not None:
        read_index(order.start)
    path = folder.root / "plan.json"
    planned = read_json(path).get("start") if path.exists() else order.start
    if planned != order.start:
        began = f"with --from {planned}" if planned else "without --from"
        raise CascadeError(f"{order.out}: was begun {began}; repeat that, or name another folder with --out")


def _planned_names(folder: Folder) -> list[str]:
    """The stages of the plan in the folder, smallest first; none before there is one."""
    path = folder.root / "plan.json"
    return [str(name) for name in read_json(path)["stages"]] if path.exists() else []


def _write_plan(order: Order, look: Look, folder: Folder) -> list[str]:
    """Measure and choose, print the plan, write a YAML file for each stage, and plan.json last."""
    folder.root.mkdir(parents=True, exist_ok=True)
    _fill_text(look, folder, _text_of(order))
    seconds = 3600 * order.hours
    begun = time.monotonic()
    runs = _continued(order, look, folder, seconds) if order.start else choose(look, folder, seconds)
    spent = time.monotonic() - begun
    order.say("\n".join(["the plan:", *lines(runs)]))
    expected = spent + sum(run.seconds for run in runs)
    order.say(
        f"  training takes about {duration(expected)} of {duration(seconds)}, if the machine stays as busy as now"
    )
    steps = {run.config.stage.name: run.config.training.steps for run in runs}
    for run in runs:
        path = folder.settings(run.config.stage.name)
        if path.exists() and not is_own_settings(path):
            raise CascadeError(f"{path}: is not part of a plan; move it, or name another folder with --out")
        write_text(path, to_yaml(run.config))
    plan = {"stages": list(steps), "steps": steps, "hours": order.hours, "start": order.start}
    write_json(folder.root / "plan.json", plan)
    return list(steps)


def _text_of(order: Order) -> dict[str, Any]:
    """The text encoder, and how it reads: those of the model to start from, so that its other stages fit as well."""
    if order.start is None:
        return {"encoder": "bundled"}
    index = read_index(order.start)
    own = index.text_encoder == BUNDLED / "text_encoder"
    encoder = "bundled" if own else str(index.text_encoder)
    return {"encoder": encoder, **index.reading.model_dump(mode="json")}


def _fill_text(look: Look, folder: Folder, text: Mapping[str, Any]) -> None:
    """Encode every caption once."""
    stage = StageConfig(name="text", resolution=16)
    settings = training_run(stage, look, folder, LEAST_STEPS, {"batch_size": 1}, text).text
    encoder = load_plain_text_encoder(settings)
    cache = open_cache(folder.text, encoder)
    cache.note_settings(encoder_settings(settings))
    fill(cache, encoder, look.found.captions)


def _continued(order: Order, look: Look, folder: Folder, seconds: float) -> list[Planned]:
    """The base stage of an existing model, to be trained further; its other stages stay as they are."""
    assert order.start is not None
    source = read_index(order.start).stages[0]
    stage = read_config(source)
    if look.short_side < stage.resolution:
        order.say(
            f"  the pictures are about {look.short_side} px, and {stage.name} draws {stage.resolution} px: blurred"
        )
    pace = measure(_further(replace(order, keep=()), look, folder, source, LEAST_STEPS), folder.scratch)
    steps, enough = int(seconds * _FURTHER_SHARE / pace.seconds), MOST_VIEWS * look.usable // _BATCH
    if order.keep:
        calls = stage.sampling.steps * (1 if stage.sampling.guidance == 1 else 2)
        spent = int(calls * _FORWARD * _KEPT_PICTURES / _BATCH)
        order.say(
            f"  {stage.name} first draws {_KEPT_PICTURES} pictures of what is to be kept, in about"
            f" {duration(spent * pace.seconds)}"
        )
        steps, enough = steps - spent, int(enough / (1 - _KEPT_SHARE))
    steps, enough = max(steps, LEAST_STEPS), max(enough, LEAST_STEPS)
    if steps > enough:
        order.say(f"  {enough:,} steps show each picture {MOST_VIEWS} times; more would teach these pictures by heart")
    return [Planned(_further(order, look, folder, source, min(steps, enough)), pace)]


def _further(order: Order, look: Look, folder: Folder, source: Path, steps: int) -> TrainConfig:
    """A run of so many steps from the weights of the stage in `source`; the settings of configs/fine-tune/base.yaml."""
    assert order.start is not None
    stage = read_config(source)
    rate = {"learning_rate": 2e-4} if order.whole else {"learning_rate": 2e-3}
    more: dict[str, Any] = {
        "batch_size": _BATCH,
        "init_from": _start_of(order.start, source),
        "optimizer": {**rate, "decay": "linear", "warmup_steps": min(20, steps // 2), "decay_steps": steps // 2},
    }
    if not order.whole:
        more |= {"lora_rank": 16, "lora_layers": "all"}
    if order.keep:
        more["prior"] = {
            "prompts": order.keep,
            "count": _KEPT_PICTURES,
            "share": _KEPT_SHARE,
            "folder": str(folder.root / "kept"),
        }
    if not stage.model.predicts_variance:
        levels = {"kind": "logit_normal", "mean": 1.4, "std": 1.4}
        more["loss"] = {"space": "velocity", "max_weight": 400, "levels": levels, "stratified": True}
    return training_run(stage, look, folder, steps, more, _text_of(order))


def _start_of(model: str, stage: Path) -> str:
    """`training.init_from` for a stage's folder: MODEL/STAGE, or the model itself in diffusers' layout."""
    return model if is_diffusers(stage) else f"{model}/{stage.name}"


def _shorten(order: Order, folder: Folder, names: Sequence[str], left: float) -> None:
    """Fewer steps for the next stage if the stages before took longer than planned; never for steps set by hand.

    names: of the next stage and those after it. left: seconds of the order's time, of which this process has used some.
    """
    name = names[0]
    config = load_train_config(folder.settings(name))
    planned = read_json(folder.root / "plan.json")["steps"]
    if not isinstance(planned, dict) or len(names) == len(planned) or _steps_done(Path(config.output)):
        return
    if planned[name] != config.training.steps:
        return
    pace = measure(config, folder.scratch)
    share = shares_of(len(planned))
    allowed = max(left, 0) * share[-len(names)] / (sum(share[-len(names) :]) + 1 - sum(share))
    steps = max(int(allowed / pace.seconds), LEAST_STEPS)
    if steps < config.training.steps:
        order.say(f"{name}: {steps:,} steps in place of {config.training.steps:,}, for the time that is left")
        write_text(folder.settings(name), to_yaml(shortened(config, steps)))


def _train(order: Order, look: Look, folder: Folder, before: Sequence[str], name: str) -> bool:
    """Train a stage to the end of its run, from where it is; False if it was asked to stop."""
    config = load_train_config(folder.settings(name))
    output = Path(config.output)
    done = _steps_done(output)
    if done >= config.training.steps:
        order.say(f"{name}: trained")
        return True
    if before:
        config = _with_drawn(order, look, folder, before, config)
    order.say(f"{name}: {config.training.steps - done:,} steps to go")
    started = (output / "config.yaml").exists()
    return load_trainer(config).run(resume=started)


def _steps_done(output: Path) -> int:
    saved = checkpoints(output)
    return int(saved[-1].name.removeprefix("step-")) if saved else 0


def _with_drawn(order: Order, look: Look, folder: Folder, before: Sequence[str], config: TrainConfig) -> TrainConfig:
    """The run with drawings of the stages before among its smaller pictures, drawn now if they are missing."""
    path, name = folder.drawn(config.stage.name), config.stage.name
    if not path.exists():
        order.say(f"{name}: the stages before redraw pictures for it to learn from")
        stages = [load_stage(folder.run(stage) / "stage") for stage in before]
        text = load_plain_text_encoder(config.text)
        write_redrawn(look.source(), stages, text, config.stage.resolution, path)
    if any(str(path) in getattr(source, "files", ()) for source in config.data.sources):
        return config
    plain = config.model_dump(mode="json")
    share = sum(source.weight for source in config.data.sources) * SHARE_DRAWN / (1 - SHARE_DRAWN)
    drawn = {
        "kind": "parquet",
        "files": [str(path)],
        "caption_column": "captions",
        "low_column": "low",
        "weight": share,
    }
    plain["data"] |= {"sources": [*plain["data"]["sources"], drawn], "decoded": None}
    write_text(folder.settings(name), to_yaml(parse(TrainConfig, plain, str(folder.settings(name)))))
    return load_train_config(folder.settings(name))


def _assembled(order: Order, folder: Folder, names: Sequence[str]) -> CascadePipeline:
    """The trained stages; with `start`, that model with its base stage replaced.

    Its style words stay, but not a default style: the base stage has learned captions without one.
    """
    if order.start is None:
        stages = [folder.run(name) / "stage" for name in names]
        return assemble("bundled", stages, name=order.name, license=order.license)
    pipeline = load_pipeline(order.start, LoadOptions(device="cpu", dtype=torch.float32))
    pipeline.slots[0] = StageSlot.holding(load_stage(folder.run(names[0]) / "stage"))
    pipeline.name, pipeline.license = order.name, order.license
    pipeline.styles = replace(pipeline.styles, default=None)
    return pipeline


def _swept(order: Order, look: Look, folder: Folder, pipeline: CascadePipeline) -> list[Trial]:
    """Choose the base stage's steps and guidance, and set them in the pipeline.

    A stage that was trained further on too few pictures to hold any out keeps its own settings, and nothing is tried:
    it draws pictures that it has learned by heart best without guidance, and all others worse.
    """
    if order.start is not None and not look.holds_out:
        order.say("steps and guidance: those of the model, since no picture is held out")
        return []
    if folder.sweep.exists():
        found = [{name: one[name] for name in ("steps", "guidance", "distance", "match")} for one in _trials(folder)]
        trials = [Trial(int(one.pop("steps")), **one) for one in found]
    else:
        captions, truth = _held_out(look, pipeline)
        order.say(f"steps and guidance: drawing {len(captions)} captions with each of several settings")
        trials = sweeping.sweep(pipeline, captions, truth, load_tower().eval().features)
        write_json(folder.sweep, {"trials": [trial.described() for trial in trials]})
    chosen = sweeping.best(trials)
    stage = pipeline.slots[0].load()
    sampling = stage.config.sampling.model_copy(update={"steps": chosen.steps, "guidance": chosen.guidance})
    config = stage.config.model_copy(update={"sampling": sampling})
    pipeline.slots[0] = StageSlot.holding(replace(stage, config=config))
    order.say(f"steps {chosen.steps}, guidance {chosen.guidance:g}")
    return trials


def _trials(folder: Folder) -> list[dict[str, float]]:
    found = read_json(folder.sweep).get("trials")
    if not isinstance(found, list) or not found:
        raise CascadeError(f"{folder.sweep}: holds no trials; delete it, and the settings are tried again")
    return found


def _held_out(look: Look, pipeline: CascadePipeline) -> tuple[list[str], torch.Tensor]:
    """Captions and pictures that training did not see; all are training's where none are held out."""
    side = pipeline.slots[0].config.resolution
    source = look.source("held_out")
    data = DataConfig(sources=(source,), caption_dropout=0.0)
    views = Views(data, StageConfig(name="look", resolution=side), 0)
    count = min(max(len(open_records(source)), 8), MOST_SWEPT)
    chosen = [views[number] for number in range(count)]
    return [view.caption for view in chosen], to_float(torch.stack([view.image for view in chosen]))


def _save(order: Order, look: Look, folder: Folder, pipeline: CascadePipeline, trials: Sequence[Trial]) -> None:
    """The finished model with its card."""
    captions = list(look.found.captions)
    prompts = [captions[place] for place in sweeping.chosen_places(len(captions), SHOWN)]
    curves = _curves(folder)
    card = Card(
        sections=[
            ("Training", _training(order, look, folder)),
            *([("Sampling settings tried", _table(trials))] if trials else []),
        ],
        prompts=prompts,
        pictures={"Loss, learning rate and speed of the training runs.": curves} if curves else {},
    )
    pipeline.save_pretrained(folder.model, card=card)
    order.say(f"{order.name}: {folder.model}, with its card and a sheet of pictures in {folder.model / 'card'}")


def _curves(folder: Folder) -> Path | None:
    """The curves of the runs as a picture; None without matplotlib."""
    from cascade.training.watch import draw_curves, read_curves

    path = folder.root / "curves.png"
    runs = {name: read_curves(folder.run(name)) for name in _planned_names(folder)}
    try:
        draw_curves(runs).savefig(path, format="png", dpi=90)
    except CascadeError as error:
        logger.warning("no curves on the card: %s", error)
        return None
    return path


def _training(order: Order, look: Look, folder: Folder) -> str:
    """The card's section on data and runs."""
    parts = [f"{look.usable:,} pictures with {len(look.found.captions):,} distinct captions."]
    for name in _planned_names(folder):
        config = load_train_config(folder.settings(name)).training
        kind = f" of a low-rank adapter (rank {config.lora_rank})" if config.lora_rank else ""
        parts.append(f"Stage {name}: {config.steps:,} steps{kind} of {config.batch_size} pictures.")
        if config.prior:
            kept = "; ".join(f"`{prompt}`" for prompt in config.prior.prompts)
            parts.append(f"{config.prior.share:.0%} of its views are drawings of its start, so that it keeps {kept}.")
    if order.start is not None:
        index = read_index(order.start)
        parts.append(
            f"The weights are those of {index.name} (licence: {index.license}), its base stage trained further."
        )
    return " ".join(parts)


def _table(trials: Sequence[Trial]) -> str:
    """The sweep as a Markdown table; the chosen line is marked."""
    chosen = sweeping.best(trials)
    rows = ["| steps | guidance | network calls | kernel distance | match |", "| --- | --- | --- | --- | --- |"]
    for trial in trials:
        mark = " (chosen)" if trial == chosen else ""
        rows.append(
            f"| {trial.steps}{mark} | {trial.guidance:g} | {trial.calls} | {trial.distance:.3f} | {trial.match:.3f} |"
        )
    return "\n".join(rows)
