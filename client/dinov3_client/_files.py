"""Atomic writing of files."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary path, renamed to `path` when the block succeeds: `path` never holds part of a file."""
    draft = path.with_name(f".{os.getpid()}-{threading.get_ident()}.tmp")  # short: `path` may have the longest name
    try:
        yield draft
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)
