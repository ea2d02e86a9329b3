"""Ray Data: a dataset of prompts becomes a dataset of pictures, drawn by a pool of actors.

Needs the extra `cascade-diffusion[ray]`. Seeds follow from (run seed, id) or (run seed, text), so that pictures depend
neither on the number of actors nor on how Ray cuts the dataset.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from cascade.errors import CascadeError
from cascade.seeds import derive_seed

if TYPE_CHECKING:
    import ray.data


class Drawer:
    """What an actor holds: a pipeline, loaded once. Rows that cannot be drawn come back with their error."""

    def __init__(self, model: str | None, options: Mapping[str, Any], run_seed: int, load: Mapping[str, Any]) -> None:
        """options: of `CascadePipeline.__call__`, the same for every prompt. load: of `from_pretrained`."""
        from cascade.pipeline import CascadePipeline

        self._pipeline = CascadePipeline.from_pretrained(model, **load)
        self._options, self._run_seed = dict(options), run_seed

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """A batch of columns with the columns `seed`, `image` (PNG bytes) and `error` (None or text) added."""
        count = len(batch["prompt"])
        rows = [{name: column[row] for name, column in batch.items()} for row in range(count)]
        drawn = [self._drawn(row) for row in rows]
        added = {name: [result[name] for result in drawn] for name in ("seed", "image", "error")}
        return {
            **{name: column for name, column in batch.items() if name != "seed"},
            "seed": np.array(added["seed"], dtype=np.int64),
            "image": _objects(added["image"]),
            "error": _objects(added["error"]),
        }

    def _drawn(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """One picture, alone: then it is the same however the dataset was cut."""
        seed = _seed(row, self._run_seed)
        try:
            image = self._pipeline(str(row["prompt"]), seed=seed, **self._options).images[0]
        except CascadeError as error:
            return {"seed": seed, "image": b"", "error": str(error)}
        buffer = io.BytesIO()
        image.save(buffer, format="PNG")
        return {"seed": seed, "image": buffer.getvalue(), "error": ""}


def generate(
    dataset: ray.data.Dataset,
    *,
    model: str | None = None,
    seed: int = 0,
    concurrency: int | tuple[int, int] = 1,
    batch_size: int = 16,
    num_gpus: float = 0,
    num_cpus: float = 1,
    device: str | None = None,
    dtype: str | None = None,
    **options: Any,
) -> ray.data.Dataset:
    """A dataset with a column `prompt`, and perhaps `id` and `seed`, gets the columns `seed`, `image` and `error`.

    image: PNG bytes, empty where `error` says why. concurrency: actors, or (fewest, most). batch_size: rows that an
    actor takes at a time. num_gpus, num_cpus: of each actor. options: as in `CascadePipeline.__call__`.
    Raises CascadeError when ray is not installed.
    """
    try:
        import ray.data  # noqa: F401 - only whether it is there
    except ImportError:
        raise CascadeError("ray is not installed; pip install 'cascade-diffusion[ray]'") from None
    return dataset.map_batches(
        Drawer,
        fn_constructor_args=(model, options, seed, {"device": device, "dtype": dtype}),
        batch_size=batch_size,
        concurrency=concurrency,
        num_gpus=num_gpus,
        num_cpus=num_cpus,
    )


def _seed(row: Mapping[str, Any], run_seed: int) -> int:
    """The row's own, or one from its id or its text."""
    own = row.get("seed")
    if own is not None and own == own:  # NaN is what a null of a column of numbers becomes
        return int(own)
    identifier = row.get("id")
    return (
        derive_seed(run_seed, "id", str(identifier)) if identifier else derive_seed(run_seed, "text", row["prompt"], 0)
    )


def _objects(values: list[Any]) -> np.ndarray:
    """A column of bytes or text that NumPy does not pad or cut."""
    column = np.empty(len(values), dtype=object)
    column[:] = values
    return column
