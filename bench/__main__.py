"""`make bench`, or `python -m bench [LEG...]`: measure, print a table, record it under bench/results, draw docs/plots.

A leg is a module with `measure() -> result`, `show(result) -> text`, and a docstring that states what is inside it.
"""

from __future__ import annotations

import argparse
from types import ModuleType

from bench import (
    bare,
    bombs,
    client,
    contended,
    datapath,
    memory,
    operators,
    outputs,
    overload,
    plots,
    preprocessing,
    rivals,
    service,
    shapes,
    start,
    training,
)
from bench.record import write

LEGS: dict[str, ModuleType] = {
    "service": service,
    "bare": bare,
    "operators": operators,
    "rivals": rivals,
    "datapath": datapath,
    "memory": memory,
    "shapes": shapes,
    "start": start,
    "preprocessing": preprocessing,
    "outputs": outputs,
    "client": client,
    "contended": contended,
    "overload": overload,
    "bombs": bombs,
    "training": training,
}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench", description="Measure, print a table, record it.")
    parser.add_argument(
        "legs", nargs="*", metavar="LEG", help=f"{', '.join(LEGS)}; all when none is named; plots: draw them only"
    )
    legs = parser.parse_args().legs or list(LEGS)
    if unknown := set(legs) - {*LEGS, "plots"}:
        parser.error(f"no leg {', '.join(sorted(unknown))}; there are {', '.join(LEGS)}, and plots")
    for name in [leg for leg in legs if leg != "plots"]:
        leg = LEGS[name]
        result = leg.measure()
        print("recorded in", write(name, leg.__doc__ or "", result))
        print(leg.show(result), flush=True)
    for path in plots.draw():
        print("drawn:", path, flush=True)


if __name__ == "__main__":
    main()
