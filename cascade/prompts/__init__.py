"""Prompts as streams of records: .txt, .jsonl, .csv, Parquet, folders of captions, standard input.

A bad line is named, the others go on. Memory does not grow with the number of lines.
"""
