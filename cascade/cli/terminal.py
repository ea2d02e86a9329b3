"""Parts of all commands: printing with escapes, and options that are paths."""

from __future__ import annotations

import logging
from functools import partial
from typing import Any

import click

from cascade.errors import CascadeError, message, output_error, shown_lines
from cascade.files.paths import expanded

# --- printing --------------------------------------------------------------------------------------------------------
# Printing for all commands, with escapes, so that no name or prompt can control a terminal.


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


# --- paths -----------------------------------------------------------------------------------------------------------
# Options and arguments that are paths.


class PathText(click.ParamType):  # type: ignore[type-arg]  # generic since click 8.4 alone
    """A path, or the name of a model: not empty; a leading `~` is the home folder, as in a shell."""

    name = "path"

    def convert(self, value: Any, parameter: click.Parameter | None, context: click.Context | None) -> str:
        if value == "":
            self.fail("is empty; name a file or folder.", parameter, context)
        try:
            return expanded(str(value))
        except CascadeError as error:
            self.fail(f"{error}.", parameter, context)


path_option = partial(click.option, type=PathText())
"""`click.option` for a path."""
path_argument = partial(click.argument, type=PathText())
"""`click.argument` for a path."""
