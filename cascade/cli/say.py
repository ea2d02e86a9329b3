"""Printing for all commands, with escapes, so that no name or prompt can control a terminal."""

from __future__ import annotations

import logging

import click

from cascade.errors import output_error
from cascade.quoting import message, shown_lines


def say(text: object, error: bool = False) -> None:
    """Print a result on standard output, or a message, cut if it is too long, on standard error.

    Raises StorageError for a standard output that is full or closed; without standard error a message is lost.
    """
    try:
        click.echo(message(str(text)) if error else shown_lines(str(text)), err=error)
    except BrokenPipeError:  # `| head` has read enough
        if not error:
            raise
    except OSError as problem:
        if not error:
            raise output_error(problem) from None


class PlainFormatter(logging.Formatter):
    """Log messages without level or name."""

    def format(self, record: logging.LogRecord) -> str:
        """The message's lines, escaped and cut as by `say`."""
        return message(super().format(record))
