"""What the server must bear: `python -m attack fuzz`, `python -m attack coverage` and `python -m attack chaos`."""
