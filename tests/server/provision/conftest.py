from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.server.provision import weights_rig
from tests.support.fake_hub import FakeHub
from tests.support.file_server import FileServer


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[FakeHub]:
    """Run a fake hub with HF_ENDPOINT set to it, and no token."""
    weights_rig.clean(monkeypatch, tmp_path)
    with weights_rig.serving(monkeypatch) as serving:
        yield serving


@pytest.fixture
def files() -> Iterator[FileServer]:
    with FileServer() as server:
        yield server


@pytest.fixture
def no_sockets(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Fail the test if it opens a socket."""
    weights_rig.clean(monkeypatch, tmp_path)
    weights_rig.no_sockets(monkeypatch)


@pytest.fixture
def cache_dir(tmp_path: Path) -> Path:
    return tmp_path / "cache_dir"
