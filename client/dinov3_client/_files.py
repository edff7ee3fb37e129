"""Atomic writing of files."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

# The drafts that exist now, for a process that ends without unwinding.
_DRAFTS: set[Path] = set()


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary path, renamed to `path` when the block succeeds: `path` never holds part of a file."""
    draft = path.with_name(f".{os.getpid()}-{threading.get_ident()}.tmp")  # short: `path` may have the longest name
    with removed_at_end(draft):
        yield draft
        draft.replace(path)


@contextmanager
def removed_at_end(draft: Path) -> Iterator[None]:
    """Remove the file `draft`, if it exists, at the end of the block or by `remove_drafts`."""
    _DRAFTS.add(draft)
    try:
        yield
    finally:
        draft.unlink(missing_ok=True)
        _DRAFTS.discard(draft)


def remove_drafts() -> None:
    """Remove the drafts of all threads, before the process ends."""
    for draft in tuple(_DRAFTS):
        with suppress(OSError):
            draft.unlink(missing_ok=True)
