"""The one exception that stands for a user's mistake."""


class CascadeError(ValueError):
    """Bad input: one line that names the file, setting or value, what was expected, and the way out.

    The command line prints it without a traceback and exits with status 2.
    """
