"""Captioned pictures: records, drawn scenes, training views, batches."""
