"""What scripts/train_text_encoder.py and scripts/measure_text_encoder.py are made of."""
