"""`python -m cascade`: the program `cascade`."""

import io
import os
import sys


def run() -> int:
    """Run the program and return its exit status. Ctrl-C ends it with one line, even while it is still loading."""
    _open_what_is_closed()
    _print_what_can_be_printed()
    try:
        from cascade.cli.program import main

        return main()
    except KeyboardInterrupt:
        sys.stderr.write("cascade: stopped\n")
        return 1
    finally:
        _drop_what_cannot_be_printed()


def _open_what_is_closed() -> None:
    """Give a closed standard stream the null device, or the next file that is opened would take its place."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: PTH123, SIM115 (until the end)


def _print_what_can_be_printed() -> None:
    """Escape characters that an output's encoding lacks (an arrow in cp1252 on Windows, say) instead of raising."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _drop_what_cannot_be_printed() -> None:
    """Empty the buffer of an output that is full or closed: Python would try again at its end, with a traceback."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, stream.fileno())
            os.close(null)


if __name__ == "__main__":
    sys.exit(run())
