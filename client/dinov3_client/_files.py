"""Files that are written whole."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path to write to, which takes the name `path` when all is written: no half a file ever has that name."""
    draft = path.with_name(f".{os.getpid()}-{threading.get_ident()}.tmp")  # short, as `path` may have the longest name
    try:
        yield draft
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)
