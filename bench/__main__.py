"""`make bench`, or `python -m bench [bare] [service]`: measure, print, record under bench/results."""

from __future__ import annotations

import argparse
from typing import Any

from bench import bare, service
from bench.record import table, write


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench", description="Measure, print a table, record it.")
    parser.add_argument("legs", nargs="*", metavar="LEG", help="bare, service; all when none is named")
    legs = parser.parse_args().legs or ["service", "bare"]
    for leg in legs:
        if leg == "bare":
            rows = bare.measure(["vits16"], ["float32", "bfloat16"], [224, 512], [1, 8, 32])
            show(rows, ["model", "dtype", "size", "batch", "ours", "transformers_eager", "ratio"])
        elif leg == "service":
            rows = service.measure("vits16", "auto")
            show(rows, ["in_flight", "images_per_second", "p50_ms", "p99_ms", "mean_batch", "of_bare"])
        else:
            parser.error(f"no leg {leg!r}; there are bare and service")
        print("recorded in", write(leg, {"rows": rows}))


def show(rows: list[dict[str, Any]], columns: list[str]) -> None:
    print(table(columns, [[str(row[column]) for column in columns] for row in rows]))


if __name__ == "__main__":
    main()
