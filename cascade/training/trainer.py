"""Training of one stage: the step, and periodic actions. accelerate runs it on any device and number of processes."""

from __future__ import annotations

import copy
import logging
import math
import time
from collections.abc import Callable, Collection, Generator, Iterator
from contextlib import ExitStack, closing, contextmanager, nullcontext
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from cascade.conditioning import TextEncoderProtocol
from cascade.config.stage import save_stage
from cascade.config.training import TrainConfig
from cascade.data.loader import Batch, Portion, batches
from cascade.data.workers import ReaderDiedError
from cascade.errors import CascadeError
from cascade.files.atomic import writing
from cascade.files.tensors import load_weights
from cascade.seeds import derive_seed
from cascade.stage import Stage
from cascade.system.process import Stopped, stop_signals
from cascade.text.cached import CachedTextEncoder
from cascade.training.accelerator import (
    any_process,
    build_accelerator,
    check_batch,
    check_finite,
    check_gradient,
    from_main,
    prepared,
    settled,
    shards,
    shortage_as_error,
    start_trackers,
)
from cascade.training.actions import Action, Grid, LogEntry, Moment, SampleGrid, Validate, Validation, is_due
from cascade.training.distill import Distillation
from cascade.training.log import MOST_UNREAD, Meter, RunLog, Spoken, Unread, read
from cascade.training.optim import (
    averaged_weights,
    learning_rate,
    load_optimizer_state,
    optimizer_state,
    set_learning_rate,
)
from cascade.training.state import (
    RunState,
    check_new,
    check_resumed,
    mark_begun,
    newest,
    only_writer,
    read_state,
    remove_unfinished,
    save_state,
    thin_out_resumed,
    write_settings,
)
from cascade.training.step import NoiseSource, Objective, TrainingBatch, training_batch
from cascade.training.watch import Watch
from cascade.training.weights import EMA, gather, merged, save_adapter, spread_like, whole

logger = logging.getLogger("cascade.training")


class Trainer:
    """Trains a stage. Only that stage and the text encoder are in memory.

    Data order, noise and dropout follow from (seed, step), so a run that is stopped and resumed ends with the same
    weights, bit for bit, as an uninterrupted one.
    """

    def __init__(
        self, config: TrainConfig, stage: Stage, text: TextEncoderProtocol, teacher: Stage | None = None
    ) -> None:
        """stage: with its initial weights. text: the frozen encoder, or a `CachedTextEncoder`. teacher: the stage of
        `training.distill`, if that is set.
        """
        config = settled(config)
        self.config, self.stage, self.text = config, stage, text
        self.output = Path(config.output)
        settings = config.training
        self.accelerator = build_accelerator(config)
        text.to(self.accelerator.device)
        check_batch(self._pass_size, self.accelerator)
        self._plain = copy.deepcopy(stage.network).to("meta")  # without weights, to be filled with the averages
        self.network, self.optimizer = prepared(self.accelerator, stage.network, settings)
        self.ema = EMA(stage.network, settings.ema)
        data, device = config.data, self.accelerator.device
        source = NoiseSource(settings.seed, data.max_aug_level, data.aug_spread, device=device)
        self.objective: Objective | Distillation = Objective(settings.loss, source)
        if settings.distill is not None:
            assert teacher is not None, "training.distill needs its teacher"
            taught = Distillation.of(stage, teacher.to(device), settings.distill, settings.loss, source, text)
            self.objective = replace(taught, autocast=self.accelerator.autocast)
        self.actions = self._actions()
        self.meter, self.watch = Meter(), Watch()
        self._unread: list[Unread] = []
        self.log: RunLog | None = None
        self.spoken = Spoken(config.stage.name, 0, settings.steps)
        self._owes = False  # whether actions due at the restored step are missing

    def run(self, resume: bool = False) -> bool:
        """Train to the last step. Returns True when it was reached, False after Ctrl-C or SIGTERM, with a checkpoint.

        resume: continue from the newest checkpoint. Raises CascadeError if a run exists and is not resumed, if there
        is no run to resume, if another process writes into the folder, if a loss is not finite, and if memory is
        insufficient.
        """
        with ExitStack() as lock:
            from_main(self.accelerator, lambda: self._alone(lock, resume))
            return self._run(resume)

    def _run(self, resume: bool) -> bool:
        with shortage_as_error("before the first step", "give each process more, or use FSDP over several GPUs"):
            first = self._restore() if resume else self._start()
        last, stop = self.config.training.steps, False
        with (
            shortage_as_error(),
            closing(self._batches(first)) as data,
            stop_signals() as stopped,
            self._progress(first) as progress,
        ):
            from_main(self.accelerator, lambda: self._open_folder(first))
            if self._owes:
                stop = not self._reported(first, progress, stopped)  # the checkpoint lacks this report
            for step in range(first + 1, last + 1):
                if stop:
                    break
                with self._saved_if_a_reader_dies(step - 1, first):
                    self._step(step, data)
                progress.update()
                # A request to stop in the last step is ignored: the run is finished.
                stop = self._every_so_often(step, progress, stopped if step < last else lambda: False)
        self._close()
        return not stop

    @contextmanager
    def _saved_if_a_reader_dies(self, done: int, first: int) -> Iterator[None]:
        """Save a checkpoint when a reading process dies after step `done`; several processes would wait instead.

        first: the number of steps before this call of `run`.
        """
        try:
            yield
        except ReaderDiedError as error:
            if done == first or self.accelerator.num_processes > 1:
                raise
            self._save(done, owes=False)
            raise ReaderDiedError(f"{error}; step {done} is saved, --resume continues from it") from error

    def _close(self) -> None:
        """End trackers and the process group.

        A gloo thread releases its last tensor shortly after the result is available. If Python is already shutting
        down, the thread's attempt to take the lock kills the process ("terminate called without an active exception",
        pytorch#179291), although all work is saved. The threads cannot be joined here, since DDP keeps them.
        """
        self.accelerator.end_training()
        if self.accelerator.num_processes > 1:
            time.sleep(0.5)

    # --- a step ------------------------------------------------------------------------------------------------------

    def _step(self, step: int, data: Iterator[Batch]) -> None:
        """One optimizer step over all accumulated batches and processes."""
        settings = self.config.training
        set_learning_rate(self.optimizer, learning_rate(step - 1, settings.optimizer, settings.steps))
        losses, levels, samples, captions = [], [], [], []
        for index in range(settings.accumulation):
            with self.meter.waiting():
                batch = next(data)
            # Dropout draws from the global generator; seeded for each pass, it needs no saved state. Seeded after the
            # batch is read, because starting the reading processes, in a resumed run's first step, draws from it too.
            torch.manual_seed(derive_seed(settings.seed, step, index, self.accelerator.process_index, "dropout"))
            last = index == settings.accumulation - 1
            with nullcontext() if last else self.accelerator.no_sync(self.network):
                loss, log_snr = self.objective(self.stage, self.network, self.ready(batch))
                self.accelerator.backward(loss.mean() / settings.accumulation)
            losses.append(loss.detach().float())
            levels.append(log_snr.detach().flatten())
            samples += batch.samples
            captions += batch.captions
        self._unread.append(Unread(step, torch.cat(losses), torch.cat(levels), self._clip(), samples, captions))
        moves = True if self._reads_late else self._read()
        self.optimizer.step()
        self.optimizer.zero_grad()
        # fp16's scaling skips the step of such a gradient, which accelerate does not notice with fused AdamW.
        if moves:
            averages = averaged_weights(self.optimizer.optimizer, self.stage.network)
            if averages is None:
                self.ema.update(self.stage.network, step * settings.batch_size, settings.batch_size)
            else:
                self.ema.load(averages)
        if len(self._unread) == MOST_UNREAD:
            self._read()

    def _read(self) -> bool:
        """Add the values of steps since the last call to the log's means; returns whether all gradients were finite.

        All processes together. Raises CascadeError for a loss or a gradient that is not finite: on a GPU the weights
        have already changed, but the values are read before each checkpoint.
        """
        steps, self._unread = self._unread, []
        numbers = read(steps, self.accelerator) if steps else []
        for of_step in numbers:
            check_finite(of_step.own_losses, of_step.step.step, of_step.step, self.accelerator)
            check_gradient(of_step.norm, of_step.step.step, self.config.training.precision)
            self.meter.add_losses(of_step.losses, of_step.log_snrs)
            if math.isfinite(of_step.norm):
                self.meter.add("gradient_norm", of_step.norm)
        return all(math.isfinite(of_step.norm) for of_step in numbers)

    @property
    def _reads_late(self) -> bool:
        """Whether values stay on the device until they are needed. fp16's scaling reads in each step anyway."""
        return self.accelerator.device.type != "cpu" and self.config.training.precision != "fp16"

    def ready(self, batch: Batch) -> TrainingBatch:
        """A loaded batch on the device, pictures in [-1, 1] and captions as embeddings.

        It includes the pictures' indices in the whole step, over which noise levels are stratified.
        """
        size = self.config.training.batch_size
        first = batch.samples[0] - batch.samples[0] % size
        return training_batch(batch, self.text, self.accelerator.device, first, size, self.config.stage.pictures)

    def _clip(self) -> Tensor:
        """Clip the gradient if so configured; returns its norm before clipping."""
        limit = self.config.training.optimizer.clip_norm
        norm: Tensor = self.accelerator.clip_grad_norm_(self.network.parameters(), limit or float("inf"))
        return whole(norm.detach())

    # --- every n steps -----------------------------------------------------------------------------------------------

    def _every_so_often(self, step: int, progress: tqdm[Any], stopped: Callable[[], bool]) -> bool:
        """Perform the actions due after a step; returns whether the run was asked to stop, in which case it is saved.

        The checkpoint is written last, so that no earlier action is missing after a kill. A request to stop may be
        followed by a kill, so validation and grid, which take long, are left to the resumed run, even if started.
        """
        stop = any_process(self.accelerator, stopped())
        owes = stop and any(action.lengthy for action in self._due(step))
        if not owes and not self._reported(step, progress, stopped):
            stop = owes = True
        settings = self.config.training
        if stop or is_due(settings.save_every, step, settings.steps):
            self._save(step, owes)
        return stop

    def _due(self, step: int) -> list[Action]:
        return [action for action in self.actions if action.is_due(step, self.config.training.steps)]

    def _reported(self, step: int, progress: tqdm[Any], stopped: Callable[[], bool]) -> bool:
        """Perform the due log entry, validation and grid; False, with all undone, when asked to stop."""
        meter, values = self.meter, dict[str, float]()
        moment = Moment(step, cache(self.averaged_stage), stopped)
        try:
            for action in self._due(step):
                values |= action.run(moment)
        except Stopped:
            self.meter = meter
            return False
        if values:
            self._write_log(step, values, progress)
        return True

    def _actions(self) -> tuple[Action, ...]:
        """The periodic actions, in order."""
        settings, place = self.config.training, (self.accelerator.process_index, self.accelerator.num_processes)
        actions: list[Action] = [LogEntry(settings.log_every, self._summary)]
        if settings.validation:
            validation = Validation(self.config, settings.validation, *place, objective=self.objective)
            actions.append(Validate(settings.validation.every, validation, self.text, self.accelerator))
        grid = SampleGrid(self.config, self.text)
        return (*actions, Grid(settings.sample_every, grid, self.output / "samples", self.accelerator))

    def averaged_stage(self) -> Stage:
        """The stage with the averaged, unsharded weights on this process' device. All processes together."""
        weights = merged(gather(self.ema.of_all(self.stage.network)), self.config.training.lora_kind)
        network = copy.deepcopy(self._plain)
        network.load_state_dict(weights, assign=True)
        return Stage(self.stage.config, network.eval(), self.stage.schedule).to(self.accelerator.device)

    def _summary(self, step: int) -> dict[str, float]:
        """A log entry. All processes together, as the distance of sharded weights requires."""
        settings = self.config.training
        self._read()
        values = self.meter.means()
        values["learning_rate"] = learning_rate(step - 1, settings.optimizer, settings.steps)
        values["ema_distance"] = self.ema.distance(self.stage.network)
        values |= self.meter.measured(self.accelerator.device)
        self.meter = Meter()
        return values

    def _write_log(self, step: int, values: dict[str, float], progress: tqdm[Any]) -> None:
        if "loss" in values:
            progress.set_postfix(loss=f"{values['loss']:.4f}", images_s=f"{values.get('images_per_second', 0):.1f}")
        self.accelerator.log(values, step=step)
        if self.log:
            self._speak(step, values, progress)
            self.log.write(step, values)
            for warning in self.watch.new_warnings(self.log.entries):
                logger.warning("step %d: %s", step, warning)

    def _speak(self, step: int, values: dict[str, float], progress: tqdm[Any]) -> None:
        """Log a line of progress, in the main process, if there is no progress bar."""
        if self.accelerator.is_main_process and progress.disable and "loss" in values:
            line = self.spoken.line(step, values)
            if line:
                logger.info("%s", line)

    def _save(self, step: int, owes: bool) -> None:
        """Write a checkpoint, and the averaged weights as a stage folder. All processes gather, the main one writes.

        owes: whether the resumed run must first perform the actions due after this step.
        """
        self._read()  # raises for values that are not finite, before anything is saved
        keep, device = self.accelerator.is_main_process, "cpu" if shards(self.accelerator) else None
        state = RunState(
            step,
            network=gather(dict(self.stage.network.named_parameters()), keep, device),
            ema=gather(self.ema.weights, keep, device),
            optimizer=gather(optimizer_state(self.optimizer.optimizer, self.stage.network), keep, device),
            meter=self.meter.sums,
            processes=self.accelerator.num_processes,
            scaler=self.accelerator.scaler.state_dict() if self.accelerator.scaler else {},
            owes=owes,
        )

        def write() -> None:
            # The stage first: if the last checkpoint exists, so does everything else.
            averaged = state.network | state.ema
            reading = self.config.text.reading
            lora = self.config.training
            save_stage(self.output / "stage", self.stage.config, merged(averaged, lora.lora_kind), reading=reading)
            if lora.lora_rank:
                save_adapter(self.output / "adapter", averaged, lora.lora_rank, lora.lora_kind)
            save_state(self.output, state, self.config, self.config.training.keep_checkpoints)

        from_main(self.accelerator, write)

    # --- beginning ---------------------------------------------------------------------------------------------------

    def _alone(self, lock: ExitStack, resume: bool) -> None:
        """Lock the run's folder against other writers."""
        if resume and not self.output.exists():
            self._newest()  # raises if there is no run; a mistyped name must not leave a folder behind
        lock.enter_context(only_writer(self.output))

    def _start(self) -> int:
        """Start a new run; the folder must not hold a run, nor anything that the run would replace."""
        from_main(self.accelerator, lambda: check_new(self.output))
        return 0

    def _restore(self) -> int:
        """Restore the newest checkpoint; returns the number of completed steps."""
        from_main(self.accelerator, lambda: check_resumed(self.output))
        state = self._newest_state()
        if state is None:
            logger.warning("%s: the run ended before its first checkpoint; starting again", self.output)
            return 0
        own = self.stage.network.state_dict()
        parts = {name: spread_like(own.get(name, value), value) for name, value in state.network.items()}
        load_weights(self.stage.network, parts, self.output)
        self.ema.load(state.network | state.ema)  # includes formerly frozen weights
        load_optimizer_state(self.optimizer.optimizer, self.stage.network, state.optimizer)
        if self.accelerator.scaler and state.scaler:
            self.accelerator.scaler.load_state_dict(state.scaler)
        self.meter, self._owes = Meter(state.meter), state.owes
        keep = self.config.training.keep_checkpoints
        from_main(self.accelerator, lambda: thin_out_resumed(self.output, state.step, keep))
        logger.info("%s: continuing after step %d", self.output, state.step)
        return state.step

    def _newest_state(self) -> RunState | None:
        """The newest checkpoint that can be read: a disk may fail between its checksum and its reading, too."""
        unreadable: list[Path] = []
        while True:
            # One process chooses: on a shared file system, processes may see different files.
            name = from_main(self.accelerator, lambda: self._newest(unreadable))
            if name is None:
                return None
            try:
                return read_state(Path(name))
            except (CascadeError, OSError) as error:
                if self.accelerator.num_processes > 1:  # the others may have read it
                    raise
                logger.warning("%s: skipped: %s", name, error)
                unreadable.append(Path(name))

    def _newest(self, unreadable: Collection[Path] = ()) -> str | None:
        folder = newest(self.output, self.config, self.accelerator.num_processes, unreadable)
        return None if folder is None else str(folder)

    def _open_folder(self, first: int) -> None:
        with writing(self.output):
            remove_unfinished(self.output)
            write_settings(self.output, self.config)
            mark_begun(self.output)
        self.spoken = Spoken(self.config.stage.name, first, self.config.training.steps)
        logged = first - 1 if self._owes else first
        self.log = RunLog(self.output / "log.jsonl", logged)
        start_trackers(self.accelerator, self.config.stage.name, logged + 1)

    def _batches(self, first_step: int) -> Generator[Batch, None, None]:
        settings = self.config.training
        return batches(
            self.config.data,
            self.stage.config,
            settings.seed,
            batch_size=self._pass_size,
            portion=Portion(
                self.accelerator.process_index,
                self.accelerator.num_processes,
                first_step * settings.accumulation,
                settings.batch_size,
            ),
            # Looked up by the processes that read the pictures, so that this thread does no work on text.
            of_captions=self.text.cache.find if isinstance(self.text, CachedTextEncoder) else None,
        )

    @property
    def _pass_size(self) -> int:
        """Pictures in one forward and backward pass of all processes."""
        return self.config.training.batch_size // self.config.training.accumulation

    def _progress(self, first: int) -> tqdm[Any]:
        return tqdm(
            total=self.config.training.steps,
            initial=first,
            desc=self.stage.name,
            unit="step",
            disable=None if self.accelerator.is_main_process else True,
        )
