"""Robustness tests of the server: `python -m attack fuzz`, `python -m attack coverage` and `python -m attack chaos`."""
