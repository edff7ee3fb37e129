"""Fixtures of the tests of extractions."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.client.bulk.stub import broken, contents


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "source"
    folder.mkdir()
    for index in range(12):
        (folder / f"{index:02}.jpg").write_bytes(broken(index) if index in (0, 6, 11) else contents(index))
    return folder
