"""Prompts -> a folder of pictures: resumable after any interruption, split over processes and shards.

Reading (`cascade.prompts`), planning, drawing and writing do not depend on each other; `run_batch` joins them.
"""
