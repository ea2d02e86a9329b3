"""Prompts as streams of records: .txt, .jsonl, .csv, Parquet, folders of captions, standard input.

A bad line is reported, and the others continue. Memory does not grow with the number of lines.
"""
