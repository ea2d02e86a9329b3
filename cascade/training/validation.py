"""The loss on held-out pictures, with the same views, noise and noise levels each time: only the weights differ."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import closing
from dataclasses import replace
from itertools import islice

import torch
from torch import Tensor

from cascade.config.training import TrainConfig, ValidationConfig
from cascade.data.loader import Batch, Portion, batches
from cascade.stage import Stage
from cascade.text.embeddings import TextEncoderProtocol
from cascade.training.distill import Distillation
from cascade.training.step import NoiseSource, Objective, training_batch

SEED = 0
"""Seed of views and noise; not the run's, so that runs with different seeds can be compared."""


class Validation:
    """The held-out views of one process, and their losses."""

    def __init__(
        self,
        config: TrainConfig,
        settings: ValidationConfig,
        process: int = 0,
        processes: int = 1,
        objective: Objective | Distillation | None = None,
    ) -> None:
        """Read the views, which are the same each time, and keep them in memory. objective: the run's own, if not
        algorithm 18.1.

        Mistakes thus show before the first step, and a large folder is listed once. A batch of uint8 pictures is small
        compared with the activations of its pass. Raises CascadeError when they cannot be read.
        """
        self._stage_config = config.stage.undropped()
        # Pictures are unchanged: nothing is dropped, mirrored or moved. Crops, if any, are the same each time.
        unchanged = {"sources": settings.sources, "caption_dropout": 0.0, "flip": 0.0, "jitter": 0.0, "workers": 0}
        self._data = config.data.model_copy(update=unchanged | {"joint_dropout": 0.0})
        # Noise levels spread evenly over all views have the least variance for this number of views.
        loss = config.training.loss.model_copy(update={"stratified": True})
        source = NoiseSource(SEED, self._data.max_aug_level, self._data.aug_spread, "validation")
        self.objective = replace(objective or Objective(loss, source), settings=loss, source=source)
        self._pass_size = config.training.batch_size // config.training.accumulation
        self._process, self._processes = process, processes
        with closing(self._views()) as views:
            # The same views for any number of passes per step, so that the losses can be compared.
            self._batches = list(islice(views, settings.batches * config.training.accumulation))

    @torch.inference_mode()
    def losses(
        self,
        stage: Stage,
        text: TextEncoderProtocol,
        device: torch.device,
        before_batch: Callable[[], None] = lambda: None,
    ) -> tuple[Tensor, Tensor]:
        """Loss and log SNR of each view of this process, both (batches * share,), on `device`.

        before_batch: called by every process, and may raise.
        """
        losses, levels = [], []
        total = len(self._batches) * self._pass_size
        for batch in self._batches:
            before_batch()
            ready = training_batch(batch, text, device, 0, total, self._stage_config.pictures)
            loss, level = self.objective(stage, stage.network, ready)
            losses.append(loss.float())
            levels.append(level.flatten())
        return torch.cat(losses), torch.cat(levels)

    def _views(self) -> Generator[Batch, None, None]:
        portion = Portion(self._process, self._processes)
        return batches(self._data, self._stage_config, SEED, batch_size=self._pass_size, portion=portion)
