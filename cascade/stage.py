"""A stage: a network, its noise schedule and what it predicts, at one resolution; built from its settings."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from cascade.conditioning import Conditioning
from cascade.conditions.settings import TEXT
from cascade.config.sampling import SamplingConfig
from cascade.config.stage import (
    ConstantSchedule,
    CosineSchedule,
    LinearSchedule,
    ScheduleConfig,
    SquaredCosineSchedule,
    StageConfig,
)
from cascade.diffusion import denoisers, schedules
from cascade.diffusion.editing import Known, is_redrawn, keep_known, levels_from, sample_repaint, see_known, start_from
from cascade.diffusion.guidance import (
    Act,
    Projected,
    autoguide,
    by_level,
    chain,
    coefficients,
    compose,
    rescaled,
    switch,
)
from cascade.diffusion.loss import Weighting, diffusion_loss
from cascade.diffusion.noise import Denoiser, Estimate, alpha, diffuse, log_snr_from_std, to_x
from cascade.diffusion.samplers import SAMPLERS, Generators, OnStep, evaluations
from cascade.diffusion.schedules import (
    DiscreteSchedule,
    NoiseSchedule,
    log_snr_grid,
    named_steps,
    spaced_steps,
    step_grid,
)
from cascade.errors import CascadeError
from cascade.files.tensors import is_streamed, move_streamed
from cascade.models.network import Network, TiledNetwork
from cascade.pictures.images import upsample, upsample_corners
from cascade.system.transfer import on_device

NetworkCall = Callable[[Tensor, Tensor, Conditioning], Tensor]


@dataclass
class Stage:
    """One diffusion model of the cascade. It is a ConditionalDenoiser: `prepare` returns the denoiser of a generation.

    The diffused variable r is the picture itself (path `picture`) or its scaled difference from the upsampled smaller
    picture (path `residual`). `prepare` and the sampler work on r, `sample` and `loss` on pictures.
    """

    config: StageConfig
    network: Network
    schedule: NoiseSchedule
    known: Known | None = None
    """The start pictures of this stage, and which of their pixels stay; see `knowing`."""
    acts: Sequence[Act[Conditioning]] = ()
    """Conditions that replace those of `sample`; see `following`."""
    weaker: Stage | None = None
    """A worse version of this stage, such as an earlier checkpoint, for guidance away from it; see `autoguide`."""

    @property
    def name(self) -> str:
        """The stage's name in per-stage options."""
        return self.config.name

    @property
    def scale(self) -> int:
        """Factor from the smaller picture to this one, 1 for a base stage."""
        return self.config.scale

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        return next(self.network.parameters()).device

    def prepare(self, cond: Conditioning) -> Denoiser:
        """The denoiser of r for these conditions; text and the smaller picture are read here, once."""
        dtype = next(self.network.parameters()).dtype
        prepared = self.network.prepare(self.enlarge(cond).to(dtype=dtype))

        def denoise(z: Tensor, log_snr: Tensor) -> Estimate:
            output, *spread = self.network(z, log_snr, prepared).float().split(z.shape[1], dim=1)
            x_hat = to_x(self.config.parameterization, output, z, log_snr)
            return (x_hat, (spread[0] + 1) / 2) if spread else x_hat

        return denoise

    def sample(
        self,
        cond: Conditioning,
        null: Conditioning,
        z: Tensor,
        rng: Generators,
        settings: SamplingConfig | None = None,
        on_step: OnStep | None = None,
    ) -> Tensor:
        """Draw pictures from the noise z (B, C, H, W), which sets their size: float32, about [-1, 1].

        cond, null: the conditions, and the same with the null text or a negative prompt; low_res already noised.
        rng: one generator per picture, for samplers that add noise in between. on_step receives x_hat as pictures.
        """
        settings = settings or self.config.sampling
        base, scale = self.origin(cond, (z.shape[-2], z.shape[-1])), self.residual_scale
        guided = self._guided(cond, null, settings)
        differs = self.config.path == "residual"  # else r is the picture
        picture = limit(denoisers.to_picture(guided, base, scale) if differs else guided, settings)
        log_snrs = self.noise_levels(settings)
        known = self.known
        if known is not None:
            log_snrs = levels_from(self.schedule, log_snrs, known.strength)
            if len(log_snrs) == 1:
                return known.x
            z = start_from(known, (known.x - base) / scale, z, log_snrs[:1, None, None, None].to(z.device))
            picture = picture if known.mask is None or known.clean else keep_known(picture, known.x, known.mask)
        denoise = denoisers.to_residual(picture, base, scale) if differs else picture
        kept = None if known is None or not known.clean else known.mask
        if known is not None and kept is not None:
            denoise = see_known(denoise, (known.x - base) / scale, kept)
        report = on_step or _ignore
        if differs:
            report = _as_pictures(report, base, scale)
        if known is not None and known.rounds > 1:
            x = base + scale * sample_repaint(denoise, z, log_snrs, rng, report, known.rounds)
        else:
            x = base + scale * run_sampler(settings, denoise, z, log_snrs, rng, report)
        return x if known is None or kept is None else torch.where(is_redrawn(kept), x, known.x)

    def loss(
        self,
        network: NetworkCall,
        weighting: Weighting,
        x: Tensor,
        cond: Conditioning,
        log_snr: Tensor,
        eps: Tensor,
    ) -> Tensor:
        """Training loss of each picture x (B, C, H, W): (B,). `network` is this stage's, perhaps wrapped."""
        base = self.origin(cond, (x.shape[-2], x.shape[-1]))
        r = (x - base) / self.residual_scale
        seen = self.enlarge(cond)
        kind = self.config.parameterization
        step = self.schedule.reverse_step(log_snr) if isinstance(self.schedule, DiscreteSchedule) else None
        weighting = replace(weighting, step=step)
        return diffusion_loss(lambda z, level: network(z, level, seen), kind, weighting, r, log_snr, eps)

    def noise_levels(self, settings: SamplingConfig | None = None) -> Tensor:
        """Log SNR before each step, and at the end: (N + 1,), increasing.

        Raises CascadeError for numbered steps that this stage's schedule does not define.
        """
        settings, total = settings or self.config.sampling, self.schedule.steps
        numbers, spacing = settings.timesteps, settings.spacing
        if numbers is None and spacing != "leading" and spacing != "trailing":
            return log_snr_grid(self.schedule, settings.steps, spacing)
        if total is None:
            raise CascadeError(
                f"stage {self.name}: its schedule is continuous and has no numbered steps; use spacing t"
            )
        if isinstance(numbers, str):
            numbers = named_steps(numbers, total)
        if numbers is None:
            if settings.steps > total:
                raise CascadeError(f"stage {self.name}: steps: {settings.steps}; its schedule has only {total}")
            numbers = spaced_steps(settings.steps, "leading" if spacing == "leading" else "trailing", total)
        if numbers[0] >= total:
            raise CascadeError(
                f"stage {self.name}: timesteps: {numbers[0]}; its schedule numbers them 0 to {total - 1}"
            )
        return step_grid(self.schedule, numbers)

    def count_steps(self, settings: SamplingConfig | None = None) -> int:
        """Sampling steps, N. Raises CascadeError as `noise_levels` does."""
        return len(self.noise_levels(settings)) - 1

    def evaluations(self, settings: SamplingConfig | None = None) -> list[float]:
        """Log SNR of each evaluation of the denoiser for a picture. Raises CascadeError as `noise_levels` does.

        Each is one call of the network, or two where guidance acts.
        """
        sampler = (settings or self.config.sampling).sampler
        return evaluations(SAMPLERS[sampler.kind], self.noise_levels(settings), **sampler.own)

    def noised_shape(self, shape: tuple[int, ...]) -> tuple[int, ...] | None:
        """(C, h, w) of the noise on the smaller picture, for pictures of shape (C, H, W); None for a base stage."""
        if self.config.low_resolution is None:
            return None
        *channels, height, width = shape
        shrink = 1 if self.config.model.enlarges_first else self.scale
        return *channels, height // shrink, width // shrink

    def see(self, cond: Conditioning, low: Tensor, aug_level: Tensor, eps: Tensor) -> Conditioning:
        """`cond` with the smaller picture as this stage's network sees it: noised, and enlarged first if so configured.

        low: (B, C, h, w) in [-1, 1]. aug_level: (B,), standard deviation of the noise, on the CPU: its log SNR is
        computed in float64, which some GPUs lack. eps: (B, *noised_shape).
        """
        if self.config.model.enlarges_first:
            height, width = low.shape[-2:]
            low = upsample_corners(low, (height * self.scale, width * self.scale))
        level = on_device(log_snr_from_std(aug_level)[:, None, None, None], low.device)
        return replace(cond, low_res=diffuse(low, eps, level), low_res_log_snr=level)

    def enlarge(self, cond: Conditioning) -> Conditioning:
        """The conditions with the smaller picture upsampled to this stage's size."""
        if cond.low_res is None or self.config.model.enlarges_first:
            return cond
        height, width = cond.low_res.shape[-2:]
        return replace(cond, low_res=upsample(cond.low_res, (height * self.scale, width * self.scale)))

    def origin(self, cond: Conditioning, size: tuple[int, int]) -> Tensor:
        """The picture from which r is measured: zero, or the upsampled smaller picture, its signal scaled back to 1."""
        if self.config.path == "picture" or cond.low_res is None or cond.low_res_log_snr is None:
            return torch.zeros(len(cond), self.config.pictures.channels, *size, device=cond.text.device)
        return upsample(cond.low_res.float(), size) / alpha(cond.low_res_log_snr).sqrt()

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Stage:
        """Move the network (for a streamed one, its computation) and use channels-last, the fastest convolutions."""
        if is_streamed(self.network):
            move_streamed(self.network, device, dtype)
            return self
        self.network.to(device=device, dtype=dtype, memory_format=torch.channels_last)  # type: ignore[call-overload]
        return self

    def knowing(self, known: Known | None) -> Stage:
        """This stage with start pictures, or pixels that must stay."""
        return self if known is None else replace(self, known=known)

    def following(self, acts: Sequence[Act[Conditioning]]) -> Stage:
        """This stage with other conditions than `sample` receives: several at a time, or changing between steps."""
        return replace(self, acts=acts) if acts else self

    def tiled(self, side: int | None) -> Stage:
        """This stage with a network that computes square tiles of this side one at a time; None: whole pictures.

        Raises CascadeError if the network sees the whole picture at once, or if it cannot divide the side.
        """
        if side is None:
            return self
        step, radius = self.config.geometry.divisor, self.config.geometry.receptive_radius
        if radius is None:
            raise CascadeError(f"tile: stage {self.name} sees the whole picture at once; draw it without tiles")
        if side < step or side % step:
            raise CascadeError(f"tile: {side}; stage {self.name} expects a multiple of {step}")
        return replace(self, network=TiledNetwork(self.network, side, radius))

    def _guided(self, cond: Conditioning, null: Conditioning, settings: SamplingConfig) -> Denoiser:
        """The denoiser with guidance as in the settings, before thresholding."""
        interval, levels = settings.guidance_interval, self.noise_levels(settings)
        if self.weaker is not None and settings.autoguidance != 1:
            return autoguide(self, self.weaker, cond, settings.autoguidance)
        if settings.guidance_of and self.acts:
            raise CascadeError(
                f"stage {self.name}: guidance_of has no meaning with weighted or changing prompts or regions; leave it"
                " out and set guidance"
            )
        if settings.guidance_of:
            groups, weights = links(self.config, settings)
            return chain(self, _revealed(cond, null, groups), weights, interval)
        if not self.acts:
            return denoisers.guide(self, cond, null, guidance_rule(settings), interval)
        weight = guidance_rule(settings)
        rule = weight if callable(weight) else denoisers.linear(weight) if weight != 1 else None
        return switch(
            [
                (
                    float(levels[round(act.start * (len(levels) - 1))]),
                    compose(self, act.parts, act.nulls, rule, interval),
                )
                for act in self.acts
            ]
        )

    @property
    def residual_scale(self) -> float:
        """Factor from the diffused variable to pictures; 1 where it is the picture itself."""
        return self.config.residual_scale if self.config.path == "residual" else 1.0


def links(config: StageConfig, settings: SamplingConfig) -> tuple[list[list[str]], list[float]]:
    """(groups of conditions that guidance reveals one after another, their weights); see `SamplingConfig`."""
    own = settings.guidance_of
    rest = [name for name in config.guided if name not in own]
    groups = [[name] if name in own else rest for name in config.guided if name in own or name == rest[-1]]
    return groups, [own.get(group[0], settings.guidance) for group in groups]


def calls_at_once(config: StageConfig, settings: SamplingConfig) -> int:
    """Network calls per evaluation where guidance acts."""
    if settings.guidance_of:
        return max(1, sum(factor != 0 for factor in coefficients(links(config, settings)[1])))
    return 1 if settings.guidance == 1 else 2


def _revealed(cond: Conditioning, null: Conditioning, groups: Sequence[Sequence[str]]) -> list[Conditioning]:
    """The nulls, then with one group of conditions more each time."""
    found, shown = [null], set[str]()
    for group in groups:
        shown |= set(group)
        text = cond if TEXT in shown else null
        given = {name: (cond if name in shown else null).given[name] for name in cond.given}
        found.append(replace(null.with_text(text.text, text.text_mask), given=given))
    return found


def _ignore(step: int, x_hat: Tensor) -> None:
    """The default callback, which does nothing."""


def _as_pictures(on_step: OnStep, base: Tensor, scale: float) -> OnStep:
    """A callback that receives residuals and passes on the corresponding pictures."""
    return lambda step, r: on_step(step, base + scale * r)


def limit(denoise: Denoiser, settings: SamplingConfig) -> Denoiser:
    """`denoise` with the thresholding in the settings: none, `clip`, or dynamic at a quantile."""
    if settings.threshold is None:
        return denoise
    if isinstance(settings.threshold, str):
        return denoisers.clip(denoise)
    maximum = torch.inf if settings.threshold_maximum is None else settings.threshold_maximum
    return denoisers.threshold(denoise, settings.threshold, maximum)


def guidance_rule(settings: SamplingConfig) -> denoisers.Rule | float:
    """A new object for the rule in the settings; a number: the usual rule with this weight, 1: no guidance."""
    weight = settings.guidance
    rule: denoisers.Rule | None = None
    if weight == 1:
        return weight
    if settings.guidance_schedule is not None:
        rule = by_level(settings.guidance_schedule, weight)
    if settings.projection is not None:
        own = settings.projection
        rule = Projected(weight, own.parallel, own.momentum, own.radius)
    if settings.guidance_rescale:
        rule = rescaled(rule or denoisers.linear(weight), settings.guidance_rescale)
    return weight if rule is None else rule


def run_sampler(
    settings: SamplingConfig, denoise: Denoiser, z: Tensor, log_snrs: Tensor, rng: Generators, on_step: OnStep
) -> Tensor:
    """Run the sampler named in the settings, with its own settings."""
    sampler = settings.sampler
    return SAMPLERS[sampler.kind](denoise, z, log_snrs, rng, on_step, **sampler.own)


# --- from settings ---------------------------------------------------------------------------------------------------
# From settings to objects.


def build_schedule(config: ScheduleConfig, resolution: int) -> schedules.NoiseSchedule:
    """The noise schedule of a stage of this resolution."""
    match config:
        case ConstantSchedule():
            return schedules.DiscreteSchedule(schedules.constant_betas(config.beta, config.steps))
        case LinearSchedule():
            return schedules.DiscreteSchedule(schedules.linear_betas(config.beta_start, config.beta_end, config.steps))
        case SquaredCosineSchedule():
            return schedules.DiscreteSchedule(schedules.squared_cosine_betas(config.steps, config.max_beta))
        case CosineSchedule():
            reference = config.reference_resolution
            shift = schedules.resolution_shift(resolution, reference) if reference else 0.0
            return schedules.CosineSchedule(shift, (config.log_snr_min, config.log_snr_max), config.offset)


def build_network(config: StageConfig) -> Network:
    """The network of a stage, with fresh weights."""
    channels = config.pictures.channels
    network = config.model.build(channels, 0 if config.low_resolution is None else channels)
    if config.conditions:  # last, so that they change none of the other fresh weights
        network.add_conditions(config.conditions)
    return network


def build_stage(config: StageConfig, device: torch.device | str = "cpu", seed: int = 0) -> Stage:
    """A stage with fresh weights that follow from `seed`; `device` may be "meta" to hold none at all."""
    with torch.random.fork_rng(devices=[]), torch.device(device):
        torch.manual_seed(seed)
        network = build_network(config)
    network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return Stage(config, network, build_schedule(config.schedule, config.resolution))
