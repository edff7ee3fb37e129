"""Counts the files and tar members of a source that are not extracted."""

from __future__ import annotations

import os
import re

_SHOWN = 8
_MOST_ENDINGS = 1000
_ENDING = re.compile(r"(\.tar)?\.\w{1,12}")


class LeftOut:
    """Counts by ending what was left out, with an example of each."""

    def __init__(self) -> None:
        self._found: dict[str, tuple[int, str]] = {}

    def add(self, name: str, within: str = "") -> None:
        """Count a file under its ending; `within` is the tar file of a member."""
        base = os.path.basename(name)  # noqa: PTH119 - a name within a tar or a bucket
        stem, ending = os.path.splitext(base)  # noqa: PTH122
        if stem.lower().endswith(".tar"):
            ending = stem[-4:] + ending
        if base.startswith("."):
            ending = "hidden"
        elif not _ENDING.fullmatch(ending):
            ending = "without ending"
        self.add_kind(ending.lower(), f"{within}:{name}" if within else name)

    def add_kind(self, kind: str, name: str, count: int = 1) -> None:
        """Count files or members under another heading than their ending; `name` is one of them."""
        if kind not in self._found and len(self._found) >= _MOST_ENDINGS:
            kind = "with other endings"
        before, example = self._found.get(kind, (0, name))
        self._found[kind] = (before + count, example)

    def update(self, other: LeftOut) -> None:
        """Add all that `other` counted."""
        for kind, (count, example) in other._found.items():
            self.add_kind(kind, example, count)

    def __str__(self) -> str:
        """Return such as "12 .txt (e.g. a/b.txt), 3 without ending (e.g. README)"; "" if nothing was left out."""
        ranked = sorted(self._found.items(), key=lambda each: (-each[1][0], each[0]))
        parts = [f"{count:,} {kind} (e.g. {example})" for kind, (count, example) in ranked[:_SHOWN]]
        rest = ranked[_SHOWN:]
        if rest:
            kinds = "1 other kind" if len(rest) == 1 else f"{len(rest)} other kinds"
            parts.append(f"{sum(count for _, (count, _) in rest):,} of {kinds} (e.g. {rest[0][1][1]})")
        return ", ".join(parts)
