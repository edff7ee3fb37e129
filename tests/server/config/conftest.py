from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture
def existing(tmp_path: Path) -> str:
    path = tmp_path / "secret.npy"
    path.write_text("x")
    return str(path)
