"""Multistep consistency distillation: a stage learns to do in a few steps what its teacher does in many."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from cascade.conditioning import NULL_TEXT, Conditioning, TextEncoderProtocol
from cascade.config.training import DistillConfig, LossConfig
from cascade.diffusion import denoisers
from cascade.diffusion.guidance import rescaled
from cascade.diffusion.loss import Weighting, stratify
from cascade.diffusion.noise import CLEAN, Denoiser, Estimate, diffuse, predicted_eps, to_x, x_of
from cascade.errors import CascadeError
from cascade.stage import NetworkCall, Stage, limit
from cascade.system.transfer import on_device
from cascade.training.step import NoiseSource, TrainingBatch, conditions, draw_noise

_SAME = ("resolution", "low_resolution", "path", "residual_scale", "channels")


@dataclass(frozen=True)
class TeacherPath:
    """The teacher's noise levels, and the student's among them.

    levels: log SNR, (N + 1,), increasing, infinite at the end, where the picture is clean. stride: teacher's steps in
    one of the student's.
    """

    levels: Tensor
    stride: int

    @classmethod
    def of(cls, stage: Stage, settings: DistillConfig) -> TeacherPath:
        """The path of the student's own sampling, each of its steps divided."""
        fine = stage.config.sampling.model_copy(update={"steps": settings.teacher_steps})
        levels = stage.noise_levels(fine)
        levels = torch.where(levels >= CLEAN, torch.inf, levels)
        return cls(levels, settings.teacher_steps // stage.config.sampling.steps)

    def places(self, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Log SNR before a step of the teacher, after it, and at the end of the student's step that contains it.

        u: (B,) in [0, 1), the step's place on the path. Each of the three: (B, 1, 1, 1).
        """
        count = len(self.levels) - 1
        step = (u * count).long().clamp(max=count - 1)
        end = (step // self.stride + 1) * self.stride
        before, after, last = (self.levels[place][:, None, None, None] for place in (step, step + 1, end))
        return before, after, last


def teacher_share(before: Tensor, after: Tensor, end: Tensor) -> Tensor:
    """The weight of the teacher's x_hat in the target, in [0, 1]; the student's own at `after` has the rest.

    With rho = exp(log SNR / 2) a DDIM step adds (rho_s - rho_t) x_hat to z / sigma. The one x that leads from t to the
    end in one step as the two estimates do in two steps is therefore their mean with the weights rho_s - rho_t and
    rho_end - rho_s. 1 where the teacher's step ends there, 0 where the end is clean and its step does not reach it.
    """
    share = torch.expm1((after - before) / 2) / torch.expm1((end - before) / 2)
    return torch.where(after == end, torch.ones_like(share), share)


@dataclass(frozen=True)
class Distillation:
    """The loss of a student, in place of `step.Objective`: its x_hat at t leads to the end of its step in one go.

    The target is made of the teacher's x_hat at t, with its guidance and thresholding, and the student's own, without
    gradient, one teacher's step later. At convergence the student's deterministic steps (DDIM, eta 0) end where the
    teacher's do, and need no guidance. Source: Heek, Hoogeboom & Salimans (2024) arXiv 2403.06807, algorithm 2; for
    one step, Song et al. (2023) arXiv 2303.01469.
    """

    settings: LossConfig
    source: NoiseSource
    path: TeacherPath
    teacher: Stage
    text: TextEncoderProtocol
    autocast: Callable[[], AbstractContextManager[object]] = nullcontext

    @classmethod
    def of(cls, stage: Stage, teacher: Stage, settings: DistillConfig, loss: LossConfig, source: NoiseSource,
           text: TextEncoderProtocol) -> Distillation:  # fmt: skip
        """Raises CascadeError when the two do not draw the same kind of picture, or the guidance cannot be taught."""
        for name in _SAME:
            own, others = getattr(stage.config, name), getattr(teacher.config, name)
            if own != others:
                raise CascadeError(
                    f"training.distill.teacher: {settings.teacher} has {name} {others}, but stage.{name} is {own}; they"
                    " must be equal"
                )
        for name in ("projection", "guidance_schedule"):
            if getattr(teacher.config.sampling, name) is not None:
                raise CascadeError(
                    f"training.distill.teacher: {settings.teacher} is drawn with sampling.{name}, which needs one noise"
                    " level for all pictures, and a training step has many; remove it from a copy of its stage.json"
                )
        return cls(loss, source, TeacherPath.of(stage, settings), teacher, text)

    def __call__(self, stage: Stage, network: NetworkCall, batch: TrainingBatch) -> tuple[Tensor, Tensor]:
        """Loss of each picture (B,) and the log SNR (B, 1, 1, 1) at which it was taken.

        network: the student's, possibly wrapped.
        """
        shape, device = batch.x.shape[1:], batch.x.device
        draw = draw_noise(batch.samples, shape, stage.noised_shape(shape), self.source).to(device)
        u = stratify(draw.u, batch.positions, batch.batch_size) if self.settings.stratified else draw.u
        before, after, end = self.path.places(u)
        cond = conditions(stage, batch, draw)
        base, scale = stage.origin(cond, (batch.x.shape[-2], batch.x.shape[-1])), stage.residual_scale
        level = on_device(before, device)
        z = diffuse((batch.x - base) / scale, draw.eps, level)
        with torch.no_grad():
            x = self.target(stage, network, z, cond, (before, after, end))
        loss = self.settings
        pixels = batch.weights(loss)
        weighting = Weighting(loss.space, loss.min_snr_gamma, loss.max_weight, loss.variance_weight, pixels=pixels)
        # z is the same mixture of this x and this noise, so algorithm 18.1's loss is the distance to the target.
        return stage.loss(network, weighting, base + scale * x, cond, level, predicted_eps(x, z, level)), level

    def target(
        self, stage: Stage, network: NetworkCall, z: Tensor, cond: Conditioning, places: tuple[Tensor, Tensor, Tensor]
    ) -> Tensor:
        """The x to which the student's estimate at z (B, C, H, W) is drawn, of the diffused variable."""
        before, after, end = places
        share = teacher_share(before, after, end)
        level = on_device(before, z.device)
        x_teacher = self._teacher(cond, before, z)(z, level)
        assert isinstance(x_teacher, Tensor)
        if bool((share == 1).all()):
            return x_teacher
        # Where the teacher's step is the student's last, the student is not asked; any finite level will do.
        next_level = on_device(torch.where(share == 1, before, after), z.device)
        z_next = diffuse(x_teacher, predicted_eps(x_teacher, z, level), next_level)
        output = network(z_next, next_level, stage.enlarge(cond)).float()[:, : z.shape[1]]
        x_student = to_x(stage.config.parameterization, output, z_next, next_level)
        return torch.lerp(x_student, x_teacher, on_device(share, z.device))

    def _teacher(self, cond: Conditioning, levels: Tensor, z: Tensor) -> Denoiser:
        """The teacher's denoiser as it draws, with a noise level of its own for each picture.

        levels: (B, 1, 1, 1), on the CPU, for guidance that acts in an interval.
        """
        teacher, settings = self.teacher, self.teacher.config.sampling
        low, high = settings.guidance_interval or (-torch.inf, torch.inf)
        acts = (levels >= low) & (levels <= high)

        def guided(z: Tensor, log_snr: Tensor) -> Estimate:
            with self.autocast():
                if settings.guidance == 1 or not bool(acts.any()):
                    return x_of(teacher.prepare(cond)(z, log_snr))
                both = teacher.prepare(cond.joined(self._null(cond)))
                estimate = both(torch.cat([z, z]), torch.cat([log_snr, log_snr]))
            x_cond, x_null = x_of(estimate).chunk(2)
            rule = denoisers.linear(settings.guidance)
            if settings.guidance_rescale:
                rule = rescaled(rule, settings.guidance_rescale)
            return torch.where(on_device(acts, z.device), rule(x_cond, x_null, log_snr), x_cond)

        base, scale = teacher.origin(cond, (z.shape[-2], z.shape[-1])), teacher.residual_scale
        limited = limit(denoisers.to_picture(guided, base, scale), settings)
        return denoisers.to_residual(limited, base, scale)

    def _null(self, cond: Conditioning) -> Conditioning:
        """The same conditions with the null text."""
        null = self.text.encode([NULL_TEXT]).select([0] * len(cond))
        device = cond.text.device
        return cond.with_text(on_device(null.tokens, device).to(cond.text.dtype), on_device(null.mask, device))
