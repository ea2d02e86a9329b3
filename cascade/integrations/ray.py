"""Ray Data: a dataset of prompts becomes a dataset of pictures, drawn by a pool of actors.

Needs the extra `cascade-diffusion[ray]`. A picture depends on its row and the run seed alone, not on the number of
actors or on how Ray splits the dataset.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from cascade.batch.metadata import Describer, encode
from cascade.batch.plan import DrawOptions, Job, Planner, Target
from cascade.config.values import SETTINGS
from cascade.drawing.task import Result, Undrawn
from cascade.errors import CascadeError, quoted
from cascade.pictures.rasters import file_formats
from cascade.pipeline import CascadePipeline
from cascade.prompts.records import COLUMNS, BadLineError, checked, record_of, without_nulls

if TYPE_CHECKING:
    import pyarrow as pa
    import ray.data

ADDED = ("number", "seed", "image", "error")
"""Columns of the result; they replace columns of the dataset with the same names."""
_READ = set(COLUMNS) - {"image", "mask", "strength"}
"""Columns that describe a picture to draw. `image` is the result here, so a row cannot name a picture to change."""
_OPTIONS = {
    "num_images_per_prompt": "num_images",
    **{name: name for name in ("negative_prompt", "until", "height", "width", "preset", "batch_size")},
}
"""Arguments of a call and their names in `DrawOptions`."""


class Drawer:
    """The state of an actor: a pipeline, loaded once."""

    def __init__(self, model: str | None, load: Mapping[str, Any], options: DrawOptions) -> None:
        """model, load: for `CascadePipeline.from_pretrained`. Raises CascadeError for options that no row can fix."""
        pipeline = CascadePipeline.from_pretrained(model, **load)
        self._run_seed, self._planner = options.run_seed, Planner(pipeline, options)
        self._engine, self._describe = pipeline.engine(options.conduct()), Describer(pipeline, options)

    def __call__(self, table: pa.Table) -> pa.Table:
        """One row per picture, in the order of the prompts; and one per prompt that cannot be drawn."""
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
        """The job of a row, or the reason why it cannot be drawn."""
        try:
            return self._planner.job(record_of(checked(without_nulls(row)), self._run_seed, origin="row"))
        except (BadLineError, CascadeError) as error:
            return str(error)

    def _picture(self, target: Target, result: Result) -> dict[str, Any]:
        labels = {"number": target.number, "seed": target.job.record.seed}
        if isinstance(result, Undrawn):
            return _failed(result.reason) | labels
        form = target.job.slots[-1].config.pictures
        format = file_formats(form)[0]
        content = encode(result.pixels[-1], form, self._describe(target, result), format)[0]
        return {**labels, "image": content, "error": None}


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
    """A dataset of prompts -> a dataset of pictures, one row per picture.

    Each row needs a `prompt`, and may have the columns of a prompt file: `id`, `seed`, `negative_prompt`, `num_images`,
    `guidance`, `steps` (the last two a value, or {stage: value}); for null the call's value holds. All columns are
    kept, and these added: `number` of the picture among those of its prompt, `seed`, `image` (PNG with its metadata) or
    null, and `error`, null or the reason why there is no picture.

    A row without a seed gets one from (seed, id), or without an id from (seed, text), like the first line with that
    text in a prompt file. Rows of a dataset have no order, so repetitions cannot be counted: rows with the same text
    and neither id nor seed get equal pictures. For different ones use `num_images`, or give ids.

    model, device, dtype: as in `CascadePipeline.from_pretrained`. concurrency: number of actors, or (fewest, most).
    rows: rows per actor call. num_gpus, num_cpus: per actor; Ray gives it as many threads as CPUs. options: arguments
    of `CascadePipeline.__call__`, which a row may override; batch_size: pictures per network call, or "auto".
    Raises CascadeError when ray is not installed, for an unknown option, and when the dataset has no `prompt`.
    """
    try:
        from ray.data import ActorPoolStrategy
    except ImportError:
        raise CascadeError("ray is not installed; pip install 'cascade-diffusion[ray]'") from None
    columns = dataset.columns(fetch_if_missing=False)  # None: unknown until it runs; then each row is checked
    if columns is not None and "prompt" not in columns:
        raise CascadeError(f"the dataset has no column `prompt`; it has {', '.join(columns)}")
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
    """Arguments of `CascadePipeline.__call__` as options of a run. Raises CascadeError for an unknown one."""
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
    """Row `rows[n]` of the table joined with the n-th of `added`."""
    import pyarrow as pa

    types = dict(zip(ADDED, (pa.int64(), pa.int64(), pa.binary(), pa.string()), strict=True))
    if list(rows) != list(range(len(table))):  # copy only if a prompt has several pictures
        table = table.take(pa.array(rows, pa.int64()))
    kept = table.select([name for name in table.column_names if name not in ADDED])
    columns = pa.Table.from_pylist(list(added), pa.schema(list(types.items())))
    for name in ADDED:
        kept = kept.append_column(name, columns[name])
    return kept
