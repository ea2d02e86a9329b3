"""`python -m cascade` is the program `cascade`."""

import sys

from cascade.cli import main

sys.exit(main())
