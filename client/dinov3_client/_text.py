"""Untrusted text in messages."""

from __future__ import annotations


def printable(text: str) -> str:
    """Return `text` with characters that are not printable escaped as in Python source.

    A server or a file's name could otherwise clear a terminal, reverse the direction of text, or forge a line of a log.
    """
    if text.isprintable():
        return text
    return "".join(each if each.isprintable() else each.encode("unicode_escape").decode("ascii") for each in text)
