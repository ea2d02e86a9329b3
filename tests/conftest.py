"""Standing here, this file puts tests/ on the import path: every test finds the helpers_*.py beside it."""

import os
import tempfile
from pathlib import Path

# What is remembered of a machine is remembered for these tests alone, in processes that they start as well.
_CACHE = str(Path(tempfile.gettempdir()) / "cascade-tests")
os.environ["XDG_CACHE_HOME"] = os.environ["LOCALAPPDATA"] = _CACHE
