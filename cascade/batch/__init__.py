"""From prompts to a folder of pictures, whatever happens: resumable, split over processes and shards.

Reading (`cascade.prompts`), planning, drawing and writing know nothing of each other; `run_batch` joins them.
"""
