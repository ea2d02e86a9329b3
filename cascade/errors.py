"""The package's exceptions, for failures that are not bugs in it. Each message is one line.

CascadeError            a prompt, setting, argument or file is wrong; the same call will fail again
  StorageError          a folder or disk failed: full, not writable, missing; once fixed, the same call continues
  ShortageError         not enough memory; a smaller batch, picture or network may fit
  DownloadError         a hub could not be reached or lacks the model; a later try may succeed
"""


class CascadeError(ValueError):
    """Bad input: one line that names the file, setting or value, what was expected, and the way out.

    The command line prints it without a traceback and exits with status 2.
    """


class StorageError(CascadeError):
    """A folder or disk failed: it is full, not writable or missing. Once that is fixed, the same call continues."""


class ShortageError(CascadeError):
    """There is not enough memory for this size; a smaller batch, picture or network may fit."""


class DownloadError(CascadeError):
    """A hub could not be reached, or lacks the requested model."""


def output_error(error: OSError) -> StorageError:
    """The error of a standard output that cannot be written."""
    return StorageError(f"standard output: cannot be written: {error.strerror or error}; what was drawn or saved stays")
