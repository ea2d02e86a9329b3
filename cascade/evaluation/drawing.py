"""Drawing for a measurement: every prompt has its own seed, derived from the run's seed and the prompt's text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

from PIL import Image

from cascade.evaluation.report import Request
from cascade.pipeline import CascadePipeline
from cascade.sampling import resolve_sampling
from cascade.seeds import derive_seed


def draw(
    pipeline: CascadePipeline, prompts: Sequence[str], request: Request, until: int | None = None
) -> list[Image.Image]:
    """A picture for each prompt, from the stage of `until` px; None: the base stage.

    The noise depends on (run seed, text, number of earlier equal texts), not on the other prompts.
    """
    until = until or base_resolution(pipeline)
    output = pipeline(prompts, seed=prompt_seeds(prompts, request.seed), until=until, **_arguments(request))
    return cast(list[Image.Image], output.images)


def draw_stages(
    pipeline: CascadePipeline, prompts: Sequence[str], request: Request, counts: Mapping[int, int]
) -> dict[int, list[Image.Image]]:
    """Pictures of several stages by size, each of the first `counts[size]` prompts; larger sizes have fewer.

    A prompt's pictures of all sizes are drawn in one run, with the noise of `draw`.
    """
    seeds = prompt_seeds(prompts, request.seed)
    drawn: dict[int, list[Image.Image]] = {size: [] for size in sorted(counts)}
    start = 0
    for size in sorted(counts, reverse=True):
        end = max(start, min(counts[size], len(prompts)))
        if end > start:
            output = pipeline(list(prompts[start:end]), seed=seeds[start:end], until=size, **_arguments(request))
            for smaller in (other for other in drawn if other <= size):
                drawn[smaller] += cast(list[Image.Image], output.stages[smaller])
        start = end
    return drawn


def _arguments(request: Request) -> dict[str, Any]:
    """Of the pipeline; without the model's default style, because a suite measures its own prompts."""
    own = {"batch_size": request.batch_size, "progress": request.progress}
    return {**request.sampling, **own, "default_style": "none"}


def prompt_seeds(prompts: Sequence[str], seed: int) -> list[int]:
    """The seed of each prompt; equal prompts get different ones."""
    seen: dict[str, int] = {}
    seeds = []
    for prompt in prompts:
        seen[prompt] = seen.get(prompt, -1) + 1
        seeds.append(derive_seed(seed, "evaluate", prompt, seen[prompt]))
    return seeds


def base_resolution(pipeline: CascadePipeline) -> int:
    """Resolution of the first stage, in pixels."""
    return pipeline.slots[0].config.resolution


def used_sampling(pipeline: CascadePipeline, request: Request) -> dict[str, Any]:
    """The complete sampling settings of every stage, including the model's defaults.

    Raises CascadeError for a stage or value that does not exist, before anything is drawn.
    """
    configs = [slot.config for slot in pipeline.slots]
    settings = resolve_sampling(configs, None, request.sampling)
    return {name: setting.model_dump(mode="json") for name, setting in settings.items()}
