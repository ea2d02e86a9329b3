"""`python -m cascade` is the program `cascade`."""

import io
import sys


def run() -> int:
    """The program, whose exit status is returned. Ctrl-C ends it with one line, also while it is still loading."""
    _print_what_can_be_printed()
    try:
        from cascade.cli.program import main

        return main()
    except KeyboardInterrupt:
        sys.stderr.write("cascade: stopped\n")
        return 1


def _print_what_can_be_printed() -> None:
    """Escape characters that an output has not, such as a pipe in cp1252 on Windows, where Python would raise."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


if __name__ == "__main__":
    sys.exit(run())
