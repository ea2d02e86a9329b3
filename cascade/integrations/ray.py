"""Ray Data: a dataset of prompts becomes a dataset of pictures, drawn by a pool of actors.

Needs the extra `cascade-diffusion[ray]`. A picture follows from its row and the run seed alone: neither the number of
actors nor how Ray cuts the dataset changes it.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from cascade.batch.metadata import Describer, encode
from cascade.batch.plan import DrawOptions, Job, Planner, Target
from cascade.drawing.task import Result, Undrawn
from cascade.errors import CascadeError
from cascade.images import to_pil
from cascade.pipeline import CascadePipeline
from cascade.prompts.columns import COLUMNS, checked, without_nulls
from cascade.prompts.record import BadLineError, record_of
from cascade.quoting import quoted
from cascade.values import SETTINGS

if TYPE_CHECKING:
    import pyarrow as pa
    import ray.data

ADDED = ("number", "seed", "image", "error")
"""Columns of the result; those of the prompts with these names are replaced."""
_READ = set(COLUMNS) - {"image", "mask", "strength"}
"""Columns that say what to draw. `image` is what is drawn, so that no row names a picture to change."""
_OPTIONS = {
    "num_images_per_prompt": "num_images",
    **{name: name for name in ("negative_prompt", "until", "height", "width", "preset", "batch_size")},
}
"""Arguments of a call and what `DrawOptions` calls them."""


class Drawer:
    """What an actor holds: a pipeline, loaded once."""

    def __init__(self, model: str | None, load: Mapping[str, Any], options: DrawOptions) -> None:
        """model, load: of `CascadePipeline.from_pretrained`. Raises CascadeError for what no row can mend."""
        pipeline = CascadePipeline.from_pretrained(model, **load)
        self._run_seed, self._planner = options.run_seed, Planner(pipeline, options)
        self._engine, self._describe = pipeline.engine(options.conduct()), Describer(pipeline, options)

    def __call__(self, table: pa.Table) -> pa.Table:
        """A row for each picture, in the order of the prompts; and one for each prompt that cannot be drawn."""
        prompts = table.select([name for name in table.column_names if name in _READ])
        jobs = [self._planned(row) for row in prompts.to_pylist()]
        targets = {job: list(job.targets()) for job in jobs if isinstance(job, Job)}
        tasks = {target.task(): target for own in targets.values() for target in own}
        drawn = {tasks[result.task]: result for result in self._engine.draw(list(tasks))}
        rows: list[int] = []
        added: list[dict[str, Any]] = []
        for row, job in enumerate(jobs):
            own = [_failed(job)] if isinstance(job, str) else [self._picture(at, drawn[at]) for at in targets[job]]
            rows += [row] * len(own)
            added += own
        return _joined(table, rows, added)

    def _planned(self, row: Mapping[str, Any]) -> Job | str:
        """What is to be drawn for a row, or why it cannot be."""
        try:
            return self._planner.job(record_of(checked(without_nulls(row)), self._run_seed, origin="row"))
        except (BadLineError, CascadeError) as error:
            return str(error)

    def _picture(self, target: Target, result: Result) -> dict[str, Any]:
        said = {"number": target.number, "seed": target.job.record.seed}
        if isinstance(result, Undrawn):
            return _failed(result.reason) | said
        image = to_pil(result.pixels[-1][None])[0]
        return {**said, "image": encode(image, self._describe(target, result), "png")[0], "error": None}


def generate(
    dataset: ray.data.Dataset,
    *,
    model: str | None = None,
    seed: int = 0,
    concurrency: int | tuple[int, int] = 1,
    rows: int = 16,
    num_gpus: float = 0,
    num_cpus: float = 1,
    device: str | None = None,
    dtype: str | None = None,
    **options: Any,
) -> ray.data.Dataset:
    """A dataset of prompts -> a dataset of pictures, a row a picture.

    Each row needs a `prompt`, and may have what a line of a prompt file may: `id`, `seed`, `negative_prompt`,
    `num_images`, `guidance`, `steps` (the last two a value, or {stage: value}); what is null is as the call says. All
    columns are kept, and these added: `number` of the picture among those of its prompt, `seed`, `image` (PNG, which
    says what drew it) or null, and `error`, null or why there is no picture.

    A row without a seed gets one from (seed, id), or without an id from (seed, text), as the first line with that text
    in a prompt file would. A dataset has no order, so nothing says how often a text occurred before: rows that repeat
    a text and have neither id nor seed get equal pictures. For different ones ask for `num_images`, or give ids.

    model, device, dtype: of `CascadePipeline.from_pretrained`. concurrency: actors, or (fewest, most). rows: that an
    actor takes at a time. num_gpus, num_cpus: of each actor; Ray gives it as many threads as CPUs. options: of
    `CascadePipeline.__call__`, where a row says nothing else; batch_size: pictures per network call, or "auto".
    Raises CascadeError when ray is not installed, for an unknown option, and when the dataset has no `prompt`.
    """
    try:
        from ray.data import ActorPoolStrategy
    except ImportError:
        raise CascadeError("ray is not installed; pip install 'cascade-diffusion[ray]'") from None
    columns = dataset.columns(fetch_if_missing=False)  # None: only known once it runs; then each row says what it lacks
    if columns is not None and "prompt" not in columns:
        raise CascadeError(f"the dataset has no column prompt; it has {', '.join(columns)}")
    fewest, most = (concurrency, concurrency) if isinstance(concurrency, int) else concurrency
    return dataset.map_batches(
        Drawer,
        fn_constructor_args=(model, {"device": device, "dtype": dtype}, draw_options(seed, options)),
        batch_size=rows,
        batch_format="pyarrow",
        compute=ActorPoolStrategy(min_size=fewest, max_size=most),
        num_gpus=num_gpus,
        num_cpus=num_cpus,
    )


def draw_options(run_seed: int, options: Mapping[str, Any]) -> DrawOptions:
    """Arguments of `CascadePipeline.__call__` as a run has them. Raises CascadeError for an unknown one."""
    names = (*_OPTIONS, *SETTINGS)
    for name in options:
        if name not in names:
            close = difflib.get_close_matches(name, names, n=1)
            hint = f"did you mean {close[0]}?" if close else f"expected {', '.join(names)}"
            raise CascadeError(f"{quoted(name)} is not an option; {hint}")
    plain = {own: options[name] for name, own in _OPTIONS.items() if name in options}
    return DrawOptions(run_seed=run_seed, sampling={name: options.get(name) for name in SETTINGS}, **plain)


def _failed(reason: str) -> dict[str, Any]:
    return {"number": None, "seed": None, "image": None, "error": reason}


def _joined(table: pa.Table, rows: Sequence[int], added: Iterable[Mapping[str, Any]]) -> pa.Table:
    """Row `rows[n]` of the table beside the n-th of `added`."""
    import pyarrow as pa

    types = dict(zip(ADDED, (pa.int64(), pa.int64(), pa.binary(), pa.string()), strict=True))
    if list(rows) != list(range(len(table))):  # a copy, only where a prompt has several pictures
        table = table.take(pa.array(rows, pa.int64()))
    kept = table.select([name for name in table.column_names if name not in ADDED])
    columns = pa.Table.from_pylist(list(added), pa.schema(list(types.items())))
    for name in ADDED:
        kept = kept.append_column(name, columns[name])
    return kept
