"""From prompts to a folder of pictures, whatever happens: resumable, split over processes and shards.

Reading (`cascade.prompts`), planning, drawing and writing know nothing of each other; `run_batch` joins them.
"""

from cascade.batch.engine import Drawn, Engine, Shelf, Undrawn
from cascade.batch.layout import Layout
from cascade.batch.metadata import describe, read_metadata
from cascade.batch.output import Output
from cascade.batch.plan import DrawOptions, Job, Task, plan
from cascade.batch.progress import Bar, JsonLog, Progress
from cascade.batch.run import LOW_MEMORY_WINDOW, Summary, run_batch

__all__ = [
    "LOW_MEMORY_WINDOW",
    "Bar",
    "DrawOptions",
    "Drawn",
    "Engine",
    "Job",
    "JsonLog",
    "Layout",
    "Output",
    "Progress",
    "Shelf",
    "Summary",
    "Task",
    "Undrawn",
    "describe",
    "plan",
    "read_metadata",
    "run_batch",
]
