"""Every setting has an effect: for each field of a training run, the table below lists a value with an observable
effect, and how to observe it. A new field without a row fails."""

from __future__ import annotations

import hashlib
import io
import json
import multiprocessing
import tarfile
import tempfile
import typing
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, Literal
from unittest.mock import patch

import pytest
import torch
from helpers_text import make_tiny_t5
from helpers_training import (
    SUPER_RESOLUTION,
    TEXT_DIM,
    TRANSFORMER,
    WordEncoder,
    fill,
    log_entries,
    micro_config,
    trainer,
)
from PIL import Image
from torch import Tensor

from cascade.conditioning import Conditioning, Given, TextEmbeddings
from cascade.config.data import FolderSource
from cascade.config.training import TrainConfig
from cascade.data.loader import Batch, batches
from cascade.data.survey import with_range
from cascade.diffusion.loss import uniform_levels
from cascade.drawing.arguments import resolve_sampling
from cascade.drawing.batches import Inputs, Picture, Texts, draw_batch
from cascade.drawing.engine import Engine
from cascade.drawing.recipe import Recipe
from cascade.drawing.slots import StageSlot
from cascade.drawing.task import Pass, Task
from cascade.errors import CascadeError
from cascade.settings import Settings
from cascade.stage import Stage, build_stage
from cascade.storage.prior import with_prior
from cascade.storage.training import load_plain_text_encoder, load_text_encoder, load_trainer
from cascade.training.actions import SampleGrid, Validation
from cascade.training.state import load_newest

# --- what can be observed ----------------------------------------------------------------------------------------


def digest(tensors: dict[str, Tensor]) -> str:
    """A fingerprint of names, shapes and numbers."""
    sha = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        sha.update(f"{name} {tuple(tensor.shape)}".encode())
        sha.update(tensor.detach().float().contiguous().numpy().tobytes())
    return sha.hexdigest()


def filled_stage(config: TrainConfig) -> Stage:
    stage = build_stage(config.stage)
    fill(stage.network)
    return stage


def some_text(seed: int) -> tuple[Tensor, Tensor]:
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(2, 3, TEXT_DIM, generator=rng), torch.ones(2, 3, dtype=torch.bool)


def some_conditions(stage: Stage) -> Conditioning:
    """Two texts, and for super-resolution two smaller pictures."""
    cond, rng = Conditioning(*some_text(0)), torch.Generator().manual_seed(1)
    if stage.config.low_resolution is None:
        return cond
    return Conditioning(cond.text, cond.text_mask, torch.randn(2, 3, 4, 4, generator=rng), torch.zeros(2, 1, 1, 1))


def noise_levels(config: TrainConfig) -> object:
    """Log SNR at eight times."""
    return uniform_levels(build_stage(config.stage).schedule, torch.arange(8) / 8).flatten().tolist()


def weights(config: TrainConfig) -> object:
    """Names and shapes of the network's weights."""
    network = build_stage(config.stage, device="meta").network
    return {name: tuple(parameter.shape) for name, parameter in network.named_parameters()}


@torch.inference_mode()
def network_output(config: TrainConfig) -> object:
    """What the network says of some noise."""
    stage = filled_stage(config)
    z = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(2))
    return digest({"output": stage.network(z, torch.zeros(2, 1, 1, 1), stage.enlarge(some_conditions(stage)))})


@torch.inference_mode()
def drawn(config: TrainConfig) -> object:
    """Two pictures."""
    stage = filled_stage(config)
    cond = some_conditions(stage)
    rng = [torch.Generator().manual_seed(index) for index in range(2)]
    z = torch.stack([torch.randn(3, 8, 8, generator=generator) for generator in rng])
    return digest({"pictures": stage.sample(cond, cond.with_text(*some_text(5)), z, rng)})


@torch.inference_mode()
def drawn_beside_a_weaker_stage(config: TrainConfig) -> object:
    """Two pictures of a stage with a worse version of itself."""
    stage = filled_stage(config)
    weaker = filled_stage(config)
    for weight in weaker.network.parameters():
        weight.mul_(0.9)
    stage.weaker = weaker
    cond = some_conditions(stage)
    rng = [torch.Generator().manual_seed(index) for index in range(2)]
    z = torch.stack([torch.randn(3, 8, 8, generator=generator) for generator in rng])
    return digest({"pictures": stage.sample(cond, cond.with_text(*some_text(5)), z, rng)})


@torch.inference_mode()
def enlarged(config: TrainConfig) -> object:
    """A picture drawn from a smaller one."""
    stage, text = filled_stage(config), TextEmbeddings(*some_text(0))
    low = torch.randint(256, (1, 3, 4, 4), generator=torch.Generator().manual_seed(1)).to(torch.uint8)
    picture = draw_batch(stage, Inputs(config.stage.sampling, (8, 8), [Picture(0, 0, 0)], Texts(text, text), low))
    return digest({"picture": picture})


def drawn_fast(config: TrainConfig) -> object:
    """Two pictures with the preset `fast`, and its augmentation level, which whoever makes the smaller picture uses."""
    preset = "fast" if config.stage.presets else "default"  # a preset that no stage defines is refused
    sampling = resolve_sampling([config.stage], preset, {})[config.stage.name]
    stage = config.stage.model_copy(update={"sampling": sampling})
    return drawn(config.model_copy(update={"stage": stage})), sampling.aug_level


def sample_sheet(config: TrainConfig) -> object:
    """The grid of sample pictures that training draws."""
    return hashlib.sha256(SampleGrid(config, WordEncoder()).drawn(filled_stage(config)).tobytes()).hexdigest()


def embeddings(config: TrainConfig) -> object:
    """What the text encoder gives for no text and two captions."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="the prompt .* has")
        return digest(
            {"tokens": load_text_encoder(config.text).encode(["", "a red apple", "Two stars: www.stars.com"]).tokens}
        )


def contents_of(batch: Batch) -> tuple[str, str, tuple[str, ...]]:
    """Pictures, smaller pictures and masks that come with them, captions."""
    lows = {str(place): low for place, low in batch.lows.items()}
    lows |= {f"mask {place}": mask for place, mask in batch.masks.items()}
    return digest({"images": batch.images}), digest(lows), tuple(batch.captions)


def views(config: TrainConfig) -> object:
    """Pictures and captions of the first batches, or that there is an error."""
    seen = []
    try:
        for batch in islice(batches(config.data.model_copy(update={"workers": 0}), config.stage, 0, batch_size=4), 12):
            seen.append(contents_of(batch))
    except CascadeError:
        return "error"
    return seen


def measured_range(config: TrainConfig) -> object:
    """The range of the data as numbers."""
    return with_range(config.stage, config.data).pictures.limits


def held_out_views(config: TrainConfig) -> object:
    """Pictures and captions of the first validation batches, or that there is an error."""
    settings = config.training.validation
    assert settings is not None
    try:
        batches_seen = islice(Validation(config, settings)._views(), 12)
        return [contents_of(batch) for batch in batches_seen]
    except CascadeError:
        return "error"


def held_out_values(config: TrainConfig) -> object:
    """The values of conditions in the first validation batches."""
    settings = config.training.validation
    assert settings is not None
    batches_seen = islice(Validation(config, settings)._views(), 12)
    return [digest({name: one.value for name, one in batch.given.items()}) for batch in batches_seen]


def reading_processes(config: TrainConfig) -> object:
    """How many processes read pictures."""
    before = set(multiprocessing.active_children())
    data = batches(config.data, config.stage, 0, batch_size=4)
    next(data)
    return len(set(multiprocessing.active_children()) - before)


def stored_pictures(config: TrainConfig) -> object:
    """Whether decoded pictures were stored, and where."""
    views(config)
    return sorted(Path(config.data.decoded).glob("*.pixels")) if config.data.decoded else None


def starting_weights(config: TrainConfig) -> object:
    """The weights before the first step."""
    return digest(dict(load_trainer(config).stage.network.named_parameters()))


@dataclass(frozen=True)
class Outcome:
    """What a run of four steps leaves behind and did on the way."""

    weights: str
    averages: str
    log: list[dict[str, float]]
    files: dict[str, str]
    encodings: int
    block_calls: int
    compilations: int


def preserved(config: TrainConfig) -> object:
    """Where the start's drawings are, their captions, and their weight among the sources."""
    source = with_prior(config, lambda: load_plain_text_encoder(config.text)).data.sources[-1]
    assert isinstance(source, FolderSource)
    lines = (Path(source.path) / "metadata.jsonl").read_text().splitlines()
    captions = [json.loads(line)["caption"] for line in lines]
    return source.path.removeprefix(config.output), captions, source.weight


def outcome(config: TrainConfig) -> Outcome:
    """Train. Files: names relative to the folder two above `output`, with fingerprints of the sample pictures."""
    encoder, block_calls = WordEncoder(), []
    with patch.object(torch, "compile", side_effect=lambda network: network) as compiled:
        run = trainer(config, encoder)
        run.stage.network.sharded_blocks()[0].register_forward_hook(lambda *_: block_calls.append(1))
        assert run.run()
    output = Path(config.output)
    state = load_newest(output, config)
    return Outcome(
        weights=digest(state.network),
        averages=digest(state.ema),
        log=log_entries(output),
        files={str(path.relative_to(output.parents[1])): contents(path) for path in output.rglob("*")},
        encodings=encoder.calls,
        block_calls=len(block_calls),
        compilations=compiled.call_count,
    )


def contents(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.suffix == ".png" else ""


def trained_weights(config: TrainConfig) -> object:
    return outcome(config).weights


def averaged_weights(config: TrainConfig) -> object:
    return outcome(config).averages


def log(config: TrainConfig) -> object:
    return outcome(config).log


def files(config: TrainConfig) -> object:
    return {name.partition(".tfevents")[0]: content for name, content in outcome(config).files.items()}


def encodings(config: TrainConfig) -> object:
    """How often captions were encoded: once in each pass."""
    return outcome(config).encodings


def block_calls(config: TrainConfig) -> object:
    """How often a block computed its activations."""
    return outcome(config).block_calls


def compilations(config: TrainConfig) -> object:
    return outcome(config).compilations


# --- the table ------------------------------------------------------------------------------------------------------

Observer = Callable[[TrainConfig], object]
FOLDER = "data.sources=[{kind: folder, path: WORLD/pictures}]"
PARQUET = 'data.sources=[{kind: parquet, files: ["WORLD/hub/one.parquet"]}]'
HUB = "data.sources=[{kind: datasets, name: WORLD/hub}]"
STREAM = "data.sources=[{kind: datasets, name: WORLD/hub, streaming: true}]"
TARS = 'data.sources=[{kind: webdataset, files: ["WORLD/tars/one.tar"]}]'
JSON_TARS = TARS.replace('"]', '"], caption: json')
SCENES = "data.sources=[{kind: scenes}]"
PARQUET_NUMBERS = PARQUET.replace("}]", ", columns: {c: number}}]")
HUB_NUMBERS = HUB.replace("}]", ", columns: {c: number}}]")
JSON_TAR_NUMBERS = JSON_TARS.replace("}]", ", columns: {c: number}}]")
FOLDER_CLASS = (
    "stage.conditions={c: {kind: class, labels: [one, two, conditioned]}}",
    "data.sources=[{kind: folder, path: WORLD/conditioned, columns: {c: folder}}]",
)
HELD_OUT = "training.validation={sources: [{kind: scenes, held_out: true}], every: 2}"
SCENES_BESIDE = ", {kind: scenes}]"  # a second source, against which a weight weighs
T5 = "text.encoder=WORLD/t5"
SQUARED_COSINE = "stage.schedule={kind: squared_cosine}"
IF = (
    SQUARED_COSINE,
    "stage.model={kind: if_unet, channels: [8], blocks: [1], attention: [true], embedding_dim: 16, text_dim: 16,"
    " context_dim: 32, head_dim: 8, pooling_heads: 2, groups: 4}",
)
CROPS = (*SUPER_RESOLUTION, "stage.path=picture", FOLDER, "data.crop=4")


@dataclass(frozen=True)
class Row:
    """Another value of a field, where to look, and settings under which the field matters."""

    value: str
    observe: Observer
    base: tuple[str, ...] = ()
    assignment: str = ""
    """In place of `field=value`, where a field cannot change alone."""


DISTILLED = (
    "stage.sampling={sampler: ddim, steps: 2, guidance: 1.0}",
    "training.distill={teacher: WORLD/stage, teacher_steps: 8}",
)
PRESERVED = (T5, FOLDER, "training.init_from=WORLD/stage", "training.prior={prompts: [red, blue], count: 2}")
PROJECTED = ("stage.sampling.guidance=3.0", "stage.sampling.projection={parallel: 0.0}")


def mixed(source: str) -> tuple[str, ...]:
    return (source.removesuffix("]") + SCENES_BESIDE,)


def repeated(source: str) -> tuple[str, ...]:
    """Two finite sources with repeats."""
    first = source.removesuffix("}]") + ", repeats: 1.0}"
    return (f"{first}, {{kind: folder, path: WORLD/other_pictures, repeats: 1.0}}]",)


def wording_rows(kind: str, source: str) -> dict[str, Row]:
    """The changes of captions that a source of any kind can make; those of tags on captions with commas."""
    own = f"data.sources[{kind}].wording"
    return {
        f"data.sources[{kind}].repeats": Row("9.0", views, repeated(source)),
        f"{own}.templates": Row('["a photo of {}"]', views, (source,)),
        f"{own}.trigger": Row("zblorp", views, (source,)),
        f"{own}.shuffle_tags": Row("true", views, (source,)),
        f"{own}.keep_tags": Row("0", views, (source.removesuffix("}]") + ", wording: {shuffle_tags: true}}]",)),
        f"{own}.tag_dropout": Row("0.9", views, (source,)),
    }


CLASS = "stage.conditions={c: {kind: class, labels: [a, b]}}"
NUMBER = "stage.conditions={c: {kind: number, range: [0.0, 100.0]}}"
VECTOR = "stage.conditions={c: {kind: vector, dim: 2}}"
PICTURE = "stage.conditions={c: {kind: picture}}"
CONDITIONED = "data.sources=[{kind: folder, path: WORLD/conditioned, columns: {c: COLUMN}}]"


def conditioned(condition: str, column: str) -> tuple[str, ...]:
    """A condition, and a folder of pictures with a column of its values."""
    return condition, CONDITIONED.replace("COLUMN", column)


def given_values(config: TrainConfig) -> object:
    """The values of conditions, and the captions, in the first batches."""
    seen = []
    for batch in islice(batches(config.data, config.stage, 0, batch_size=4), 12):
        given = {f"{name}.{part}": getattr(one, part) for name, one in batch.given.items() for part in GIVEN}
        seen.append((digest(given), batch.captions))
    return seen


GIVEN = ("value", "present")


@torch.inference_mode()
def drawn_with_a_default(config: TrainConfig) -> object:
    """A picture for which no condition is given, or that there is an error."""
    stage, text = filled_stage(config), TextEmbeddings(*some_text(0))
    recipe = Recipe(
        prompt="", negative_prompt="", seed=0, number=0, height=8, width=8, stages={"base": config.stage.sampling}
    )
    task = Task(recipe, [Pass(StageSlot.holding(stage), (8, 8), config.stage.sampling, 0)], text=text.select([0]))
    try:
        (picture,) = Engine(WordEncoder().encode, torch.device("cpu")).draw_all([task])
    except CascadeError:
        return "error"
    return digest({"picture": picture.pixels[0]})


@torch.inference_mode()
def drawn_with_a_condition(config: TrainConfig) -> object:
    """Two pictures, guided by a number and text."""
    stage = filled_stage(config)
    value, present = torch.tensor([0.2, 0.8]), torch.ones(2, dtype=torch.bool)
    cond = replace(some_conditions(stage), given={"c": Given(value, present)})
    rng = [torch.Generator().manual_seed(index) for index in range(2)]
    z = torch.stack([torch.randn(3, 8, 8, generator=generator) for generator in rng])
    return digest({"pictures": stage.sample(cond, cond.without().with_text(*some_text(5)), z, rng)})


def condition_rows() -> dict[str, Row]:
    """Conditions of every kind."""
    values = {"class": "class", "number": "number", "vector": "vector", "picture": "outline"}
    sections = {"class": CLASS, "number": NUMBER, "vector": VECTOR, "picture": PICTURE}
    defaults = {"class": "b", "number": "3.0", "vector": "none", "picture": "none"}
    own, plain = "stage.conditions[]", "data.sources=[{kind: folder, path: WORLD/conditioned}]"
    rows = {}
    for kind, section in sections.items():
        base = conditioned(section, values[kind])
        rows |= {
            f"{own}[{kind}].kind": Row("", weights, (plain,), section),
            f"{own}[{kind}].dropout": Row("0.9", given_values, base),
            f"{own}[{kind}].null": Row("zero", weights, (section, plain)),
            f"{own}[{kind}].default": Row(defaults[kind], drawn_with_a_default, (section, plain)),
        }
    numbers, pictures = conditioned(NUMBER, "number"), conditioned(PICTURE, "outline")
    measured = NUMBER.replace("]}}", "], measure: width}}")
    labels = PICTURE.replace("picture}", "picture, labels: 250}")
    return rows | {
        f"{own}[class].labels": Row("[b, a]", given_values, conditioned(CLASS, "class")),
        f"{own}[number].range": Row("[0.0, 50.0]", given_values, numbers),
        f"{own}[number].octaves": Row("3", weights, (NUMBER, plain)),
        f"{own}[number].measure": Row("", given_values, (NUMBER, plain), measured),
        f"{own}[vector].dim": Row("3", weights, (VECTOR, plain)),
        f"{own}[vector].scale": Row("2.0", given_values, conditioned(VECTOR, "vector")),
        f"{own}[picture].channels": Row("3", given_values, pictures),
        f"{own}[picture].labels": Row("", weights, (PICTURE, plain), labels),
        f"{own}[picture].resolution": Row("4", given_values, pictures),
        f"{own}[picture].hidden": Row("8", weights, (PICTURE, plain)),
        "stage.sampling.guidance_of": Row("{c: 3.0}", drawn_with_a_condition, (NUMBER, plain)),
    }


ROWS: dict[str, Row] = {
    "output": Row("WORLD/elsewhere/run", files),
    # the stage
    "stage.name": Row("other", sample_sheet),
    "stage.resolution": Row("16", views),
    "stage.low_resolution": Row("4", weights),
    "stage.channels": Row("rgba", weights, (FOLDER,)),
    "stage.values": Row("uint16", views, (FOLDER,)),
    "stage.range.quantiles": Row("[0.2, 0.8]", measured_range, (FOLDER, "stage.range={quantiles: [0, 1]}")),
    "stage.path": Row("residual", log, (*SUPER_RESOLUTION, "stage.path=picture")),
    "stage.residual_scale": Row("0.5", log, SUPER_RESOLUTION),
    "stage.parameterization": Row("v", log),
    "stage.schedule[constant].kind": Row("constant", noise_levels, ("stage.schedule={kind: cosine}",)),
    "stage.schedule[constant].beta": Row("0.05", noise_levels, ("stage.schedule={kind: constant}",)),
    "stage.schedule[constant].steps": Row("50", noise_levels, ("stage.schedule={kind: constant}",)),
    "stage.schedule[linear].kind": Row("linear", noise_levels, ("stage.schedule={kind: cosine}",)),
    "stage.schedule[linear].beta_start": Row("1e-3", noise_levels, ("stage.schedule={kind: linear}",)),
    "stage.schedule[linear].beta_end": Row("0.05", noise_levels, ("stage.schedule={kind: linear}",)),
    "stage.schedule[linear].steps": Row("50", noise_levels, ("stage.schedule={kind: linear}",)),
    "stage.schedule[squared_cosine].kind": Row("squared_cosine", noise_levels, ("stage.schedule={kind: cosine}",)),
    "stage.schedule[squared_cosine].steps": Row("50", noise_levels, ("stage.schedule={kind: squared_cosine}",)),
    "stage.schedule[squared_cosine].max_beta": Row(
        "0.5", noise_levels, ("stage.schedule={kind: squared_cosine, steps: 8}",)
    ),
    "stage.schedule[cosine].kind": Row("cosine", noise_levels, ("stage.schedule={kind: linear}",)),
    "stage.schedule[cosine].reference_resolution": Row("32", noise_levels, ("stage.schedule={kind: cosine}",)),
    "stage.schedule[cosine].offset": Row("0.1", noise_levels, ("stage.schedule={kind: cosine}",)),
    "stage.schedule[cosine].log_snr_min": Row("-1.0", noise_levels, ("stage.schedule={kind: cosine}",)),
    "stage.schedule[cosine].log_snr_max": Row("1.0", noise_levels, ("stage.schedule={kind: cosine}",)),
    "stage.model[unet].channels": Row("[16]", weights),
    "stage.model[unet].blocks": Row("[2]", weights),
    "stage.model[unet].strides": Row("[2]", weights),
    "stage.model[unet].attention": Row("[false]", weights),
    "stage.model[unet].attention_after": Row("level", weights, ("stage.model.blocks=[2]",)),
    "stage.model[unet].self_attention": Row("false", weights),
    "stage.model[unet].resampling": Row("conv", weights, ("stage.model.strides=[2]",)),
    "stage.model[unet].middle_blocks": Row("2", weights),
    "stage.model[unet].modulation": Row("add", weights),
    "stage.model[unet].patch": Row("2", weights),
    "stage.model[unet].skips": Row("add", weights),
    "stage.model[unet].skip_scale": Row("0.5", network_output),
    "stage.model[unet].norm": Row("pixel", network_output),
    "stage.model[unet].groups": Row("2", network_output),
    "stage.model[unet].head_dim": Row("4", network_output),
    "stage.model[unet].embedding_dim": Row("32", weights),
    "stage.model[unet].text": Row("pooled", weights),
    "stage.model[unet].text_dim": Row("32", weights),
    "stage.model[unet].dropout": Row("0.5", log),
    "stage.model[unet].kind": Row("unet", weights, IF, "stage.model={kind: unet, text_dim: 16}"),
    "stage.model[if_unet].kind": Row("if_unet", weights, (SQUARED_COSINE,), IF[1]),
    "stage.model[if_unet].channels": Row("[16]", weights, IF),
    "stage.model[if_unet].blocks": Row("[2]", weights, IF),
    "stage.model[if_unet].attention": Row("[false]", weights, IF),
    "stage.model[if_unet].self_attention": Row("false", weights, IF),
    "stage.model[if_unet].embedding_dim": Row("32", weights, IF),
    "stage.model[if_unet].block_scale": Row("2.0", network_output, IF),
    "stage.model[if_unet].text_dim": Row("32", weights, IF),
    "stage.model[if_unet].context_dim": Row("64", weights, IF),
    "stage.model[if_unet].head_dim": Row("4", network_output, IF),
    "stage.model[if_unet].pooling_heads": Row("4", network_output, IF),
    "stage.model[if_unet].groups": Row("2", network_output, IF),
    "stage.model[transformer].kind": Row("transformer", weights, (), TRANSFORMER[1]),
    "stage.model[transformer].width": Row("24", weights, TRANSFORMER),
    "stage.model[transformer].depth": Row("3", weights, TRANSFORMER),
    "stage.model[transformer].patch": Row("4", weights, TRANSFORMER),
    "stage.model[transformer].bottleneck": Row("4", weights, TRANSFORMER),
    "stage.model[transformer].head_dim": Row("4", network_output, TRANSFORMER),
    "stage.model[transformer].mlp_ratio": Row("2.0", weights, TRANSFORMER),
    "stage.model[transformer].embedding_dim": Row("32", weights, TRANSFORMER),
    "stage.model[transformer].text": Row("pooled", weights, TRANSFORMER),
    "stage.model[transformer].text_dim": Row("32", weights, TRANSFORMER),
    "stage.model[transformer].dropout": Row("0.5", log, TRANSFORMER),
    **condition_rows(),
    "stage.sampling.steps": Row("3", drawn),
    "stage.sampling.spacing": Row("log_snr", drawn, ("stage.sampling.steps=3",)),
    "stage.sampling.timesteps": Row("[3, 1, 0]", drawn, ("stage.schedule={kind: linear}",)),
    "stage.sampling.threshold_maximum": Row("1.0", drawn, ("stage.sampling.threshold=0.9",)),
    "stage.sampling.guidance": Row("3.0", drawn),
    "stage.sampling.guidance_interval": Row("[-1.0, 1.0]", drawn, ("stage.sampling.guidance=3.0",)),
    "stage.sampling.guidance_rescale": Row("0.7", drawn, ("stage.sampling.guidance=3.0",)),
    "stage.sampling.guidance_schedule": Row("[[-5.0, 0.0], [5.0, 1.0]]", drawn, ("stage.sampling.guidance=3.0",)),
    "stage.sampling.projection.parallel": Row("0.5", drawn, PROJECTED),
    "stage.sampling.projection.momentum": Row("-0.5", drawn, PROJECTED),
    "stage.sampling.projection.radius": Row("0.01", drawn, PROJECTED),
    "stage.sampling.autoguidance": Row("2.0", drawn_beside_a_weaker_stage),
    "stage.sampling.threshold": Row("null", drawn),
    "stage.sampling.aug_level": Row("0.3", sample_sheet, SUPER_RESOLUTION),
    "stage.sampling.consistency": Row("2", enlarged, SUPER_RESOLUTION),
    "stage.sampling.flatten": Row("0.5", enlarged, SUPER_RESOLUTION),
    "stage.presets[].steps": Row("3", drawn_fast),
    "stage.presets[].guidance": Row("3.0", drawn_fast),
    "stage.presets[].aug_level": Row("0.3", drawn_fast, SUPER_RESOLUTION),
    # text
    "text.encoder": Row("WORLD/other_t5", embeddings, (T5,)),
    "text.max_length": Row("3", embeddings, (T5,)),
    "text.dtype": Row("bfloat16", embeddings, (T5,)),
    "text.padded": Row("true", embeddings, (T5,)),
    "text.captions": Row("deepfloyd", embeddings, (T5,)),
    "text.null_text": Row("zeros", embeddings, (T5,)),
    "text.cache": Row("WORLD/cache", embeddings, (T5,)),  # the cache stores bf16
    # data
    "data.sources[folder].kind": Row("", views, (SCENES,), FOLDER),
    "data.sources[folder].path": Row("WORLD/other_pictures", views, (FOLDER,)),
    "data.sources[folder].caption_column": Row("other", views, (FOLDER,)),
    "data.sources[folder].names": Row("folder", views, ("data.sources=[{kind: folder, path: WORLD/nameless}]",)),
    "data.sources[folder].masks": Row("true", views, ("data.sources=[{kind: folder, path: WORLD/masked}]",)),
    "data.sources[parquet].mask_column": Row("photo", views, (PARQUET,)),
    "data.sources[folder].columns": Row("{c: other_number}", given_values, conditioned(NUMBER, "number")),
    "data.sources[folder].folder_condition": Row("c", given_values, FOLDER_CLASS),
    "data.sources[parquet].columns": Row("{c: other_number}", given_values, (NUMBER, PARQUET_NUMBERS)),
    "data.sources[datasets].columns": Row("{c: other_number}", given_values, (NUMBER, HUB_NUMBERS)),
    "data.sources[webdataset].columns": Row("{c: other_number}", given_values, (NUMBER, JSON_TAR_NUMBERS)),
    "data.sources[folder].split": Row("held_out", views, (FOLDER,)),
    "data.sources[folder].weight": Row("9.0", views, mixed(FOLDER)),
    "data.sources[parquet].kind": Row("", views, (SCENES,), PARQUET),
    "data.sources[parquet].files": Row('["WORLD/hub/two.parquet"]', views, (PARQUET,)),
    "data.sources[parquet].image_column": Row("photo", views, (PARQUET,)),
    "data.sources[parquet].caption_column": Row("other", views, (PARQUET,)),
    "data.sources[parquet].low_column": Row("small", views, (*SUPER_RESOLUTION, PARQUET)),
    "data.sources[parquet].weight": Row("9.0", views, mixed(PARQUET)),
    "data.sources[webdataset].kind": Row("", views, (SCENES,), TARS),
    "data.sources[webdataset].files": Row('["WORLD/tars/two.tar"]', views, (TARS,)),
    "data.sources[webdataset].caption": Row("json", views, (TARS,)),
    "data.sources[webdataset].caption_column": Row("other", views, (JSON_TARS,)),
    "data.sources[webdataset].shuffle_block": Row("2", views, (TARS,)),
    "data.sources[webdataset].weight": Row("9.0", views, mixed(TARS)),
    "data.sources[datasets].kind": Row("", views, (SCENES,), HUB),
    "data.sources[datasets].name": Row("WORLD/other_hub", views, (HUB,)),
    "data.sources[datasets].config": Row("two", views, (HUB,)),
    "data.sources[datasets].split": Row("test", views, (HUB,)),
    "data.sources[datasets].streaming": Row("true", views, (HUB,)),
    "data.sources[datasets].shuffle_buffer": Row("2", views, (STREAM,)),
    "data.sources[datasets].image_column": Row("photo", views, (HUB,)),
    "data.sources[datasets].caption_column": Row("other", views, (HUB,)),
    "data.sources[datasets].weight": Row("9.0", views, mixed(HUB)),
    **wording_rows("folder", FOLDER),
    **wording_rows("parquet", PARQUET),
    **wording_rows("webdataset", TARS),
    **wording_rows("datasets", HUB),
    "data.sources[scenes].kind": Row("", views, (FOLDER,), SCENES),
    "data.sources[scenes].held_out": Row("true", views),
    "data.sources[scenes].weight": Row(
        "9.0", views, ("data.sources=[{kind: scenes}, {kind: folder, path: WORLD/pictures}]",)
    ),
    "data.caption_dropout": Row("0.9", views),
    "data.joint_dropout": Row("0.9", given_values, conditioned(NUMBER, "number")),
    "data.uncaptioned": Row("drop", views, ("data.sources=[{kind: folder, path: WORLD/nameless}]",)),
    "data.crop": Row("4", views, SUPER_RESOLUTION),
    "data.tiles": Row("true", views, CROPS),
    "data.aspect": Row("crop", views, (FOLDER,)),
    "data.buckets": Row("[1, 2]", views, (FOLDER,)),
    "data.flip": Row("1.0", views, (FOLDER,)),
    "data.jitter": Row("0.2", views, (FOLDER,)),
    "data.max_aug_level": Row("0.9", log, SUPER_RESOLUTION),
    "data.aug_spread": Row("time", log, (*SUPER_RESOLUTION, "data.max_aug_level=0.9")),
    "data.max_bad_share": Row("1.0", views, ("data.sources=[{kind: folder, path: WORLD/half_broken}]",)),
    "data.workers": Row("1", reading_processes),
    "data.decoded": Row("WORLD/decoded", stored_pictures, (FOLDER,)),
    # training
    "training.steps": Row("3", files),
    "training.batch_size": Row("2", log),
    "training.accumulation": Row("2", encodings),
    "training.precision": Row("bf16", log),
    "training.seed": Row("1", trained_weights),
    "training.init_from": Row("WORLD/stage", starting_weights, (T5,)),
    "training.lora_rank": Row("2", trained_weights),
    "training.lora_kind": Row("dora", trained_weights, ("training.lora_rank=2",)),
    "training.lora_layers": Row("all", trained_weights, ("training.lora_rank=2",)),
    "training.activation_checkpointing": Row("true", block_calls),
    "training.compile": Row("true", compilations),
    "training.loss.space": Row("velocity", log),
    "training.loss.min_snr_gamma": Row("5.0", log),
    "training.loss.max_weight": Row("2.0", log),
    "training.loss.variance_weight": Row("3.0", log, IF),
    "training.loss.levels[uniform].kind": Row("uniform", log, ("training.loss.levels={kind: logit_normal}",)),
    "training.loss.levels[logit_normal].kind": Row("logit_normal", log, ("training.loss.levels={kind: uniform}",)),
    "training.loss.levels[logit_normal].mean": Row("1.0", log, ("training.loss.levels={kind: logit_normal}",)),
    "training.loss.levels[logit_normal].std": Row("2.0", log, ("training.loss.levels={kind: logit_normal}",)),
    "training.loss.unmasked_weight": Row(
        "0.5", log, ("data.sources=[{kind: folder, path: WORLD/masked, masks: true}]",)
    ),
    "training.loss.stratified": Row("true", log),
    "training.optimizer.kind": Row("adafactor", trained_weights),
    "training.optimizer.learning_rate": Row("1e-3", trained_weights),
    "training.optimizer.betas": Row("[0.5, 0.9]", trained_weights),
    "training.optimizer.weight_decay": Row("0.5", trained_weights),
    "training.optimizer.warmup_steps": Row("2", trained_weights),
    "training.optimizer.decay": Row("linear", trained_weights),
    "training.optimizer.decay_steps": Row("2", trained_weights, ("training.optimizer.decay=linear",)),
    "training.optimizer.clip_norm": Row("0.01", trained_weights),
    "training.ema.half_life_images": Row("2", averaged_weights),
    "training.ema.warmup": Row("false", averaged_weights),
    "training.distill.teacher": Row("WORLD/other_stage", log, DISTILLED),
    "training.distill.teacher_steps": Row("16", log, DISTILLED),
    "training.prior.prompts": Row("[green]", preserved, PRESERVED),
    "training.prior.count": Row("3", preserved, PRESERVED),
    "training.prior.share": Row("0.2", preserved, PRESERVED),
    "training.prior.folder": Row("WORLD/preserved", preserved, PRESERVED),
    "training.frozen": Row("[stem]", trained_weights),
    "training.trained": Row("[head]", trained_weights, ("training.frozen=[stem, head]",)),
    "training.validation.every": Row("3", log, (HELD_OUT,)),
    "training.validation.batches": Row("2", log, (HELD_OUT,)),
    "training.log_every": Row("2", log),
    "training.sample_every": Row("2", files),
    "training.sample_prompts": Row("[red]", files, ("training.sample_every=4",)),
    "training.sample_count": Row("2", files, ("training.sample_every=4",)),
    "training.save_every": Row("2", files),
    "training.keep_checkpoints": Row("3", files, ("training.save_every=1",)),
    "training.trackers": Row("[tensorboard]", files),
}


SAMPLERS = {
    "[ddpm].kind": ("ddpm", "ddim"),
    "[ddpm].variance": ("beta", "ddpm"),
    "[ddpm].gamma": ("1.0", "ddpm, variance: between"),
    "[ddim].kind": ("ddim", "heun"),
    "[ddim].eta": ("1.0", "ddim"),
    "[heun].kind": ("heun", "ddim"),
    "[dpm++].kind": ("dpm++", "ddim"),
}
"""Another value of each setting of a sampler, and the sampler that it is compared with."""

for _field, (_value, _sampler) in SAMPLERS.items():
    for _section, _observe in (("stage.sampling", drawn), ("stage.presets[]", drawn_fast)):
        _place = _section.replace("[]", ".fast")
        _base = (f"{_place}.sampler={{kind: {_sampler}}}", f"{_place}.steps=3")
        ROWS[f"{_section}.sampler{_field}"] = Row(_value, _observe, _base)


def held_out(row: Row) -> Row:
    """The same of a source among the held-out ones."""

    def moved(assignment: str) -> str:
        name, _, value = assignment.partition("=")
        return f"training.validation={{sources: {value}}}" if name == "data.sources" else assignment

    base = tuple(map(moved, row.base or (SCENES,)))
    if row.observe is given_values:  # the training pictures need values, too
        return Row(row.value, held_out_values, (*row.base, *base), moved(row.assignment))
    return Row(row.value, held_out_views, base, moved(row.assignment))


ROWS |= {
    f"training.validation.{name.removeprefix('data.')}": held_out(row)
    for name, row in ROWS.items()
    if name.startswith("data.sources[")
}

FIXED = {"format"}
"""Settings with one value so far; another is an error."""


# --- every field of the settings ------------------------------------------------------------------------------------


def sections_in(annotation: Any) -> list[type[Settings]]:
    """The sections that a value of this type may hold."""
    if isinstance(annotation, type) and issubclass(annotation, Settings):
        return [annotation]
    return [section for argument in typing.get_args(annotation) for section in sections_in(argument)]


def all_fields(kind: type[Settings], prefix: str = "") -> Iterator[str]:
    """Dotted names of all settings; `[member]` where one of several sections may stand, `[]` in a mapping."""
    for name, field in kind.model_fields.items():
        members = sections_in(field.annotation)
        if not members:
            yield prefix + name
        for member in members:
            where = f"[{member.model_fields['kind'].default}]" if len(members) > 1 else ""
            where = "[]" + where if typing.get_origin(field.annotation) is dict else where
            yield from all_fields(member, f"{prefix}{name}{where}.")


def key_of(field: str) -> str:
    """`data.sources[folder].path` -> `data.sources.0.path`: a place where that section can stand."""
    start, bracket, rest = field.partition("[")
    if not bracket:
        return field
    places = {"data.sources": ".0", "training.validation.sources": ".0"}
    place = (places | {"stage.presets": ".fast", "stage.conditions": ".c"}).get(start, "")
    return start + place + key_of(rest.partition("]")[2])


def test_every_field_has_a_row_and_every_row_a_field() -> None:
    assert set(all_fields(TrainConfig)) == ROWS.keys() | FIXED


def test_the_walk_sees_sections_in_unions_tuples_and_mappings() -> None:
    class Part(Settings):
        kind: Literal["part"] = "part"
        size: int = 1

    class Other(Settings):
        kind: Literal["other"] = "other"

    class Whole(Settings):
        either: Part | Other
        several: tuple[Part | Other, ...]
        named: dict[str, Part]
        maybe: Part | None

    assert list(all_fields(Whole)) == [
        *("either[part].kind", "either[part].size", "either[other].kind"),
        *("several[part].kind", "several[part].size", "several[other].kind"),
        *("named[].kind", "named[].size", "maybe.kind", "maybe.size"),
    ]


@pytest.mark.parametrize("field", sorted(FIXED))
def test_settings_with_one_value_allow_no_other(tmp_path: Path, field: str) -> None:
    with pytest.raises(CascadeError, match=field):
        micro_config(tmp_path / "run", f"{field}=2")


# --- what the rows need ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Pictures, tables, text encoders and weights of which the rows speak."""
    import datasets

    world = tmp_path_factory.mktemp("world")
    write_pictures(world / "pictures", shade=0)
    write_pictures(world / "other_pictures", shade=100)
    write_pictures(world / "half_broken", shade=0, broken=2)
    write_pictures(world / "nameless", shade=0)
    (world / "nameless" / "metadata.jsonl").unlink()
    write_pictures(world / "masked", shade=0)
    picture(0, (24, 16)).save(world / "masked" / "1-masklabel.png")
    write_conditioned(world / "conditioned")
    write_tars(world / "tars")
    write_hub(world / "hub", shade=0)
    write_hub(world / "other_hub", shade=20)
    make_tiny_t5(world / "t5", dim=TEXT_DIM)
    make_tiny_t5(world / "other_t5", dim=TEXT_DIM, seed=1)
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", world / "arrow")
        trainer(micro_config(world / "trained", "training.steps=1")).run()
        (world / "trained" / "stage").rename(world / "stage")
        trainer(micro_config(world / "retrained", "training.seed=1", "training.steps=1")).run()
        (world / "retrained" / "stage").rename(world / "other_stage")
        yield world


def write_conditioned(folder: Path) -> None:
    """Four pictures with columns of conditions of every kind."""
    folder.mkdir()
    lines = []
    for index in range(4):
        picture(10 * index, (24, 16)).save(folder / f"{index}.png")
        picture(20 * index, (12, 8)).save(folder.with_name(f"outline{index}.png"))
        values = {"class": "ab"[index % 2], "number": index, "other_number": 9, "vector": [index, 1.0]}
        values |= {"outline": f"../outline{index}.png", "folder": "one", "c": index}
        lines.append(json.dumps({"file_name": f"{index}.png", "caption": f"picture {index}", **values}))
    (folder / "metadata.jsonl").write_text("\n".join(lines))


def write_pictures(folder: Path, shade: int, broken: int = 0) -> None:
    """Four pictures of 24x16 px, half of them `broken` if 2, with two columns of captions."""
    folder.mkdir()
    lines = []
    for index in range(4):
        picture(shade + 10 * index, (24, 16)).save(folder / f"{index}.png")
        if index < broken:
            (folder / f"{index}.png").write_bytes(b"no picture")
        lines.append(
            f'{{"file_name": "{index}.png", "caption": "picture {index}, a ramp, dark", "other": "number {index}"}}'
        )
    (folder / "metadata.jsonl").write_text("\n".join(lines))


def picture(shade: int, size: tuple[int, int]) -> Image.Image:
    """A ramp, so that a crop or a mirror shows."""
    image = Image.new("RGB", size)
    image.putdata([(shade + x, 5 * y, 7 * x) for y in range(size[1]) for x in range(size[0])])
    return image


def write_tars(folder: Path) -> None:
    """Two WebDataset shards, captions as text and as JSON."""
    folder.mkdir()
    for shade, name in ((0, "one"), (50, "two")):
        with tarfile.open(folder / f"{name}.tar", "w") as tar:
            for index in range(shade, shade + 6):
                buffer = io.BytesIO()
                picture(index, (8, 8)).save(buffer, "PNG")
                about = json.dumps(
                    {"caption": f"json {index}", "other": f"number {index}", "number": index, "other_number": 9}
                )
                members = {
                    "png": buffer.getvalue(),
                    "txt": f"picture {index}, a ramp, dark".encode(),
                    "json": about.encode(),
                }
                for ending, content in members.items():
                    info = tarfile.TarInfo(f"{index}.{ending}")
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))


def write_hub(folder: Path, shade: int) -> None:
    """A local dataset of two Parquet files: two configurations, the first of two splits."""
    import datasets

    folder.mkdir()
    features = {"image": datasets.Image(), "photo": datasets.Image(), "small": datasets.Image()}
    features |= {"caption": datasets.Value("string"), "other": datasets.Value("string")}
    features |= {"number": datasets.Value("int64"), "other_number": datasets.Value("int64")}
    for start, name in ((shade, "one"), (shade + 50, "two")):
        rows = {
            "image": [picture(start + index, (8, 8)) for index in range(6)],
            "photo": [picture(start + 100 + index, (8, 8)) for index in range(6)],
            "small": [picture(start + 50 + index, (4, 4)) for index in range(6)],
            "caption": [f"picture {start + index}, a ramp, dark" for index in range(6)],
            "other": [f"number {start + index}" for index in range(6)],
            "number": list(range(6)),
            "other_number": [9] * 6,
        }
        datasets.Dataset.from_dict(rows, features=datasets.Features(features)).to_parquet(folder / f"{name}.parquet")
    (folder / "README.md").write_text(
        "---\nconfigs:\n"
        "- {config_name: one, default: true, data_files: [{split: train, path: one.parquet},"
        " {split: test, path: two.parquet}]}\n"
        "- {config_name: two, data_files: [{split: train, path: two.parquet}]}\n"
        "---\n"
    )


def observed(row: Row, world: Path, *changes: str) -> object:
    """What the row's observer sees, in a folder of its own."""
    with tempfile.TemporaryDirectory(dir=world) as folder:
        assignments = [change.replace("WORLD", str(world)) for change in (*row.base, *changes)]
        return row.observe(micro_config(Path(folder) / "runs" / "run", *assignments))


seen_before: dict[tuple[Observer, tuple[str, ...]], object] = {}


def seen_without_change(row: Row, world: Path) -> object:
    """Many rows share what they start from."""
    key = (row.observe, row.base)
    if key not in seen_before:
        seen_before[key] = observed(row, world)
    return seen_before[key]


@pytest.mark.parametrize("field", ROWS)
def test_changing_a_setting_changes_what_can_be_observed(field: str, world: Path) -> None:
    row = ROWS[field]
    change = row.assignment or f"{key_of(field)}={row.value}"
    assert observed(row, world, change) != seen_without_change(row, world)


@pytest.mark.parametrize(
    "row", {row.observe: row for row in ROWS.values()}.values(), ids=lambda row: row.observe.__name__
)
def test_without_a_change_nothing_changes(row: Row, world: Path) -> None:
    """Else the test above would prove nothing."""
    assert observed(row, world) == seen_without_change(row, world)
