"""Prompts as streams of records: .txt, .jsonl, .csv, Parquet, folders of captions, standard input.

A bad line is named, the others go on. Memory does not grow with the number of lines.
"""

from cascade.prompts.columns import COLUMNS, checked, without_nulls
from cascade.prompts.reading import given_prompts, read_prompts
from cascade.prompts.record import BadLineError, Failure, PromptRecord, record_of
from cascade.prompts.sources import STANDARD_INPUT, count_prompts

__all__ = [
    "COLUMNS",
    "STANDARD_INPUT",
    "BadLineError",
    "Failure",
    "PromptRecord",
    "checked",
    "count_prompts",
    "given_prompts",
    "read_prompts",
    "record_of",
    "without_nulls",
]
