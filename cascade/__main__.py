"""`python -m cascade`: the program `cascade`."""

import io
import sys


def run() -> int:
    """Run the program and return its exit status. Ctrl-C ends it with one line, even while it is still loading."""
    _print_what_can_be_printed()
    try:
        from cascade.cli.program import main

        return main()
    except KeyboardInterrupt:
        sys.stderr.write("cascade: stopped\n")
        return 1


def _print_what_can_be_printed() -> None:
    """Escape characters that an output's encoding lacks (an arrow in cp1252 on Windows, say) instead of raising."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


if __name__ == "__main__":
    sys.exit(run())
