"""Trains the bundled base stage and 64 -> 256 on one GPU within some minutes; the results are weights in small files.

    python scripts/pack_pictures.py pictures/emoji/train-*.parquet --out pack/emoji.npz
    python scripts/train_bundled_gpu.py probe --pack pack/emoji.npz
    python scripts/train_bundled_gpu.py train --pack pack/emoji.npz --held-out pack/validation.npz --out out
    python scripts/train_bundled_gpu.py stage base --weights out --out base

`probe` measures whether eager or compiled is faster, and fills the compiler's cache; `stage` makes a stage folder that
`cascade` loads. The stages are those of configs/bundled. All pictures, caption embeddings and scenes are held in the
device's memory, and the learning rate depends on elapsed time. It also runs, slowly, on a CPU.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import torch
import torch.nn.functional as F
from gpu import pictures
from gpu.drawn import PROMPTS, drawing, finished, save_few, sheet
from gpu.loop import Phase, Run, Timing, say, train
from gpu.loss import Measured, measured
from gpu.network import read_parts, read_weights, with_weights
from gpu.recipe import NO_SQUARES, RECIPES, REST, SHARES, phases, stage_config, task
from gpu.views import BaseViews, EnlargingViews, View, Views
from torch import Tensor

from cascade.conditioning import Conditioning
from cascade.config.data import FORMAT_VERSION
from cascade.config.stage import StageConfig
from cascade.errors import CascadeError
from cascade.files.atomic import write_json
from cascade.files.tensors import load_weights, save_tensors
from cascade.stage import Stage, build_stage
from cascade.system.device import choose_device
from cascade.system.process import stop_signals

ROOT = Path(__file__).resolve().parent.parent


class Commands(click.Group):
    """Commands that report a user's mistake in one line."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except CascadeError as error:
            raise click.ClickException(str(error)) from None


@click.group(cls=Commands, help=__doc__)
def main() -> None:
    pass


FILE = click.Path(exists=True, dir_okay=False, path_type=Path)
FOLDER = click.Path(exists=True, file_okay=False, path_type=Path)
NEW = click.Path(file_okay=False, path_type=Path)
MINUTES = click.FloatRange(min=0)
COUNT = click.IntRange(min=1)

packs_option = click.option("--pack", "packs", multiple=True, required=True, type=FILE)
device_option = click.option("--device", default="cuda" if torch.cuda.is_available() else "cpu", show_default=True)
encoder_option = click.option("--text-encoder", default=ROOT / "cascade/pretrained/text_encoder", type=FOLDER)
configs_option = click.option("--configs", default=ROOT / "configs/bundled", type=FOLDER, help="Of the stages.")
choice_option = click.option(
    "--choice",
    default="choice.json",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Where `probe` notes views a second.",
)


def prepare(device: str) -> torch.device:
    """Set torch's options for this program. Raises CascadeError for a missing device."""
    torch.manual_seed(0)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    torch.backends.cudnn.benchmark = True
    # One code object is compiled for many widths; beyond the limit torch would silently run it eagerly.
    torch._dynamo.config.recompile_limit = 64
    return choose_device(device)


def memory(device: torch.device) -> str:
    """Peak memory on a GPU, as text."""
    return f"{torch.cuda.max_memory_allocated() / 1e9:.1f} GB" if device.type == "cuda" else ""


def load(packs: Sequence[Path], encoder: Path, device: torch.device, mixture: pictures.Mixture) -> pictures.Library:
    """`pictures.load` with a printed summary."""
    library = pictures.load(packs, encoder, device, mixture)
    say(f"{len(library.art.pixels)} pictures, {len(library.words.tokens)} texts", memory(device))
    return library


# --- probe ---------------------------------------------------------------------------------------------------


@main.command("probe")
@packs_option
@device_option
@encoder_option
@configs_option
@choice_option
@click.option("--batch", default=512, type=COUNT)
@click.option("--steps", default=10, type=COUNT)
def probe_command(packs: tuple[Path, ...], device: str, text_encoder: Path, configs: Path, **options: Any) -> None:
    """Views a second of both stages, compiled and eager."""
    where = prepare(device)
    library = load(packs, text_encoder, where, pictures.Mixture(SHARES, REST, scenes=200))
    speeds: dict[str, float] = {}
    for name, compiled in (("base", True), ("sr256", True), ("base", False), ("sr256", False)):
        views: Views = BaseViews(library) if name == "base" else EnlargingViews(library)
        own = task(configs, name, views, compiled)
        try:
            run, phase = Run(own, where), phases(name, options["batch"])[0]
            first = _seconds(run, phase, 1)
            _seconds(run, phase, 1)
            speed = options["steps"] * phase.batch / _seconds(run, phase, options["steps"])
        except Exception as error:  # the other variant remains
            say(f"{name} compiled={compiled} failed: {type(error).__name__}: {str(error)[:400]}")
            continue
        say(f"{name} compiled={compiled}: first step {first:.1f} s, {speed:.0f} views/s", memory(where))
        speeds[f"{name} {compiled}"] = speed
        options["choice"].write_text(json.dumps(speeds))


def _seconds(run: Run, phase: Phase, steps: int) -> float:
    began = time.monotonic()
    for _ in range(steps):
        run.step(phase, 0.0)
    if run.device.type == "cuda":
        torch.cuda.synchronize()
    return time.monotonic() - began


def is_compiled(choice: Path, name: str) -> bool:
    """Whether `probe` found the compiled stage faster."""
    speeds = json.loads(choice.read_text()) if choice.exists() else {}
    return bool(speeds.get(f"{name} True", 0) > speeds.get(f"{name} False", 0))


# --- train ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Options:
    """The options of `train` that apply to both stages, under the same names."""

    text_encoder: Path
    configs: Path
    choice: Path
    minutes: float
    sr_minutes: float
    batch: int
    learning_rate: float
    decay: float
    crops: float
    own_pictures: int | None
    save_every: float
    log_every: int
    scenes: int
    init: Path | None
    init_kind: str

    def timing(self, name: str) -> Timing:
        """The clock of a stage."""
        return Timing(
            minutes=self.minutes if name == "base" else self.sr_minutes,
            learning_rate=self.learning_rate,
            phases=phases(name, self.batch, self.crops),
            decay=self.decay,
            log_every=self.log_every,
            save_every=self.save_every,
        )


@main.command("train")
@packs_option
@device_option
@encoder_option
@configs_option
@choice_option
@click.option("--held-out", required=True, type=FILE, help="Packed pictures by whose loss an average is chosen.")
@click.option("--out", required=True, type=NEW)
@click.option("--minutes", default=7.0, type=MINUTES, help="For the base stage; 0: take it from --init.")
@click.option("--sr-minutes", default=2.5, type=MINUTES, help="Minutes for 64 -> 256; 0: leave it out.")
@click.option("--batch", default=512, type=COUNT, help="At 64 px, and for crops of 128 px; a quarter at 256 px.")
@click.option("--learning-rate", default=1.5e-3)
@click.option(
    "--decay",
    default=0.25,
    type=click.FloatRange(0, 1, min_open=True),
    help="Share of the time over which the learning rate falls.",
)
@click.option(
    "--crops",
    default=0.0,
    type=click.FloatRange(0, 1, max_open=True),
    help="Share of the time in which 64 -> 256 sees crops of 128 px.",
)
@click.option("--own-pictures", type=COUNT, help="Number of pictures redrawn by the base for 64 -> 256; default: all.")
@click.option("--save-every", default=200.0, help="Seconds between saved averages, for an interrupted run.")
@click.option("--log-every", default=50, type=COUNT, help="Steps.")
@click.option("--scenes", default=60_000, type=COUNT, help="Number of drawn scenes for the base stage.")
@click.option("--init", type=FOLDER, help="Folder of weight files to continue from.")
@click.option("--init-kind", default="raw-", help="Prefix of the weight files; `raw-`: the weights before the decay.")
def train_command(packs: tuple[Path, ...], device: str, held_out: Path, out: Path, **rest: Any) -> None:
    """Train both stages, one after the other; the second also learns from drawings of the first."""
    options = Options(**rest)
    with_base = options.minutes > 0
    if not with_base and options.init is None:
        raise click.UsageError("--minutes 0 leaves the base stage as it is; name its folder with --init")
    with stop_signals() as stopped:
        run(Session(prepare(device), out, stopped, options), packs, held_out)


def run(session: Session, packs: Sequence[Path], held_out: Path) -> None:
    """Train both stages."""
    options, out = session.options, session.out
    with_base = options.minutes > 0
    session.check()
    out.mkdir(parents=True, exist_ok=True)
    encoder = options.text_encoder
    held = pictures.load([held_out], encoder, session.device, pictures.Mixture({}))
    scenes, shares = (options.scenes, SHARES) if with_base else (0, SHARES | NO_SQUARES)
    library = load(packs, encoder, session.device, pictures.Mixture(shares, REST, scenes))
    stage = session.base(library, held)
    sheet(stage, pictures.embed(["", *PROMPTS], encoder, session.device), out / "sheet.png")
    if options.sr_minutes > 0 and not session.stopped():
        session.enlarging(stage, library, held)
    say("done")


@dataclass(frozen=True)
class Session:
    """Shared state of both stages in a call of `train`."""

    device: torch.device
    out: Path
    stopped: Callable[[], bool]
    options: Options

    def check(self) -> None:
        """Raise CascadeError for wrong settings and weights, before the data is loaded."""
        config = json.loads((self.options.text_encoder / "config.json").read_text())
        for name in ("base", "sr256") if self.options.sr_minutes > 0 else ("base",):
            model = stage_config(self.options.configs, name).model
            if model.text_dim != config["d_model"]:
                raise CascadeError(
                    f"{self.options.configs}/{name}.yaml: model.text_dim is {model.text_dim}, the text encoder gives"
                    f" {config['d_model']}; set it so, or name another with --text-encoder"
                )
            self._before(name)
        if self.options.minutes == 0:
            self._finished_base()

    def base(self, library: pictures.Library, held: pictures.Library) -> Stage:
        """The base stage, trained, or from --init unchanged."""
        if self.options.minutes == 0:
            return drawing(self._config("base"), self.device, self._finished_base())
        small = F.avg_pool2d(held.art.pixels.float() / 127.5 - 1, pictures.SIZE // self._config("base").resolution)
        text = held.words.rows(held.art.captions.rows[held.art.captions.first])
        check = View(small, Conditioning(*text))
        return drawing(self._config("base"), self.device, self._learned("base", BaseViews(library), check))

    def enlarging(self, stage: Stage, library: pictures.Library, held: pictures.Library) -> None:
        """Train 64 -> 256, with drawings of the base stage among its smaller pictures."""
        own, drawn = finished(stage, library, min(2 * self.options.batch, 1024), self.options.own_pictures)
        say(f"{int(drawn.sum())} pictures finished by the base stage")
        save_few(own, drawn, library, self.out / "own.png")
        check = EnlargingViews(held)(24, pictures.SIZE, torch.Generator(self.device).manual_seed(9))
        self._learned("sr256", EnlargingViews(library, own, drawn), check)

    def _config(self, name: str) -> StageConfig:
        return stage_config(self.options.configs, name)

    def _finished_base(self) -> list[Tensor]:
        assert self.options.init is not None
        return read_weights(self.options.init, "base", self._config("base"))

    def _before(self, name: str) -> list[Tensor] | None:
        """The weights from which a stage's training continues; None: new ones."""
        if self.options.init is None or self.options.timing(name).minutes == 0:
            return None
        return read_weights(self.options.init, self.options.init_kind + name, self._config(name))

    def _learned(self, name: str, views: Views, check: View) -> list[Tensor]:
        compiled = is_compiled(self.options.choice, name)
        run = Run(task(self.options.configs, name, views, compiled), self.device, self._before(name))
        say(f"{name}: {sum(p.numel() for p in run.params) / 1e6:.1f} M weights, compiled: {compiled}")

        def judged(weights: Sequence[Tensor]) -> Measured:
            return measured(with_weights(self._config(name), self.device, weights), check, RECIPES[name].levels)

        return train(run, self.options.timing(name), self.out, name, self.stopped, judged)


# --- stage ---------------------------------------------------------------------------------------------------


@main.command("stage")
@click.argument("name", type=click.Choice(list(RECIPES)))
@configs_option
@click.option("--weights", required=True, type=FOLDER)
@click.option("--kind", default="", help="Prefix `raw-`, `guide-` or `other-`, for another set than the best average.")
@click.option("--out", required=True, type=NEW)
def stage_command(name: str, configs: Path, weights: Path, kind: str, out: Path) -> None:
    """Make a stage folder from weight files."""
    parts, config = read_parts(weights, kind + name), stage_config(configs, name)
    load_weights(build_stage(config, device="meta").network, parts, weights / f"{kind}{name}-*.safetensors")
    out.mkdir(parents=True, exist_ok=True)
    save_tensors(out / "model.safetensors", parts)
    write_json(out / "stage.json", {"format": FORMAT_VERSION} | config.model_dump(mode="json"))


if __name__ == "__main__":
    main()
