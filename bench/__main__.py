"""`make bench`, or `python -m bench [LEG...]`: measure, print a table, record it under bench/results.

A leg is a module with `measure() -> result`, `show(result) -> text`, and a docstring that states what is inside it.
"""

from __future__ import annotations

import argparse
from types import ModuleType

from bench import bare, preprocessing, rivals, service
from bench.record import write

LEGS: dict[str, ModuleType] = {"service": service, "bare": bare, "rivals": rivals, "preprocessing": preprocessing}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench", description="Measure, print a table, record it.")
    parser.add_argument("legs", nargs="*", metavar="LEG", help=f"{', '.join(LEGS)}; all when none is named")
    legs = parser.parse_args().legs or list(LEGS)
    if unknown := set(legs) - set(LEGS):
        parser.error(f"no leg {', '.join(sorted(unknown))}; there are {', '.join(LEGS)}")
    for name in legs:
        leg = LEGS[name]
        result = leg.measure()
        print(leg.show(result))
        print("recorded in", write(name, leg.__doc__ or "", result), flush=True)


if __name__ == "__main__":
    main()
