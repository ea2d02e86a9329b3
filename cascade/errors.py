"""What goes wrong for reasons that are not a fault of the program, as one line each.

CascadeError            a prompt, setting, argument or file is wrong; the same call fails again
  StorageError          a folder or disk failed: full, not writable, gone; mended, the same call goes on
  ShortageError         memory does not suffice; something smaller may
  DownloadError         a hub did not give what was asked for; later, it may
"""


class CascadeError(ValueError):
    """Bad input: one line that names the file, setting or value, what was expected, and the way out.

    The command line prints it without a traceback and exits with status 2.
    """


class StorageError(CascadeError):
    """A folder or disk failed: it is full, not writable or gone. Once that is mended, the same call goes on."""


class ShortageError(CascadeError):
    """Memory does not suffice, here or for this size; a smaller batch, picture or network may fit."""


class DownloadError(CascadeError):
    """A hub could not be reached, or has not what was asked for."""
