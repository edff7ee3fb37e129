"""The goals, and how far a result reaches them."""

from __future__ import annotations

from typing import Any

MODEL, SIZE = "vitl16", 256
SERVED = ("eager", "graph")  # what the server runs
COMPILED = ("compiled", "compiled_graph")  # what it could run


def goals(result: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the goals, all for MODEL at SIZE pixels. `reached` is None if its figures are not measured (yet)."""
    product = max((row["teraflops"] for row in result.get("peak", [])), default=None)
    passes = [row for row in result.get("forward", []) if _counts(row)]
    bare = _best(passes, "images_per_second", SERVED)
    rows = [
        _goal("forward, of the measured bf16 matrix-product peak", 0.60, _best(passes, "teraflops", SERVED), product)
    ]
    for outputs, at_least in (("cls", 0.90), ("cls+patches", 0.70)):
        cases = [case for case in result.get("service", []) if case["in"] == "raw" and case["outputs"] == outputs]
        served = max((case["images_per_second"] for case in cases), default=None)
        rows.append(_goal(f"service, raw pixels to {outputs}, of the forward pass", at_least, served, bare))
    compared = [row for row in result.get("baselines", []) if _counts(row)][:1]
    theirs = _best(compared, "images_per_second", ("transformers_compiled",))
    for name, ours in (("as served", SERVED), ("compiled", COMPILED)):
        rows.append(
            _goal(
                f"forward, {name}, times transformers compiled", 1.3, _best(compared, "images_per_second", ours), theirs
            )
        )
    return rows


def _best(rows: list[dict[str, Any]], figure: str, variants: tuple[str, ...]) -> float | None:
    return max((value for row in rows for name, value in row[figure].items() if name in variants), default=None)


def _goal(goal: str, at_least: float, value: float | None, base: float | None) -> dict[str, Any]:
    return {"goal": goal, "at_least": at_least, "reached": round(value / base, 3) if value and base else None}


def _counts(row: dict[str, Any]) -> bool:
    return (row["model"], row["size"]) == (MODEL, SIZE)
