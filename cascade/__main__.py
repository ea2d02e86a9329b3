"""`python -m cascade` is the program `cascade`."""

import sys


def run() -> int:
    """The program, whose exit status is returned. Ctrl-C ends it with one line, also while it is still loading."""
    try:
        from cascade.cli import main

        return main()
    except KeyboardInterrupt:
        sys.stderr.write("cascade: stopped\n")
        return 1


if __name__ == "__main__":
    sys.exit(run())
