"""Standing here, this file puts tests/ on the import path: every test finds the helpers_*.py beside it."""
