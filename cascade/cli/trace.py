"""`cascade trace`: records the inputs and outputs of each stage at every step of one picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from cascade.cli.generate import for_stages
from cascade.cli.paths import path_option
from cascade.cli.say import say
from cascade.errors import CascadeError
from cascade.quoting import quoted
from cascade.seeds import MAX_SEED
from cascade.values import PRESETS, SETTINGS, number, threshold_value, whole_number


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
    from cascade.prompts.record import PromptRecord
    from cascade.seeds import fresh_seed
    from cascade.text.words import words_of

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
