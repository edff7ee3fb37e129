"""`make fuzz`, `make fuzz-coverage`, `make chaos`: `python -m attack NAME`, each with `--help`."""

from __future__ import annotations

import sys
from importlib import import_module

NAMES = ("fuzz", "coverage", "chaos")


def main(arguments: list[str]) -> int:
    if not arguments or arguments[0] not in NAMES:
        print(f"usage: python -m attack {{{','.join(NAMES)}}} [--help]", file=sys.stderr)
        return 2
    return int(import_module(f"attack.{arguments[0]}").main(arguments[1:]))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
