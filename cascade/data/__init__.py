"""Captioned pictures: records, drawn scenes, training views, batches."""

from cascade.data.dataset import BadRecordError, Record
from cascade.data.loader import Batch, View, Views, batches, captions_of

__all__ = ["BadRecordError", "Batch", "Record", "View", "Views", "batches", "captions_of"]
