"""The engine alone: tasks of any kind in one instance, reported steps, stops between steps."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers_model import make_tiny_cascade
from torch import Tensor

from cascade import CascadeError, CascadePipeline
from cascade.conditioning import TextEmbeddings
from cascade.drawing.arguments import resolve_sampling
from cascade.drawing.engine import Conduct, Engine, StoppedError
from cascade.drawing.recipe import Recipe
from cascade.drawing.task import Drawn, Step, Task, enlarging


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> CascadePipeline:
    return CascadePipeline.from_pretrained(make_tiny_cascade(tmp_path_factory.mktemp("m") / "tiny"), device="cpu")


def task(
    pipeline: CascadePipeline,
    prompt: str,
    seed: int,
    until: int = 16,
    size: tuple[int, int] | None = None,
    steps: int = 2,
) -> Task:
    settings = resolve_sampling([slot.config for slot in pipeline.slots], None, {"steps": steps})
    names = [slot.config.name for slot in pipeline.slots_until(until)]
    height, width = size or (until, until)
    return pipeline.task(
        Recipe(
            prompt=prompt,
            negative_prompt="",
            seed=seed,
            number=0,
            height=height,
            width=width,
            stages={name: settings[name] for name in names},
        )
    )


def pixels(drawn: Drawn) -> Tensor:
    return drawn.pixels[-1]


def test_tasks_of_different_sizes_settings_and_lengths_are_drawn_in_one_life(pipeline: CascadePipeline) -> None:
    tasks = [
        task(pipeline, "a fox", 1),
        task(pipeline, "a fox", 1, until=8),
        task(pipeline, "a box", 2, size=(16, 32)),
        task(pipeline, "a fox", 1, steps=3),
        task(pipeline, "a fox", 1, until=32),
    ]
    low = torch.randint(0, 256, (3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    settings = pipeline.slots[1].config.sampling
    tasks.append(enlarging(pipeline.slots[1], low, "a fox", settings))
    together = pipeline.engine(Conduct(batch_size=2)).draw_all(tasks)
    alone = [pipeline.engine(Conduct(batch_size=2)).draw_all([one])[0] for one in tasks]
    assert [tuple(pixels(drawn).shape[-2:]) for drawn in together] == [
        (16, 16), (8, 8), (16, 32), (16, 16), (32, 32), (16, 16),
    ]  # fmt: skip
    for both in zip(together, alone, strict=True):
        assert torch.equal(*map(pixels, both))


def test_a_call_of_the_pipeline_and_its_tasks_are_the_same_pictures(pipeline: CascadePipeline) -> None:
    (drawn,) = pipeline.engine().draw_all([task(pipeline, "a fox", 1, until=32)])
    called = pipeline("a fox", seed=1, steps=2, output_type="np").images[0]
    assert torch.equal(pixels(drawn).permute(1, 2, 0), torch.from_numpy(called))


def test_an_engine_goes_on_where_another_call_left_off(pipeline: CascadePipeline) -> None:
    engine = pipeline.engine()
    first = engine.draw_all([task(pipeline, "a fox", 1)])
    engine.draw_all([task(pipeline, "a box", 2, until=8)])
    assert torch.equal(pixels(first[0]), pixels(engine.draw_all([task(pipeline, "a fox", 1)])[0]))


def test_every_step_is_reported_with_what_the_network_sees(pipeline: CascadePipeline) -> None:
    seen: list[Step] = []
    tasks = [task(pipeline, "a fox", seed, steps=3) for seed in range(3)]
    drawn = pipeline.engine(Conduct(batch_size=2, on_step=seen.append)).draw_all(tasks)
    assert [(step.stage, step.batch, step.step) for step in seen] == [
        (stage, batch, step) for stage in ("base", "sr16") for batch in range(2) for step in range(3)
    ]
    assert {(step.steps, step.batches) for step in seen} == {(3, 2)}
    last = seen[-1]
    assert last.tasks == tasks[2:], "what only fills a batch is not reported"
    assert last.x_hat.shape == (1, 3, 16, 16)
    assert (last.x_hat[0].clamp(-1, 1) - (pixels(drawn[2]).float() / 127.5 - 1)).abs().max() < 0.05


def test_an_engine_is_stopped_between_two_steps_and_draws_again(pipeline: CascadePipeline) -> None:
    steps: list[int] = []
    conduct = Conduct(on_step=lambda step: steps.append(step.step), abort=lambda: len(steps) == 2)
    engine = Engine(pipeline.encode, pipeline.device, conduct)
    with pytest.raises(StoppedError):
        engine.draw_all([task(pipeline, "a fox", 1, steps=4)])
    assert steps == [0, 1]
    (drawn,) = engine.draw_all([task(pipeline, "a fox", 1, until=8)])
    assert torch.equal(pixels(drawn), pixels(pipeline.engine().draw_all([task(pipeline, "a fox", 1, until=8)])[0]))


def test_a_picture_of_any_size_is_enlarged_and_cut_to_its_multiple(pipeline: CascadePipeline) -> None:
    """8 px divide by the network's step, 7 do not: the edge is repeated, drawn, and cut off again."""
    slot = pipeline.slots[1]
    low = torch.full((3, 7, 5), 200, dtype=torch.uint8)
    (drawn,) = pipeline.engine().draw_all([enlarging(slot, low, "", slot.config.sampling)])
    assert pixels(drawn).shape == (3, 7 * slot.config.scale, 5 * slot.config.scale)


def long_prompt(pipeline: CascadePipeline) -> str:
    """Three windows."""
    prompt = "a red fox of the apple " * 20
    assert len(pipeline.text_encoder.windows(prompt)) == 3
    return prompt


def test_a_long_prompt_is_read_in_windows_whose_embeddings_are_joined(pipeline: CascadePipeline) -> None:
    prompt = long_prompt(pipeline)
    rows = [row for text in pipeline.text_encoder.windows(prompt) for row in pipeline.encode([text]).rows()]
    joined = TextEmbeddings.from_rows([torch.cat(rows)]).padded(3 * pipeline.text_encoder.max_length)
    how: dict[str, Any] = {"seed": 1, "until": 8, "output_type": "pt"}
    read = pipeline(prompt, long_prompts="chunk", **how).images
    assert torch.equal(read, pipeline(prompt_embeds=joined, **how).images)
    with pytest.warns(UserWarning, match="cut after"):
        assert not torch.equal(read, pipeline(prompt, **how).images)
    short = [pipeline("a fox", long_prompts=way, **how).images for way in ("cut", "chunk")]
    assert torch.equal(*short)


def test_a_picture_does_not_depend_on_the_lengths_of_other_prompts(pipeline: CascadePipeline) -> None:
    """Which share no batch, since sums over more tokens may differ in their last bits."""
    prompts = ["a fox", long_prompt(pipeline), "a (red:1.5) box"]
    how: dict[str, Any] = {"long_prompts": "chunk", "prompt_language": True, "until": 8, "output_type": "pt"}
    together = pipeline(prompts, seed=[1, 2, 3], batch_size=2, **how).images
    for seed, prompt in enumerate(prompts, start=1):
        assert torch.equal(pipeline(prompt, seed=seed, batch_size=2, **how).images[0], together[seed - 1])


def test_an_unknown_way_with_long_prompts_is_refused(pipeline: CascadePipeline) -> None:
    with pytest.raises(CascadeError, match="long_prompts: 'split'; expected one of cut, chunk"):
        pipeline("a fox", long_prompts="split")
