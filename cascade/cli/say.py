"""How commands print: everything passes through here, so that no name or prompt reaches a terminal as it is."""

from __future__ import annotations

import logging

import click

from cascade.quoting import message, shown_lines


def say(text: object, error: bool = False) -> None:
    """Print a result on standard output, or a message on standard error, which is cut where it is too long."""
    click.echo(message(str(text)) if error else shown_lines(str(text)), err=error)


class PlainFormatter(logging.Formatter):
    """The message alone."""

    def format(self, record: logging.LogRecord) -> str:
        """Its lines, escaped and cut as `say` does."""
        return message(super().format(record))
