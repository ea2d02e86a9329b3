"""From prompts to a folder of pictures, whatever happens: resumable, split over processes and shards.

Reading (`cascade.prompts`), planning, drawing and writing know nothing of each other; `run_batch` joins them.
"""

from cascade.batch.layout import Layout
from cascade.batch.metadata import Describer, read_metadata
from cascade.batch.output import Output
from cascade.batch.pictures import Finished
from cascade.batch.plan import DrawOptions, Job, Planner, Target, plan
from cascade.batch.progress import Bar, JsonLog, Progress
from cascade.batch.request import BatchRequest, Outcome, generate_files
from cascade.batch.run import LOW_MEMORY_WINDOW, Summary, run_batch

__all__ = [
    "LOW_MEMORY_WINDOW",
    "Bar",
    "BatchRequest",
    "Describer",
    "DrawOptions",
    "Finished",
    "Job",
    "JsonLog",
    "Layout",
    "Outcome",
    "Output",
    "Planner",
    "Progress",
    "Summary",
    "Target",
    "generate_files",
    "plan",
    "read_metadata",
    "run_batch",
]
