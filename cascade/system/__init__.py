"""The operating system, the machine and this process; what differs between systems is a function of this package.

`posix` and `windows` have the same names. No other part of the package checks the system, or imports a module that only
one system has. A function that a system cannot offer is a stub in its module, with the reason.
"""

import sys

if sys.platform == "win32":
    from cascade.system.windows import (
        CHILD_ENDED,
        OPEN_FILES_STAY,
        STOP_SIGNALS,
        after_fork,
        c_library,
        cache_folder,
        exchange,
        is_same_file,
        lock,
        lock_byte,
        open_to_read,
        read_at,
        replace,
        shared_memory,
        sync,
        unlock,
        unlock_byte,
        write_at,
    )
else:
    from cascade.system.posix import (
        CHILD_ENDED,
        OPEN_FILES_STAY,
        STOP_SIGNALS,
        after_fork,
        c_library,
        cache_folder,
        exchange,
        is_same_file,
        lock,
        lock_byte,
        open_to_read,
        read_at,
        replace,
        shared_memory,
        sync,
        unlock,
        unlock_byte,
        write_at,
    )

__all__ = [
    "CHILD_ENDED",
    "OPEN_FILES_STAY",
    "STOP_SIGNALS",
    "after_fork",
    "c_library",
    "cache_folder",
    "exchange",
    "is_same_file",
    "lock",
    "lock_byte",
    "open_to_read",
    "read_at",
    "replace",
    "shared_memory",
    "sync",
    "unlock",
    "unlock_byte",
    "write_at",
]
