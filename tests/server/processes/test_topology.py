"""Choices before any process starts."""

from __future__ import annotations

import pytest

from dinov3_server.errors import StartupError
from dinov3_server.processes.topology import hold_port


@pytest.mark.parametrize("host", ["a..b", "a" * 80])
def test_an_invalid_host_name_is_a_startup_error(host: str) -> None:
    with pytest.raises(StartupError, match=f"cannot listen on {host}:0: not a host name; .*--host"), hold_port(host, 0):
        pass
