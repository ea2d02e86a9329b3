"""Modules of scripts/train_text_encoder.py and scripts/measure_text_encoder.py."""
