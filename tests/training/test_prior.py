"""Prior preservation: what the start draws is drawn once, and is learned from beside the run's own pictures."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers_model import make_tiny_cascade
from helpers_training import micro_config
from PIL import Image

from cascade import CascadePipeline
from cascade.config.training import TrainConfig
from cascade.data.loader import Views
from cascade.errors import CascadeError
from cascade.seeds import derive_seed
from cascade.storage.index import find_stage
from cascade.storage.prior import with_prior
from cascade.storage.stage import load_stage
from cascade.storage.training import load_plain_text_encoder, load_train_config, load_trainer

PRIOR = "training.prior={prompts: ['a {red|blue} fox', a cat], count: 7, share: 0.75}"


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_cascade(tmp_path_factory.mktemp("models") / "start")


@pytest.fixture
def subject(tmp_path: Path) -> Path:
    """Two pictures of the subject."""
    folder = tmp_path / "subject"
    folder.mkdir()
    for name in ("a", "b"):
        Image.new("RGB", (8, 8), "red").save(folder / f"{name}.png")
        (folder / f"{name}.txt").write_text("a mimble")
    return folder


def run_of(start: Path, subject: Path, name: str, *more: str) -> TrainConfig:
    """A run that trains the base stage of `start` on the subject."""
    return micro_config(
        subject.parent / name,
        f"stage={json.dumps(load_stage(find_stage(f'{start}/base')).config.model_dump(mode='json'))}",
        f"text={{encoder: {start}/text_encoder, max_length: 48}}",
        f"data.sources=[{{kind: folder, path: {subject}}}]",
        f"training.init_from={start}/base",
        *more,
    )


def expanded(config: TrainConfig) -> TrainConfig:
    return with_prior(config, lambda: load_plain_text_encoder(config.text))


def test_the_start_draws_each_prompt_in_turn_with_its_own_seed(start: Path, subject: Path) -> None:
    config = run_of(start, subject, "run", PRIOR)
    source = expanded(config).data.sources[-1]
    folder = subject.parent / "run" / "prior"
    assert source.path == str(folder)
    lines = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    captions = [line["caption"] for line in lines]
    assert len(captions) == 7
    assert set(captions[:3]) == {"a red fox", "a blue fox", "a cat"}
    assert captions[:4] == captions[3:]
    pipeline = CascadePipeline(load_plain_text_encoder(config.text), [load_stage(find_stage(f"{start}/base"))])
    drawn = pipeline(captions[4], seed=derive_seed(config.training.seed, "prior", 4)).images[0]
    assert np.array_equal(np.asarray(drawn), np.asarray(Image.open(folder / lines[4]["file_name"])))


def test_its_drawings_are_the_stated_share_of_the_views(start: Path, subject: Path) -> None:
    config = expanded(run_of(start, subject, "run", PRIOR, "data.caption_dropout=0.0"))
    views = Views(config.data, config.stage, 0)
    captions = [views[number].caption for number in range(400)]
    assert config.data.sources[-1].weight == 3
    assert 80 < captions.count("a mimble") < 120


def test_what_is_there_is_kept_and_what_is_missing_is_drawn_as_before(start: Path, subject: Path) -> None:
    config = run_of(start, subject, "run", PRIOR)
    expanded(config)
    folder = subject.parent / "run" / "prior"
    pictures = {path.name: path.read_bytes() for path in folder.glob("*.png")}
    assert len(pictures) == 7
    (folder / "000005.png").unlink()
    (folder / "000002.png").write_bytes(b"kept")
    expanded(config)
    assert (folder / "000002.png").read_bytes() == b"kept"
    assert (folder / "000005.png").read_bytes() == pictures["000005.png"]
    (folder / "000002.png").write_bytes(pictures["000002.png"])
    with_prior(config, lambda: pytest.fail("nothing is to be drawn"))


def test_drawings_of_other_settings_are_not_taken_for_these(start: Path, subject: Path) -> None:
    expanded(run_of(start, subject, "run", PRIOR))
    other = run_of(start, subject, "run", PRIOR.replace("a cat", "a dog"))
    with pytest.raises(CascadeError, match=r"prior: holds pictures that were drawn with other settings"):
        expanded(other)


def test_a_run_with_a_prior_is_resumed_bit_for_bit(start: Path, subject: Path) -> None:
    def trained(name: str, *steps: int) -> dict[str, torch.Tensor]:
        for part, count in enumerate(steps):
            config = run_of(start, subject, name, PRIOR, f"training.steps={count}")
            assert load_trainer(config).run(resume=part > 0)
        return load_stage(subject.parent / name / "stage").network.state_dict()

    whole, halves = trained("whole", 4), trained("halves", 2, 4)
    assert whole.keys() == halves.keys()
    assert all(torch.equal(value, halves[key]) for key, value in whole.items())
    written = load_train_config(subject.parent / "whole" / "config.yaml")
    assert expanded(written).data == written.data, "the run's own settings name the folder already"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (("training.init_from=null",), "training.prior: nothing to preserve without training.init_from"),
        (("data.sources.0.repeats=2",), "training.prior mixes by weight; give the data.sources a weight"),
        (("stage.resolution=16", "stage.low_resolution=8"), "draw from text alone; base reads a smaller picture"),
        (("training.prior.share=1",), "training.prior.share: should be less than 1"),
        (("training.prior.prompts=[]",), "training.prior.prompts is empty"),
    ],
)
def test_settings_that_cannot_be_are_one_line(
    start: Path, subject: Path, changes: tuple[str, ...], message: str
) -> None:
    with pytest.raises(CascadeError, match=message) as caught:
        run_of(start, subject, "run", PRIOR, *changes)
    assert len(str(caught.value).splitlines()) == 1


def test_a_brace_alone_in_a_prompt_is_named(start: Path, subject: Path) -> None:
    with pytest.raises(CascadeError, match=r"'a \{red fox' has a \{ alone"):
        expanded(run_of(start, subject, "run", "training.prior={prompts: ['a {red fox'], count: 2}"))
