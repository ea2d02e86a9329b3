"""Trains the bundled base stage and 64 -> 256 on one GPU within some minutes; what comes back are weights in parts.

    python scripts/pack_pictures.py pictures/emoji/train-*.parquet --out pack/emoji.npz
    python scripts/train_bundled_gpu.py probe --pack pack/emoji.npz
    python scripts/train_bundled_gpu.py train --pack pack/emoji.npz --held-out pack/validation.npz --out out
    python scripts/train_bundled_gpu.py stage base --weights out --out base

`probe` measures which is faster, eager or compiled, and fills the compiler's cache; `stage` makes a stage folder that
`cascade` loads. The stages are those of configs/bundled. All pictures, embeddings of captions and scenes lie in the
device's memory, and the learning rate follows the clock. It runs on a CPU, too, if slowly.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import torch
import torch.nn.functional as F
import yaml
from gpu import pictures
from gpu.loop import Phase, Run, Stop, Task, Timing, say, train
from gpu.loss import Levels, Measured, measured
from gpu.network import autocast, read_parts, with_weights
from gpu.views import BaseViews, EnlargingViews, View, Views
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from cascade.build import build_stage
from cascade.conditioning import Conditioning
from cascade.config import StageConfig
from cascade.diffusion import denoisers
from cascade.diffusion.noise import diffuse
from cascade.diffusion.samplers import sample_dpmpp
from cascade.images import to_pil, to_uint8
from cascade.stage import Stage

ROOT = Path(__file__).resolve().parent.parent
SHARES = {
    "noto": 9.0,
    "twemoji": 9.0,
    "fluent_flat": 9.0,
    "fluent_color": 9.0,
    "fluent_3d": 9.0,
    "fluent_mono": 4.0,
    "emojione": 7.0,
    "blob": 5.0,
    "fxemoji": 4.0,
    "clipart": 6.0,
    "freemoji": 4.0,
    "game_icon": 3.0,
    "office_color": 1.0,
    "sticker": 0.5,
    "flat_color": 1.0,
    "pixel_emoji": 1.5,
    "pixel_sprite": 1.0,
}
"""Of the views of art, by style: what people look at first has most. Other styles share REST."""
REST = 8.0
FINISHING_STEPS = 6
NO_SQUARES = {"pixel_emoji": 0.0, "pixel_sprite": 0.0}
"""Left out of super-resolution, which would learn to draw squares."""
PROMPTS = (
    "a red apple, noto style",
    "a fox, twemoji style",
    "a blue car, fluent flat style",
    "smiling face, fluent 3d style",
    "dog face, fluent color style",
    "black cat, fluent mono style",
    "pizza, noto style",
    "house, twemoji style",
    "a cat",
    "a dog",
    "a robot",
    "a castle at night",
    "two cats",
    "an astronaut riding a horse",
    "a red car",
    "a tree",
    "rocket, noto style",
    "octopus, fluent 3d style",
    "guitar, twemoji style",
    "a bird, noto style",
    "two yellow stars, drawn shapes",
    "a red circle left of a blue triangle, drawn shapes",
    "a lion, clip art style",
    "a birthday cake, fluent 3d style",
    "a cat, noto style",
    "a dog, emojione style",
    "a robot, fluent 3d style",
    "a castle, noto style",
    "a bear, blob style",
    "a red car, noto style",
    "a house, fluent color style",
    "an owl, twemoji style",
)


@dataclass(frozen=True)
class Recipe:
    """How a stage is trained here, beside its settings."""

    levels: Levels
    dropout: float = 0.0
    flatness: float = 0.0


RECIPES = {
    "base": Recipe(Levels(-0.5, 3.0), dropout=0.1),
    "sr256": Recipe(Levels(0.0, 2.5), flatness=0.1),
}


def stage_config(configs: Path, name: str, dropout: float = 0.0) -> StageConfig:
    """The stage of <configs>/<name>.yaml."""
    stage: dict[str, Any] = yaml.safe_load((configs / f"{name}.yaml").read_text())["stage"]
    stage["model"] = {**stage["model"], "dropout": dropout}
    return StageConfig.model_validate_json(json.dumps(stage))


def drawing(config: StageConfig, device: torch.device, weights: Sequence[Tensor]) -> Stage:
    """The stage with these weights, ready to draw."""
    return Stage(config, with_weights(config, device, weights), build_stage(config, device="meta").schedule)


@torch.inference_mode()
def sheet(stage: Stage, words: pictures.Words, path: Path, device: torch.device) -> None:
    """The fixed prompts, seed 0, as the stage draws by default. words: of the null text, then of PROMPTS."""
    count = len(PROMPTS)
    rows = torch.arange(1, count + 1, device=device)
    cond, null = Conditioning(*words.rows(rows)), Conditioning(*words.rows(torch.zeros_like(rows)))
    size = stage.config.resolution
    z = torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(0)).to(device)
    with autocast(device):
        drawn = to_pil(stage.sample(cond, null, z, []))
    columns = 8
    whole = Image.new("RGB", (columns * 2 * size, -(-count // columns) * 2 * size), "white")
    for k, own in enumerate(drawn):
        large = own.resize((2 * size, 2 * size), Image.Resampling.NEAREST)
        whole.paste(large, (k % columns * 2 * size, k // columns * 2 * size))
    whole.save(path)


@torch.inference_mode()
def finished(stage: Stage, library: pictures.Library, batch: int, most: int | None) -> tuple[Tensor, Tensor]:
    """What the base makes of pictures noised to a log SNR in [-1, 3]: (N, 3, 64, 64) uint8, and of which (N,).

    most: of so many pictures at most, taken at random. The next stage learns from these to mend what the base does.
    Below a log SNR of -1 the content would change.
    """
    art, words = library.art, library.words
    device = art.pixels.device
    generator = torch.Generator(device).manual_seed(5)
    settings = stage.config.sampling
    size = stage.config.resolution
    order = torch.randperm(len(art.pixels), device=device, generator=generator)[:most]
    out = torch.zeros(len(art.pixels), 3, size, size, dtype=torch.uint8, device=device)
    drawn = torch.zeros(len(art.pixels), dtype=torch.bool, device=device)
    drawn[order] = True
    parts = order.split(batch)
    for number, who in enumerate(parts):
        low = F.avg_pool2d(art.pixels[who].float() / 127.5 - 1, pictures.SIZE // size)
        start = -1 + 4 * (number + 0.5) / len(parts)
        level = torch.full((len(who), 1, 1, 1), start, device=device)
        z = diffuse(low, torch.randn(low.shape, device=device, generator=generator), level)
        cond = Conditioning(*words.rows(art.captions.rows[art.captions.first[who]]))
        null = Conditioning(*words.rows(torch.zeros_like(who)))
        with autocast(device):
            guided = denoisers.guide(stage, cond, null, settings.guidance, settings.guidance_interval)
            x = sample_dpmpp(denoisers.clip(guided), z, torch.linspace(start, 8.0, FINISHING_STEPS + 1), [])
        out[who] = to_uint8(x)
    return out, drawn


def save_few(own: Tensor, drawn: Tensor, library: pictures.Library, path: Path) -> None:
    """Thirty-two of the base's finishes below what they were made from."""
    who = drawn.nonzero().flatten()
    who = who[torch.linspace(0, len(who) - 1, 32, device=who.device).long()]
    true = F.avg_pool2d(library.art.pixels[who].float(), pictures.SIZE // own.shape[-1]).round().byte()
    pairs = torch.cat([true, own[who]], dim=2)  # (32, 3, 128, 64)
    rows = [torch.cat(list(pairs[k : k + 16]), dim=2) for k in (0, 16)]
    to_pil(torch.cat(rows, dim=1)[None])[0].save(path)


def phases(name: str, batch: int, crops: float = 0.0) -> tuple[Phase, ...]:
    """What is trained when. crops: the share of the time in which 64 -> 256 sees crops of 128 before whole pictures."""
    if name == "base":
        return (Phase(0.0, 64, batch),)
    whole = Phase(crops, 256, max(batch // 4, 1))
    return (Phase(0.0, 128, batch), whole) if crops else (whole,)


# --- commands ------------------------------------------------------------------------------------------------


def prepare(device: str) -> torch.device:
    """Settings of torch for this program alone."""
    torch.manual_seed(0)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    torch.backends.cudnn.benchmark = True
    # One code object meets many widths; past the limit it would quietly stay eager.
    torch._dynamo.config.recompile_limit = 64  # type: ignore[attr-defined]
    return torch.device(device)


@click.group(help=__doc__)
def main() -> None:
    pass


EXISTING = click.Path(exists=True, path_type=Path)
packs_option = click.option("--pack", "packs", multiple=True, required=True, type=EXISTING)
device_option = click.option("--device", default="cuda" if torch.cuda.is_available() else "cpu", show_default=True)
encoder_option = click.option("--text-encoder", default=ROOT / "cascade/pretrained/text_encoder", type=EXISTING)
configs_option = click.option("--configs", default=ROOT / "configs/bundled", type=EXISTING, help="Of the stages.")
choice_option = click.option(
    "--choice", default="choice.json", type=click.Path(path_type=Path), help="Where `probe` notes views a second."
)


@main.command("probe")
@packs_option
@device_option
@encoder_option
@configs_option
@choice_option
@click.option("--batch", default=512)
@click.option("--steps", default=10)
def probe_command(packs: tuple[Path, ...], device: str, batch: int, steps: int, **options: Any) -> None:
    """Views a second of both stages, compiled and eager."""
    where = prepare(device)
    library = pictures.load(packs, options["text_encoder"], where, pictures.Mixture(SHARES, REST, scenes=200))
    say(f"{len(library.art.pixels)} pictures, {len(library.words.tokens)} texts", memory(where))
    speeds: dict[str, float] = {}
    for name, compiled in (("base", True), ("sr256", True), ("base", False), ("sr256", False)):
        try:
            views: Views = BaseViews(library) if name == "base" else EnlargingViews(library)
            run, phase = Run(task(options["configs"], name, views, compiled), where), phases(name, batch)[0]
            first = _seconds(run, phase, 1)
            _seconds(run, phase, 1)
            speed = speeds[f"{name} {compiled}"] = steps * phase.batch / _seconds(run, phase, steps)
            say(f"{name} compiled={compiled}: first step {first:.1f} s, {speed:.0f} views/s", memory(where))
        except Exception as error:  # the other way is left
            say(f"{name} compiled={compiled} failed: {type(error).__name__}: {str(error)[:400]}")
        options["choice"].write_text(json.dumps(speeds))


def _seconds(run: Run, phase: Phase, steps: int) -> float:
    began = time.monotonic()
    for _ in range(steps):
        run.step(phase, 0.0)
    if run.device.type == "cuda":
        torch.cuda.synchronize()
    return time.monotonic() - began


def memory(device: torch.device) -> str:
    """The most that was held on a GPU."""
    return f"{torch.cuda.max_memory_allocated() / 1e9:.1f} GB" if device.type == "cuda" else ""


def compiled(choice: Path, name: str) -> bool:
    """Whether `probe` found the compiled stage faster."""
    speeds = json.loads(choice.read_text()) if choice.exists() else {}
    return bool(speeds.get(f"{name} True", 0) > speeds.get(f"{name} False", 0))


def task(configs: Path, name: str, views: Views, is_compiled: bool) -> Task:
    """The stage as it is trained here."""
    recipe = RECIPES[name]
    return Task(stage_config(configs, name, recipe.dropout), views, recipe.levels, recipe.flatness, is_compiled)


@main.command("train")
@packs_option
@device_option
@encoder_option
@configs_option
@choice_option
@click.option("--held-out", required=True, type=EXISTING)
@click.option("--out", required=True, type=click.Path(path_type=Path))
@click.option("--minutes", default=7.0, help="Of the base stage; 0: it stays as --init has it.")
@click.option("--sr-minutes", default=2.5, help="Of 64 -> 256; 0: left out.")
@click.option("--batch", default=512, help="At 64 px, and of crops of 128 px; a quarter of it at 256 px.")
@click.option("--learning-rate", default=1.5e-3)
@click.option("--decay", default=0.25, help="Share of the time over which the learning rate falls.")
@click.option("--crops", default=0.0, help="Share of the time in which 64 -> 256 sees crops of 128 px.")
@click.option("--own-pictures", type=int, help="How many pictures the base finishes for 64 -> 256; all by default.")
@click.option("--save-every", default=200.0, help="Seconds between the averages that a run that is cut off leaves.")
@click.option("--log-every", default=50, help="Steps.")
@click.option("--scenes", default=60_000)
@click.option("--init", type=EXISTING, help="Folder of parts to go on from.")
@click.option("--init-kind", default="raw-", help="`raw-`: the weights before the decay.")
def train_command(packs: tuple[Path, ...], device: str, held_out: Path, out: Path, **options: Any) -> None:
    """Both stages, one after the other; the second sees what the first draws."""
    session = Session(prepare(device), out, Stop(), options)
    out.mkdir(parents=True, exist_ok=True)
    encoder: Path = options["text_encoder"]
    with_base = options["minutes"] > 0
    if not with_base and options["init"] is None:
        raise click.UsageError("--minutes 0 leaves the base stage as it is; name its folder with --init")
    held = pictures.load([held_out], encoder, session.device, pictures.Mixture({}))
    scenes, shares = (options["scenes"], SHARES) if with_base else (0, SHARES | NO_SQUARES)
    library = pictures.load(packs, encoder, session.device, pictures.Mixture(shares, REST, scenes))
    say(f"{len(library.art.pixels)} pictures, {len(library.words.tokens)} texts", memory(session.device))
    stage = session.base(library, held)
    words = pictures.embed(["", *PROMPTS], encoder, session.device)
    sheet(stage, words, out / "sheet.png", session.device)
    if options["sr_minutes"] > 0 and not session.stop.asked:
        session.enlarging(stage, library, held)
    say("done")


@dataclass(frozen=True)
class Session:
    """What both stages of a call of `train` share. options: those of the command."""

    device: torch.device
    out: Path
    stop: Stop
    options: dict[str, Any]

    def base(self, library: pictures.Library, held: pictures.Library) -> Stage:
        """The base stage, trained, or as --init has it."""
        config = stage_config(self.options["configs"], "base")
        if self.options["minutes"] > 0:
            small = F.avg_pool2d(held.art.pixels.float() / 127.5 - 1, pictures.SIZE // config.resolution)
            text = held.words.rows(held.art.captions.rows[held.art.captions.first])
            check = View(small, Conditioning(*text))
            return drawing(config, self.device, self._learned("base", BaseViews(library), check))
        named = read_parts(self.options["init"], "base")
        order = [name for name, _ in build_stage(config, device="meta").network.named_parameters()]
        return drawing(config, self.device, [named[name].to(self.device) for name in order])

    def enlarging(self, stage: Stage, library: pictures.Library, held: pictures.Library) -> None:
        """64 -> 256, which sees what the base stage draws."""
        own, drawn = finished(stage, library, min(2 * self.options["batch"], 1024), self.options["own_pictures"])
        say(f"{int(drawn.sum())} pictures finished by the base stage")
        save_few(own, drawn, library, self.out / "own.png")
        check = EnlargingViews(held)(24, pictures.SIZE, torch.Generator(self.device).manual_seed(9))
        self._learned("sr256", EnlargingViews(library, own, drawn), check)

    def _learned(self, name: str, views: Views, check: View) -> list[Tensor]:
        options, configs = self.options, self.options["configs"]
        init = None if options["init"] is None else read_parts(options["init"], options["init_kind"] + name)
        is_compiled = compiled(options["choice"], name)
        run = Run(task(configs, name, views, is_compiled), self.device, init)
        say(f"{name}: {sum(p.numel() for p in run.params) / 1e6:.1f} M weights, compiled: {is_compiled}")
        timing = Timing(
            minutes=options["minutes" if name == "base" else "sr_minutes"],
            learning_rate=options["learning_rate"],
            phases=phases(name, options["batch"], options["crops"]),
            decay=options["decay"],
            log_every=options["log_every"],
            save_every=options["save_every"],
        )
        plain = stage_config(configs, name)

        def judged(weights: Sequence[Tensor]) -> Measured:
            return measured(with_weights(plain, self.device, weights), check, RECIPES[name].levels)

        return train(run, timing, self.out, name, self.stop, judged)


@main.command("stage")
@click.argument("name", type=click.Choice(list(RECIPES)))
@configs_option
@click.option("--weights", required=True, type=EXISTING)
@click.option("--kind", default="", help="`raw-`, `guide-` or `other-` for another set than the best average.")
@click.option("--out", required=True, type=click.Path(path_type=Path))
def stage_command(name: str, configs: Path, weights: Path, kind: str, out: Path) -> None:
    """Parts of weights become a stage folder."""
    parts = read_parts(weights, kind + name)
    out.mkdir(parents=True, exist_ok=True)
    save_file(parts, out / "model.safetensors")
    config = stage_config(configs, name).model_dump(mode="json")
    (out / "stage.json").write_text(json.dumps({"format": 1} | config, indent=2) + "\n")


if __name__ == "__main__":
    main()
