"""`make bench`, or `python -m bench [BENCHMARK...]`: measure, print tables, record in bench/results, draw docs/plots.

A benchmark is a module with `measure() -> result` and `show(result) -> text`. Its docstring states what is measured and
is recorded with the result.
"""

from __future__ import annotations

import argparse
from types import ModuleType

from bench import (
    bare,
    baselines,
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
    ray,
    service,
    shapes,
    start,
    training,
)
from bench.record import write

BENCHMARKS: dict[str, ModuleType] = {
    "service": service,
    "bare": bare,
    "operators": operators,
    "baselines": baselines,
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
    "ray": ray,
}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench", description="Measure, print tables, record the results.")
    parser.add_argument(
        "benchmarks",
        nargs="*",
        metavar="BENCHMARK",
        help=f"{', '.join(BENCHMARKS)} (default: all), or plots, which only draws docs/plots",
    )
    names = parser.parse_args().benchmarks or list(BENCHMARKS)
    if unknown := set(names) - {*BENCHMARKS, "plots"}:
        parser.error(f"unknown benchmark: {', '.join(sorted(unknown))}; allowed: {', '.join(BENCHMARKS)}, plots")
    for name in names:
        if name != "plots":
            benchmark = BENCHMARKS[name]
            result = benchmark.measure()
            print("recorded in", write(name, benchmark.__doc__ or "", result))
            print(benchmark.show(result), flush=True)
    for path in plots.draw():
        print("drawn:", path, flush=True)


if __name__ == "__main__":
    main()
