"""Prior preservation: pictures that the start of a fine-tuning draws of other things, which it learns from as well.

They are drawn once, before the run, each with its own seed, into a folder that is an ordinary data source next to the
run's own. The loss is the same for both, as in the paper, whose weight of the two is the share of the views here.

Source: Ruiz et al. (2023) arXiv 2208.12242, section 3.3 (DreamBooth).
"""

from __future__ import annotations

import io
import itertools
import json
import logging
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from PIL import Image

from cascade.config.data import FolderSource
from cascade.config.training import PriorConfig, TrainConfig
from cascade.errors import CascadeError
from cascade.files.atomic import atomic_file, read_json, write_json, write_text
from cascade.files.locks import lock_file
from cascade.files.paths import path_of
from cascade.pipeline import CascadePipeline
from cascade.prompts.reading import prompts_of_set
from cascade.seeds import derive_seed
from cascade.storage.index import find_stage
from cascade.storage.stage import load_stage
from cascade.system.device import choose_device
from cascade.text.t5 import TextEncoder

logger = logging.getLogger("cascade.training")

_BATCH = 8  # pictures per network call
_DESCRIPTION = "prior.json"


def with_prior(config: TrainConfig, text: Callable[[], TextEncoder]) -> TrainConfig:
    """The run with drawings of its start among the data, drawn now where they are missing; `text`: loads the encoder.

    One of several processes draws, the others wait. Raises CascadeError for a folder with drawings of other settings.
    """
    prior = config.training.prior
    if prior is None:
        return config
    folder = path_of(prior.folder) if prior.folder else path_of(config.output) / "prior"
    if any(isinstance(source, FolderSource) and path_of(source.path) == folder for source in config.data.sources):
        return config  # settings that such a run wrote
    with lock_file(folder / ".lock"):
        _draw_missing(config, prior, folder, text)
    weight = sum(source.weight for source in config.data.sources) * prior.share / (1 - prior.share)
    sources = (*config.data.sources, FolderSource(path=str(folder), weight=weight))
    return config.model_copy(update={"data": config.data.model_copy(update={"sources": sources})})


def _draw_missing(config: TrainConfig, prior: PriorConfig, folder: Path, text: Callable[[], TextEncoder]) -> None:
    prompts = _prompts(prior, config.training.seed)
    described = _described(config, prior)
    if not (folder / _DESCRIPTION).exists():
        lines = [json.dumps({"file_name": _name(number), "caption": prompt}) for number, prompt in enumerate(prompts)]
        write_text(folder / "metadata.jsonl", "\n".join(lines) + "\n")
        write_json(folder / _DESCRIPTION, described)
    elif read_json(folder / _DESCRIPTION) != described:
        raise CascadeError(
            f"{folder}: holds pictures that were drawn with other settings of training.prior, or by another start;"
            " delete it, or set training.prior.folder"
        )
    missing = [number for number in range(len(prompts)) if not (folder / _name(number)).exists()]
    if missing:
        assert config.training.init_from is not None, "settings were checked"
        stage = load_stage(find_stage(config.training.init_from))
        pipeline = CascadePipeline(text(), [stage]).to(choose_device(None))
        logger.info("prior preservation: drawing %d pictures with %s, once", len(missing), config.training.init_from)
        for numbers in _several(missing):
            drawn = pipeline(
                [prompts[number] for number in numbers],
                seed=[derive_seed(config.training.seed, "prior", number) for number in numbers],
                batch_size=_BATCH,
            )
            for number, image in zip(numbers, drawn.images, strict=True):
                assert isinstance(image, Image.Image), "8-bit pictures"
                _write(image, folder / _name(number))


def _prompts(prior: PriorConfig, seed: int) -> list[str]:
    """A prompt for each picture: all in turn, in an order by chance, so that fewer pictures are of all kinds."""
    every = list(dict.fromkeys(itertools.chain.from_iterable(map(prompts_of_set, prior.prompts))))
    random.Random(derive_seed(seed, "prior", "order")).shuffle(every)
    return list(itertools.islice(itertools.cycle(every), prior.count))


def _described(config: TrainConfig, prior: PriorConfig) -> dict[str, Any]:
    """All that decides the pictures, but the weights of the start."""
    return {
        "format": 1,
        "prompts": list(prior.prompts),
        "count": prior.count,
        "seed": config.training.seed,
        "start": config.training.init_from,
        "text": config.text.model_dump(mode="json", exclude={"cache"}),
    }


def _name(number: int) -> str:
    return f"{number:06d}.png"


def _write(image: Image.Image, path: Path) -> None:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    with atomic_file(path) as temporary:
        temporary.write_bytes(buffer.getvalue())


def _several(numbers: list[int]) -> Iterator[list[int]]:
    yield from (numbers[start : start + _BATCH] for start in range(0, len(numbers), _BATCH))
