"""What operating systems do each in their own way: one module for POSIX, one for Windows, of the same names.

Nothing else of the package asks which system it is on, nor imports what only one of them has. What a system cannot do
is left out in its module, with the reason.
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
