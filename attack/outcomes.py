"""The outcomes of the requests of `make chaos`, by the kind of caller."""

from __future__ import annotations

import re
import threading
from collections import Counter
from typing import Any

OUTCOMES = ("answered", "refused", "left", "wrong", "lost")
COLUMNS = ("caller", "asked", *OUTCOMES)
_NOTES = 10


class Outcomes:
    """Counts by caller and outcome. Threads may share it.

    answered: with the expected answer. refused: with a status that asks to retry. left: the caller's deadline passed,
    or the caller cancelled. wrong: an answer that differs from the expected one. lost: no answer although the caller
    retried as long as it may, or a status that no request here may get.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts: Counter[tuple[str, str]] = Counter()
        self.reasons: Counter[str] = Counter()
        """Refusals by status and the first part of their text, without its numbers."""
        self.notes: dict[str, list[str]] = {"wrong": [], "lost": []}
        """The first few of each outcome."""

    def add(self, caller: str, outcome: str, why: str = "", count: int = 1) -> None:
        """Add `count` requests with this outcome; `why` is the reason of a refusal, or what was wrong or lost."""
        with self._lock:
            self._counts[caller, outcome] += count
            if outcome == "refused":
                self.reasons[re.sub(r"\d[\d.]*", "N", why.partition(";")[0])[:140]] += count
            elif outcome in self.notes and len(self.notes[outcome]) < _NOTES:
                self.notes[outcome].append(f"{caller}: {why[:300]}")

    def count(self, outcome: str, caller: str | None = None) -> int:
        """Return the number of requests with this outcome, of one caller or of all."""
        with self._lock:
            return sum(n for (name, of), n in self._counts.items() if of == outcome and caller in (None, name))

    def rows(self) -> list[dict[str, Any]]:
        """Return a row under COLUMNS for each caller and one for all; `asked` is the sum of the outcomes."""
        callers = sorted({caller for caller, _ in self._counts})
        rows = [
            {"caller": name or "all", **{outcome: self.count(outcome, name) for outcome in OUTCOMES}}
            for name in (*callers, None)
        ]
        return [{**row, "asked": sum(row[outcome] for outcome in OUTCOMES)} for row in rows]
