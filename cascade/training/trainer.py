"""Training one stage: what happens at every step, and what every n steps. accelerate carries it to any machine."""

from __future__ import annotations

import logging
import math
import signal
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState
from torch import Tensor
from tqdm import tqdm

from cascade.checkpoint import atomic_file, load_weights, save_stage, write_text
from cascade.config import TrainConfig
from cascade.data.loader import Batch, batches
from cascade.diffusion.loss import Weighting
from cascade.errors import CascadeError
from cascade.images import to_float
from cascade.seeds import derive_seed
from cascade.settings import to_yaml
from cascade.stage import Stage
from cascade.text.t5 import TextEncoderProtocol
from cascade.training.ema import EMA
from cascade.training.log import Meter, RunLog, flatten
from cascade.training.lora import add_low_rank, merged
from cascade.training.optim import (
    build_optimizer,
    learning_rate,
    load_optimizer_state,
    optimizer_state,
    set_learning_rate,
)
from cascade.training.samples import sample_grid
from cascade.training.state import RunState, checkpoints, load_newest, save_state
from cascade.training.step import TrainingBatch, draw_noise, training_loss

logger = logging.getLogger("cascade.training")


class Trainer:
    """Trains a stage. Only that stage and the text encoder are in memory.

    Order of the data, noise and dropout follow from (seed, step), so a run that is stopped and resumed at step n ends
    with the same weights, bit for bit, as one that was not.
    """

    def __init__(self, config: TrainConfig, stage: Stage, text: TextEncoderProtocol) -> None:
        """stage: with its starting weights. text: the frozen encoder, or one with a cache before it."""
        self.config, self.stage, self.text = config, stage, text
        self.output = Path(config.output)
        settings = config.training
        self.accelerator = _accelerator(config)
        text.to(self.accelerator.device)
        self._check_batch()
        stage.network.activation_checkpointing = settings.activation_checkpointing
        if settings.lora_rank:
            add_low_rank(stage.network, settings.lora_rank, settings.seed)
        network = torch.compile(stage.network) if settings.compile else stage.network
        optimizer = build_optimizer(stage.network, settings.optimizer)
        self.network, self.optimizer = self.accelerator.prepare(network, optimizer)
        self.ema = EMA(stage.network, settings.ema)
        loss = settings.loss
        self.weighting = Weighting(loss.space, loss.min_snr_gamma, loss.max_weight, loss.variance_weight)

    def run(self, resume: bool = False) -> bool:
        """Train to the last step; True when it was reached, False after Ctrl-C or SIGTERM (a checkpoint is saved).

        resume: continue from the newest checkpoint. Raises CascadeError for a run that exists and is not resumed,
        for none to resume, and for a loss that is not finite.
        """
        first = self._restore() if resume else self._start()
        log = RunLog(self.output / "log.jsonl", first) if self.accelerator.is_main_process else None
        meter = Meter()
        stop = False
        with _stop_signals() as stopped, self._progress(first) as progress:
            data = self._batches(first)
            for step in range(first + 1, self.config.training.steps + 1):
                losses, log_snrs, grad_norm = self._step(step, data)
                meter.add(losses, log_snrs, grad_norm)
                progress.update()
                if step % self.config.training.log_every == 0 or step == self.config.training.steps:
                    meter = self._log(step, meter, log, progress)
                # Whoever asks to stop in the last step gets what the run was for: it is finished.
                stop = self._any_process(stopped()) and step < self.config.training.steps
                self._every_so_often(step, stop)
                if stop:
                    break
        self._close()
        return not stop

    def _close(self) -> None:
        """End trackers and the process group.

        A gloo thread lets go of its last tensor a moment after the result is there. Should Python be shutting down by
        then, the thread's wish for the lock kills the process ("terminate called without an active exception",
        pytorch#179291), after all the work was done and saved. Its threads cannot be joined from here: DDP keeps them.
        """
        self.accelerator.end_training()
        if self.accelerator.num_processes > 1:
            time.sleep(0.5)

    def _step(self, step: int, data: Iterator[Batch]) -> tuple[list[float], list[float], float]:
        """One optimizer step over all accumulated batches and processes."""
        settings = self.config.training
        set_learning_rate(self.optimizer, learning_rate(step - 1, settings.optimizer, settings.steps))
        # Dropout draws from the global generator; keyed by the step, it needs no saved state.
        torch.manual_seed(derive_seed(settings.seed, step, self.accelerator.process_index, "dropout") % 2**63)
        losses, levels = [], []
        for index in range(settings.accumulation):
            batch = next(data)
            last = index == settings.accumulation - 1
            with nullcontext() if last else self.accelerator.no_sync(self.network):
                loss, log_snr = self._loss(batch)
                self._check_finite(loss, step, batch)
                self.accelerator.backward(loss.mean() / settings.accumulation)
            losses.append(loss.detach())
            levels.append(log_snr.detach().flatten())
        norm = self._clip()
        self._check_gradient(norm, step)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.ema.update(self.stage.network, step * settings.batch_size, settings.batch_size)
        gathered = self.accelerator.gather(torch.stack([torch.cat(losses).float(), torch.cat(levels)], dim=1))
        return flatten(gathered[:, 0]), flatten(gathered[:, 1]), norm

    def _loss(self, batch: Batch) -> tuple[Tensor, Tensor]:
        settings, device = self.config.training, self.accelerator.device
        ready = self.ready(batch)
        height, width = ready.x.shape[-2:]
        draw = draw_noise(
            batch.samples,
            (height, width),
            self.stage.scale,
            settings.seed,
            self.config.data.max_aug_level,
            self.stage.config.model.enlarges_first,
        ).to(device)
        return training_loss(self.stage, self.network, ready, settings.loss, self.weighting, draw)

    def ready(self, batch: Batch) -> TrainingBatch:
        """A loaded batch on the device, pictures in [-1, 1] and captions as embeddings."""
        device, size = self.accelerator.device, self._pass_size
        text = self.text.encode(batch.captions, batch_size=len(batch.captions))
        first = batch.samples[0] - batch.samples[0] % size
        return TrainingBatch(
            x=to_float(batch.images.to(device)),
            text=text.tokens.to(device, torch.float32),
            text_mask=text.mask.to(device),
            samples=batch.samples,
            positions=torch.tensor([sample - first for sample in batch.samples], device=device),
            batch_size=size,
        )

    def _clip(self) -> float:
        """Clip the gradient if asked to; its norm before, either way."""
        limit = self.config.training.optimizer.clip_norm
        norm = self.accelerator.clip_grad_norm_(self.network.parameters(), limit or float("inf"))
        return float(norm)

    def _every_so_often(self, step: int, stop: bool) -> None:
        settings = self.config.training
        last = step == settings.steps
        if step % settings.save_every == 0 or last or stop:
            self._save(step)
        if settings.sample_every and (step % settings.sample_every == 0 or last) and not stop:
            self._main_only(lambda: self._sample(step))

    def _save(self, step: int) -> None:
        """Checkpoint, and the averaged weights as a finished stage folder. Only the main process writes."""

        def write() -> None:
            state = RunState(
                step,
                network=dict(self.stage.network.named_parameters()),
                ema=self.ema.weights,
                optimizer=optimizer_state(self.optimizer.optimizer, self.stage.network),
            )
            save_state(self.output, state, self.config, self.config.training.keep_checkpoints)
            save_stage(self.output / "stage", self.stage.config, merged(self.ema.weights))

        self._main_only(write)

    def _sample(self, step: int) -> None:
        with self.ema.in_place_of(self.stage.network):
            sheet = sample_grid(self.config, self.stage, self.text)
        path = self.output / "samples" / f"step-{step:08d}.png"
        with atomic_file(path) as temporary:
            sheet.save(temporary, format="PNG")

    def _log(self, step: int, meter: Meter, log: RunLog | None, progress: tqdm[Any]) -> Meter:
        settings = self.config.training
        values = meter.summary()
        values["learning_rate"] = learning_rate(step - 1, settings.optimizer, settings.steps)
        progress.set_postfix(loss=f"{values['loss']:.4f}", images_s=f"{values['images_per_second']:.1f}")
        self.accelerator.log(values, step=step)
        if log:
            log.write(step, values)
        return Meter()

    def _start(self) -> int:
        """Begin a new run; the folder must not hold one."""
        if checkpoints(self.output):
            raise CascadeError(f"{self.output}: holds a run already; continue it with --resume, or set another output")
        self._main_only(lambda: write_text(self.output / "config.yaml", to_yaml(self.config)))
        return 0

    def _restore(self) -> int:
        """Continue from the newest checkpoint; the number of steps done."""
        state = load_newest(self.output, self.config)
        load_weights(self.stage.network, state.network, self.output)
        self.ema.load(state.ema)
        load_optimizer_state(self.optimizer.optimizer, self.stage.network, state.optimizer)
        logger.info("%s: continuing after step %d", self.output, state.step)
        return state.step

    def _batches(self, first_step: int) -> Iterator[Batch]:
        settings = self.config.training
        return batches(
            self.config.data,
            self.stage.config,
            settings.seed,
            batch_size=self._pass_size,
            first_batch=first_step * settings.accumulation,
            process=self.accelerator.process_index,
            processes=self.accelerator.num_processes,
        )

    @property
    def _pass_size(self) -> int:
        """Pictures in one forward and backward pass of all processes."""
        return self.config.training.batch_size // self.config.training.accumulation

    def _check_batch(self) -> None:
        if self._pass_size % self.accelerator.num_processes:
            raise CascadeError(
                f"training.batch_size / training.accumulation = {self._pass_size} does not divide among"
                f" {self.accelerator.num_processes} processes"
            )

    def _check_finite(self, loss: Tensor, step: int, batch: Batch) -> None:
        finite = torch.isfinite(loss).flatten()
        # Every process must stop, not only the one that saw it, or the others wait forever.
        if self._any_process(not bool(finite.all())):
            bad = [sample for sample, ok in zip(batch.samples, finite.tolist(), strict=True) if not ok]
            captions = [caption for caption, ok in zip(batch.captions, finite.tolist(), strict=True) if not ok]
            raise CascadeError(
                f"the loss is not finite at step {step}, views {bad} ({captions[:3]}); the last checkpoint is intact."
                " Lower training.optimizer.learning_rate, or use training.precision=fp32"
            )

    def _check_gradient(self, norm: float, step: int) -> None:
        """Before it reaches the weights, which would be saved. fp16's loss scaling skips such steps by itself."""
        if not math.isfinite(norm) and self.config.training.precision != "fp16":
            raise CascadeError(
                f"the gradient is not finite at step {step}, though the loss is; the last checkpoint is intact."
                " Lower training.optimizer.learning_rate, or use training.precision=fp32"
            )

    def _any_process(self, flag: bool) -> bool:
        if self.accelerator.num_processes == 1:
            return flag
        return bool(self.accelerator.reduce(torch.tensor(float(flag), device=self.accelerator.device)) > 0)

    def _main_only(self, action: Callable[[], None]) -> None:
        """Run `action` on the main process while the others wait. It must not talk to them."""
        if self.accelerator.is_main_process:
            action()
        self.accelerator.wait_for_everyone()

    def _progress(self, first: int) -> tqdm[Any]:
        return tqdm(
            total=self.config.training.steps,
            initial=first,
            desc=self.stage.name,
            unit="step",
            disable=None if self.accelerator.is_main_process else True,
        )


def _accelerator(config: TrainConfig) -> Accelerator:
    precision = config.training.precision
    trackers = list(config.training.trackers)
    if precision == "fp16" and PartialState().device.type == "cpu":
        raise CascadeError("training.precision: fp16 needs a GPU; on a CPU use bf16")
    # It is shared by all accelerators of a process, and refuses another precision than the run before had.
    AcceleratorState._reset_state()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="`log_with=")  # the error below says it
            accelerator = Accelerator(
                mixed_precision="no" if precision == "fp32" else precision,
                log_with=trackers or None,
                project_dir=config.output,
            )
    except ValueError as error:
        raise CascadeError(f"training.trackers: {error}") from None
    if "all" not in trackers and len(accelerator.log_with) < len(set(trackers)):  # accelerate leaves them out silently
        found = {str(tracker) for tracker in accelerator.log_with}
        missing = [tracker for tracker in trackers if tracker not in found]
        raise CascadeError(f"training.trackers: {', '.join(missing)} is not installed; install it, or leave it out")
    if trackers:
        accelerator.init_trackers(config.stage.name)
    return accelerator


@contextmanager
def _stop_signals() -> Iterator[Callable[[], bool]]:
    """Ctrl-C and SIGTERM ask to stop after the step at hand; a second Ctrl-C stops at once."""
    received: list[int] = []

    def note(number: int, frame: object) -> None:  # noqa: ARG001 - the signature of a signal handler
        if received and number == signal.SIGINT:
            raise KeyboardInterrupt
        received.append(number)

    numbers = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.signal(number, note) for number in numbers}
    try:
        yield lambda: bool(received)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
