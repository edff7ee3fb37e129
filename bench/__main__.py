"""`make bench`, or `python -m bench [LEG...]`: measure, print a table, record it under bench/results."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

from bench import bare, preprocessing, service
from bench.record import table, write


def run_service() -> tuple[dict[str, Any], str]:
    rows = service.measure("vits16", "auto")
    return {"rows": rows}, shown(rows, "in_flight", "images_per_second", "p50_ms", "p99_ms", "mean_batch", "of_bare")


def run_bare() -> tuple[dict[str, Any], str]:
    rows = bare.measure(["vits16"], ["float32", "bfloat16"], [224, 512], [1, 8, 32])
    return {"rows": rows}, shown(rows, "model", "dtype", "size", "batch", "ours", "transformers_eager", "ratio")


def run_preprocessing() -> tuple[dict[str, Any], str]:
    result = preprocessing.measure()
    columns = ("preset", "reference", "max_level_difference", "cls_cosine_min", "patch_cosine_mean", "patch_cosine_min")
    return result, shown(result["summary"], *columns)


LEGS: dict[str, Callable[[], tuple[dict[str, Any], str]]] = {
    "service": run_service,
    "bare": run_bare,
    "preprocessing": run_preprocessing,
}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench", description="Measure, print a table, record it.")
    parser.add_argument("legs", nargs="*", metavar="LEG", help=f"{', '.join(LEGS)}; all when none is named")
    legs = parser.parse_args().legs or list(LEGS)
    if unknown := set(legs) - set(LEGS):
        parser.error(f"no leg {', '.join(sorted(unknown))}; there are {', '.join(LEGS)}")
    for leg in legs:
        result, text = LEGS[leg]()
        print(text)
        print("recorded in", write(leg, result), flush=True)


def shown(rows: list[dict[str, Any]], *columns: str) -> str:
    def cell(value: object) -> str:
        return f"{value:.6g}" if isinstance(value, float) else str(value)

    return table(list(columns), [[cell(row[column]) for column in columns] for row in rows])


if __name__ == "__main__":
    main()
