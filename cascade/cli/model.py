"""`cascade info`, `assemble`, `convert` and `trace`: a model folder described, made, converted, and seen at work."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cascade.cli.generate import for_stages
from cascade.cli.terminal import path_argument, path_option, say
from cascade.config.values import PRESETS, SETTINGS, number, per_stage, threshold_value, whole_number
from cascade.errors import CascadeError, quoted
from cascade.seeds import MAX_SEED

if TYPE_CHECKING:
    from cascade.config.stage import StageConfig
    from cascade.resources.memory import Way
    from cascade.storage.index import ModelIndex


@dataclass(frozen=True)
class Part:
    """One line of the table. gflop_per_call: one network call for one picture. calls: network calls per picture.

    draws: false for a stage that only `upscale` uses.
    """

    name: str
    resolution: int | None
    parameters: int
    bytes: int
    steps: int | None = None
    calls: int | None = None
    gflop_per_call: float | None = None
    draws: bool = True

    @property
    def gflop_per_picture(self) -> float | None:
        """Arithmetic of all calls."""
        return None if self.calls is None or self.gflop_per_call is None else self.calls * self.gflop_per_call


@click.command()
@path_argument("model", required=False)
@path_option("--super-resolution", multiple=True, metavar="FOLDER", help="Stages that replace MODEL's after the first.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def info(model: str | None, super_resolution: tuple[str, ...], as_json: bool) -> int:
    """Show the parts of a cascade: sizes, parameters, arithmetic, licence, and the ways to load it that fit here.

    MODEL is a folder or hub id; default: the bundled cascade. A step with guidance takes two network calls.
    """
    from cascade.config.data import FORMAT_VERSION
    from cascade.resources.memory import text_memory, ways
    from cascade.resources.number_format import explained
    from cascade.storage.index import find_stage, read_index
    from cascade.storage.stage import read_config
    from cascade.system.device import choose_device, free_bytes

    index = read_index(model)
    if super_resolution:
        index = replace(index, stages=(index.stages[0], *map(find_stage, super_resolution)), enlargers=None)
    text = text_memory(index.text_encoder, index.halves_text)
    parts = _parts(index, text.parameters)
    configs = [read_config(folder) for folder in index.stages]
    possible = ways(configs, text, index.max_text_length)
    free, place = free_bytes(), explained(choose_device(None), configs)
    conditions = {name: read.described for config in configs for name, read in config.conditions.items()}
    if as_json:
        described = [asdict(part) | {"gflop_per_picture": part.gflop_per_picture} for part in parts]
        head: dict[str, Any] = {"name": index.name, "license": index.license, "format": FORMAT_VERSION, "device": place}
        head |= {"conditions": conditions} if conditions else {}
        memory = {"free_bytes": free, "ways": [asdict(way) for way in possible]}
        say(json.dumps(head | {"parts": described, "memory": memory}, indent=2))
    else:
        say(f"{index.name}, licence {index.license}, format {FORMAT_VERSION}\n\n{_table(parts)}\n")
        for name, values in conditions.items():
            say(f"condition {name}: {values}; none leaves it open")
        say(f"{_memory(possible, free)}\n\n{place}")
    return 0


def _memory(possible: Sequence[Way], free: int) -> str:
    """One line per way to load the model, and the first that fits."""
    lines = [f"{way.bytes / 1e9:6.1f} GB at most with {way.description}" for way in possible]
    fitting = next((way.description for way in possible if way.bytes <= free), None)
    advice = f"fits with {fitting}" if fitting else "no setting fits"
    return "\n".join([*lines, f"{free / 1e9:6.1f} GB are free on this device: {advice}"])


def _parts(index: ModelIndex, text_parameters: int) -> list[Part]:
    from cascade.storage.stage import read_config

    stages = [
        replace(_stage_part(folder, read_config(folder), index.max_text_length), draws=folder in index.stages)
        for folder in index.folders
    ]
    text = Part("text encoder", None, text_parameters, _size(index.text_encoder))
    return [text, *stages]


def _stage_part(folder: Path, config: StageConfig, text_tokens: int) -> Part:
    from cascade.resources.memory import StageCost

    cost = StageCost(config)
    return Part(
        name=config.name,
        resolution=config.resolution,
        parameters=cost.parameters,
        bytes=_size(folder / "unet" if (folder / "unet").is_dir() else folder),
        steps=cost.steps,
        calls=cost.calls(),
        gflop_per_call=cost.flops_per_call(text_tokens) / 1e9,
    )


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _table(parts: list[Part]) -> str:
    """Right-aligned columns, with sums at the end."""
    header = ["part", "pixels", "parameters", "MB on disk", "steps", "calls", "GFLOP per call", "GFLOP per picture"]
    rows = [_row(part) for part in parts]
    total = sum(part.gflop_per_picture or 0 for part in parts if part.draws)
    sums = [
        "all",
        "",
        f"{sum(part.parameters for part in parts):,}",
        f"{sum(part.bytes for part in parts) / 1e6:.1f}",
        "",
        "",
        "",
        _shown(float(total)),
    ]
    lines = [header, *rows, sums]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    return "\n".join(_aligned(line, widths) for line in lines)


def _row(part: Part) -> list[str]:
    return [
        part.name if part.draws else f"{part.name} (upscale)",
        _shown(part.resolution),
        f"{part.parameters:,}",
        f"{part.bytes / 1e6:.1f}",
        _shown(part.steps),
        _shown(part.calls),
        _shown(part.gflop_per_call),
        _shown(part.gflop_per_picture),
    ]


def _shown(value: float | None) -> str:
    if value is None or isinstance(value, int):
        return "" if value is None else str(value)
    return f"{value:,.1f}" if value >= 10 else f"{value:.3g}"


def _aligned(line: list[str], widths: list[int]) -> str:
    cells = [
        cell.ljust(width) if column == 0 else cell.rjust(width)
        for column, (cell, width) in enumerate(zip(line, widths, strict=True))
    ]
    return "  ".join(cells).rstrip()


@click.command()
@path_option("--text-encoder", required=True, help="A T5 folder or hub id, or `bundled`.")
@path_option("--stage", "stages", required=True, multiple=True, metavar="FOLDER", help="A stage, smallest first.")
@click.option("--adapter", metavar="STAGE=FOLDER,...", help="Low-rank adapters to add to stages.")
@path_option("--out", required=True, metavar="FOLDER", help="The model folder to write.")
@click.option("--name", required=True, help="Name of the cascade.")
@click.option("--license", required=True, help="Licence of the weights, such as CC-BY-4.0.")
@click.option("--dtype", type=click.Choice(["float32", "bfloat16"]), help="Number format on disk; default: as trained.")
@click.option("--max-text-length", type=click.IntRange(min=1), help="Text length in tokens; default: as in training.")
def assemble(
    text_encoder: str,
    stages: tuple[str, ...],
    adapter: str | None,
    out: str,
    name: str,
    license: str,
    dtype: str | None,
    max_text_length: int | None,
) -> int:
    """Join a text encoder and trained stages to one model folder. It reads text as the stages' training did.

    \b
    cascade assemble --text-encoder bundled --stage runs/base --stage runs/sr256 \\
        --out my-cascade --name my-cascade --license CC0-1.0
    """
    import torch

    from cascade.storage.pipeline import assemble as assemble_pipeline

    formats = {"float32": torch.float32, "bfloat16": torch.bfloat16}
    pipeline = assemble_pipeline(
        text_encoder, stages, name=name, license=license, max_length=max_text_length, adapters=_adapters(adapter)
    )
    pipeline.save_pretrained(out, formats[dtype] if dtype else None)
    say(f"{name}: {', '.join(pipeline.stage_names)} in {out}")
    return 0


def _adapters(text: str | None) -> dict[str, str]:
    """`base=runs/mine/adapter` -> {"base": "runs/mine/adapter"}."""
    try:
        folders = per_stage(text, str) if text else {}
    except ValueError as error:
        raise CascadeError(f"--adapter: {error}") from None
    if isinstance(folders, str):
        raise CascadeError(f"--adapter: {quoted(folders)} names no stage; write base={folders}")
    return folders


@click.command()
@path_argument("source")
@path_argument("out")
@path_option("--super-resolution", multiple=True, metavar="FOLDER", help="A second stage, to follow SOURCE's.")
def convert(source: str, out: str, super_resolution: tuple[str, ...]) -> int:
    """Convert DeepFloyd IF from diffusers' folder layout to cascade's, or back. Weights stay bit for bit.

    SOURCE is a folder or hub id. A diffusers folder becomes OUT, a cascade. A cascade becomes diffusers folders: OUT
    itself if it has one stage, else one folder per stage in OUT.
    """
    from cascade.storage.convert import convert as convert_model

    names = convert_model(source, out, super_resolution)
    say(f"{', '.join(names)} in {out}")
    return 0


# --- trace -----------------------------------------------------------------------------------------------------------
# `cascade trace`: records the inputs and outputs of each stage at every step of one picture.


@click.command()
@click.argument("prompt")
@path_option("--out", default="trace", show_default=True, metavar="FOLDER", help="Folder of the trace.")
@path_option("--model", metavar="MODEL", help="A folder or hub id; default: the bundled cascade.")
@click.option("--word", metavar="WORD", help="Word whose attention the sheet shows; default: the last before a comma.")
@click.option("--seed", type=click.IntRange(0, MAX_SEED), help="Same seed, same picture; default: random, and printed.")
@click.option("--negative-prompt", metavar="TEXT", help="Description of what to avoid.")
@for_stages("--steps", whole_number, "Sampling steps, e.g. 20 or base=20,sr256=4.")
@for_stages("--guidance", number, "Weight of the prompt, 1 = none.")
@for_stages("--sampler", str, "By name; docs/configuration.md lists them.")
@for_stages("--aug-level", number, "Noise on the smaller picture, 0 to 1.")
@for_stages("--threshold", threshold_value, "A quantile such as 0.995, clip, or none.")
@click.option("--preset", type=click.Choice(PRESETS), help="Steps and samplers chosen for speed or quality.")
@click.option("--until", type=click.IntRange(min=1), help="Stop after the stage of this size, in pixels.")
@click.option("--device", help="cpu, cuda, cuda:1, ...; default: the GPU if there is one.")
@click.option("--dtype", help="float32, bfloat16, float16, or auto; default: bfloat16 if the GPU supports it.")
def trace(prompt: str, out: str, model: str | None, word: str | None, **values: Any) -> int:
    """Draw a picture and record every step: z_t, x_hat, guidance, attention to words, and the forward process.

    FOLDER gets sheet.png, the animation trace.webp, a picture of each quantity at each step, and trace.json.

    \b
    cascade trace "a fox, noto style" --seed 7 --until 64
    """
    from cascade.batch.plan import DrawOptions, plan
    from cascade.drawing.engine import Conduct
    from cascade.drawing.trace import Recorder, traced
    from cascade.drawing.trace_files import check_free, write_trace
    from cascade.pipeline import CascadePipeline
    from cascade.prompts.records import PromptRecord
    from cascade.seeds import fresh_seed
    from cascade.text.t5 import words_of

    check_free(Path(out))
    pipeline = CascadePipeline.from_pretrained(model, device=values.pop("device"), dtype=values.pop("dtype"))
    prompt = pipeline.styles.added(prompt)
    words = words_of(pipeline.text_encoder, prompt)
    if word is not None and word not in words:
        raise CascadeError(f"--word {quoted(word)}: is not in the prompt; expected one of {', '.join(words)}")
    seed = fresh_seed() if values["seed"] is None else values["seed"]
    options = DrawOptions(
        run_seed=seed,
        negative_prompt=values["negative_prompt"],
        until=values["until"],
        preset=values["preset"],
        sampling={name: values[name] for name in SETTINGS},
    )
    (target,) = plan(pipeline, PromptRecord(0, prompt, seed, origin="trace"), options).targets()
    recorder = Recorder(words)
    pipeline.engine(Conduct(1, on_step=recorder.step)).draw_all([traced(target.task(), recorder)])
    entries = {"prompt": prompt, "seed": str(seed), "model": pipeline.name, "license": pipeline.license}
    write_trace(Path(out), recorder, entries, word)
    steps = sum(len(stage.moments) for stage in recorder.stages)
    say(f"{out}: {steps} steps of seed {seed}; see sheet.png and trace.webp")
    return 0
