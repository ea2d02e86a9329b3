"""The command line. Commands import heavy packages only when they run, so that `cascade --help` is fast."""

from __future__ import annotations

import io
import logging
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import click

from cascade._version import __version__
from cascade.cli.data import check_data
from cascade.cli.evaluate import evaluate
from cascade.cli.generate import generate
from cascade.cli.model import assemble, convert, info, trace
from cascade.cli.serve import serve, studio
from cascade.cli.terminal import PlainFormatter, say
from cascade.cli.train import encode, make, plot, train
from cascade.cli.upscale import upscale
from cascade.errors import CascadeError
from cascade.system.process import wait_asleep_on_a_busy_machine

__all__ = ["main"]


@click.group(invoke_without_command=True, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="cascade")
@click.pass_context
def program(context: click.Context) -> None:
    """A pixel-space text-to-image cascade: draw pictures, train stages, assemble cascades.

    Exit status: 0 all done; 1 some pictures failed, and are named, or a run was stopped; 2 the call was wrong or could
    not run.
    """
    if context.invoked_subcommand is None:
        say(context.get_help(), error=True)
        context.exit(2)


for command in (
    generate,
    studio,
    serve,
    upscale,
    make,
    train,
    encode,
    evaluate,
    check_data,
    plot,
    trace,
    info,
    assemble,
    convert,
):
    program.add_command(command)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line, by default the process' own; returns the exit status."""
    wait_asleep_on_a_busy_machine()
    with _plain_messages():
        try:
            status = program.main(arguments, prog_name="cascade", standalone_mode=False)
        except CascadeError as error:
            return _fail(str(error).split("\n"))
        except OSError as error:
            # A path without permission, or too long: reported here, because every command opens files.
            return _fail([f"{error.filename or 'a file cannot be read or written'}: {error.strerror or error}"])
        except click.UsageError as error:
            path = error.ctx.command_path if error.ctx else "cascade"
            return _fail([f"{' '.join(error.format_message().split())} See `{path} --help`."])
        except click.ClickException as error:
            return _fail([error.format_message()])
        except (click.Abort, KeyboardInterrupt):
            say("cascade: stopped", error=True)
            return 1
    return int(status or 0)


def _fail(lines: Sequence[str]) -> int:
    for line in lines:
        say(f"cascade: error: {line}", error=True)
    return 2


@contextmanager
def _plain_messages() -> Iterator[None]:
    """Print log messages and warnings as plain lines on stderr while a command runs; any file name can be printed."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # names need not be UTF-8
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(PlainFormatter())
    logger = logging.getLogger("cascade")
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *_, **__: say(f"cascade: warning: {message}", error=True)
        try:
            yield
        finally:
            logger.removeHandler(handler)
            logger.setLevel(level)
