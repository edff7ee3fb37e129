"""Text of others, for messages."""

from __future__ import annotations


def printable(text: str) -> str:
    """`text` with an escape, as Python writes it, for each character that is not printable.

    Those of a server or of a file's name could clear a terminal, turn the direction of what follows, or begin a line of
    a log that looks like another's.
    """
    if text.isprintable():
        return text
    return "".join(each if each.isprintable() else each.encode("unicode_escape").decode("ascii") for each in text)
