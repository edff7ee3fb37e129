"""Reads lists of images: text with a name in each line, or a column of a CSV file."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Sequence
from typing import NamedTuple

from dinov3_client.bulk.errors import SourceError

STDIN = "-"
_TABLES = (".csv", ".tsv")
_BLANKS = " \t\r"


class Names(NamedTuple):
    """The names in a list, and the number of the line of each."""

    names: Sequence[str]
    lines: Sequence[int]


def parse(data: bytes, source: str, column: str | None) -> Names:
    """Return the names in a list; `source` is its location, for messages.

    A byte order mark, blank lines, spaces around names, and lines that begin with # do not count. With `column`, the
    list is a CSV file with a header, separated by commas, semicolons or tabs. Raises SourceError.
    """
    if data[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise SourceError(f"{source} is text in UTF-16; save the list as UTF-8")
    text = os.fsdecode(data.removeprefix(b"\xef\xbb\xbf"))
    if "\0" in text:
        raise SourceError(f"{source} is no list of images: it contains null bytes, which names cannot")
    if column is not None:
        return _column(text, source, column)
    # Not splitlines: names may contain other line separators, such as U+2028.
    found = [(line, number) for number, raw in enumerate(text.split("\n"), 1) if (line := raw.strip(_BLANKS))]
    found = [(line, number) for line, number in found if not line.startswith("#")]
    if found and source.lower().endswith(_TABLES):
        raise SourceError(
            f"{source} is a CSV file: give the column of the names with --list-column; its header is {found[0][0]!r}"
        )
    return Names([line for line, _ in found], [number for _, number in found])


def _column(text: str, source: str, column: str) -> Names:
    skipped = 0
    while text.lstrip(_BLANKS).startswith(("#", "\n")):
        _, _, text = text.partition("\n")
        skipped += 1
    header = text.partition("\n")[0]
    separator = next((each for each in (",", "\t", ";") if each in header), ",")
    rows = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
    names: list[str] = []
    lines: list[int] = []
    try:
        columns = [each.strip() for each in next(rows, [])]
        if columns.count(column) != 1:
            raise SourceError(
                f"{source} has {'several columns' if column in columns else 'no column'} {column!r} (--list-column); "
                f"its header has {', '.join(map(repr, columns)) or 'none at all'}"
            )
        place = columns.index(column)
        for row in rows:
            name = row[place].strip(_BLANKS) if place < len(row) else ""
            if name:
                names.append(name)
                lines.append(skipped + rows.line_num)
            elif any(cell.strip() for cell in row):
                raise SourceError(f"{source}, line {skipped + rows.line_num}: the column {column!r} is empty")
    except csv.Error as error:
        raise SourceError(f"{source}, line {skipped + rows.line_num}: {error}") from None
    return Names(names, lines)
