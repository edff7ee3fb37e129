"""What became of every request of `make chaos`, by the kind of its caller."""

from __future__ import annotations

import re
import threading
from collections import Counter
from typing import Any

OUTCOMES = ("answered", "refused", "left", "wrong", "lost")
COLUMNS = ("caller", "asked", *OUTCOMES)
_NOTES = 10


class Book:
    """Counts by caller and outcome. Threads may share it.

    answered: rightly. refused: with a status that asks to try again. left: the caller's deadline passed, or it
    cancelled. wrong: an answer that is not the truth. lost: no answer, though the caller tried again as long as it may,
    or a status that no request here may get.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts: Counter[tuple[str, str]] = Counter()
        self.reasons: Counter[str] = Counter()
        """Of refusals: status and the first part of its text, without the numbers in it."""
        self.notes: dict[str, list[str]] = {"wrong": [], "lost": []}
        """The first few of each."""

    def note(self, caller: str, outcome: str, why: str = "", count: int = 1) -> None:
        """`count` requests had this outcome; `why` is the reason of a refusal, or what was wrong or lost."""
        with self._lock:
            self._counts[caller, outcome] += count
            if outcome == "refused":
                self.reasons[re.sub(r"\d[\d.]*", "N", why.partition(";")[0])[:140]] += count
            elif outcome in self.notes and len(self.notes[outcome]) < _NOTES:
                self.notes[outcome].append(f"{caller}: {why[:300]}")

    def count(self, outcome: str, caller: str | None = None) -> int:
        """Of one caller, or of all."""
        with self._lock:
            return sum(n for (who, what), n in self._counts.items() if what == outcome and caller in (None, who))

    def rows(self) -> list[dict[str, Any]]:
        """Under COLUMNS, one a caller and one of all; `asked` is the sum of the outcomes."""
        callers = sorted({caller for caller, _ in self._counts})
        rows = [
            {"caller": name or "all", **{outcome: self.count(outcome, name) for outcome in OUTCOMES}}
            for name in (*callers, None)
        ]
        return [{**row, "asked": sum(row[outcome] for outcome in OUTCOMES)} for row in rows]
